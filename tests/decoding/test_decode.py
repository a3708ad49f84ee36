"""Column decoding: one forward over the finished layout, and transformers on each branch alone, say what is right."""

import dataclasses
import json
import logging
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sources import random_params

import pd_jax.decoding.decoder
from pd_jax import ParallelDecoder, Sample, SamplingParams, lora
from pd_jax.attention import dense_attention, sibling_scores
from pd_jax.config import VISIBILITIES, Align, Llama3Rope, LoraConfig
from pd_jax.cpu import PIECE
from pd_jax.data.answers import Transcript
from pd_jax.decoding.prompts import make_prompt
from pd_jax.decoding.sampling import Controls, Method, SamplingOptions, cut, distribution, draw
from pd_jax.decoding.steps import BLOCK, Program, cache_bytes, cached_attention, decode_block, feed, prefill, start
from pd_jax.files import config_to_hf, known_config, save_adapter, save_model, write_params
from pd_jax.layout import Branch, TokenSample, answer_columns
from pd_jax.mesh import make_mesh
from pd_jax.params import PROJECTIONS, init_params
from pd_jax.planning.compile import decoder_arguments

PAIRED = tiny.config(tie_word_embeddings=False, sibling_bias=True)
PLAIN = tiny.config(tie_word_embeddings=False, pair_indices=())
KNOWN = len(tiny.tokenizer())
NEVER = (KNOWN, KNOWN + 1)  # ids that the tokenizer does not have: a branch goes on to its limit


@cache
def params(config):
    tree = random_params(config, jax.random.key(1))
    if config.sibling_bias:
        tree["layers"]["sibling_bias"] = jax.random.normal(jax.random.key(2), tree["layers"]["sibling_bias"].shape)
    return tree


@cache
def decoder(config=PAIRED, eos=NEVER, **settings):
    return ParallelDecoder(config, params(config), tiny.tokenizer(), eos, **settings)


def alone(eos=NEVER, config=PLAIN):
    """Every branch as if there were no other: what it says depends on nothing but its background and prompt."""
    return decoder(config, eos, visibility="isolated", align="ragged")


def ids(seed, length):
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, KNOWN, length))


def prompts(sample):
    return TokenSample(sample.background, [Branch(branch.prompt) for branch in sample.branches])


# Ragged prompts and answers; branches that end early, one at once; two numbers of branches.
FINISHED = [
    TokenSample(
        ids(0, 6), [Branch(ids(1, 4), ids(2, 5), 0), Branch(ids(3, 2), (), 0), Branch(ids(4, 3), ids(5, 3), 0)]
    ),
    TokenSample((), [Branch(ids(6, 1), ids(7, 2), 0), Branch(ids(8, 5), ids(9, 4), 0)]),
]
ASKED = [prompts(sample) for sample in FINISHED]


def tokens(results):
    return [[branch.token_ids for branch in result.branches] for result in results]


# --- the invariant
@pytest.mark.parametrize(("branches", "slots"), [(1, 40), (128, 40), (128, 2 * PIECE), (129, 2 * PIECE + 40)])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_over_the_cache_is_dense_attention(branches, slots, biased):
    samples, heads, kv_heads, size, filled = 2, 6, 3, 16, slots - 3
    rng = np.random.default_rng(branches)
    q, k, v = (
        jnp.asarray(rng.standard_normal((samples, *shape, size)), jnp.float32)
        for shape in ((branches, heads), (slots, kv_heads), (slots, kv_heads))
    )
    mask = jnp.asarray(rng.random((samples, branches, slots)) < 0.5).at[..., filled - 1].set(True)
    mask = mask.at[..., filled:].set(False)
    siblings = jnp.asarray(rng.random(mask.shape) < 0.5).at[..., filled - 1].set(False)
    bias = jnp.array([-jnp.inf, *rng.standard_normal(heads - 1)], jnp.float32) if biased else None
    expected = dense_attention(q, k, v, mask, sibling_scores(siblings, bias) if biased else None)
    k_cached, v_cached = (jnp.transpose(x, (2, 0, 1, 3)).reshape(kv_heads * samples, slots, size) for x in (k, v))
    ours = jax.jit(cached_attention)(q, k_cached, v_cached, mask, siblings, bias, jnp.int32(filled))
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=1e-5)


def test_what_nobody_sees_of_the_cache_is_not_read():
    """Pieces of it that hold NaN: one that the mask hides from all, and those behind what is filled."""
    rng = np.random.default_rng(0)
    slots = 4 * PIECE
    q, k = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 128, 4, 8), (2, slots, 8)))
    k = k.at[:, PIECE : 2 * PIECE].set(jnp.nan).at[:, 3 * PIECE :].set(jnp.nan)
    mask = jnp.ones((1, 128, slots), bool).at[..., PIECE : 2 * PIECE].set(False)
    ours = jax.jit(cached_attention)(q, k, k, mask, ~mask, None, jnp.int32(3 * PIECE))
    kept = jnp.r_[:PIECE, 2 * PIECE : 3 * PIECE]
    short = k[:, kept].swapaxes(0, 1)[None]
    np.testing.assert_allclose(ours, dense_attention(q, short, short, mask[..., kept]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("visibility", ["columns", "isolated", "prompts"])
def test_incremental_logits_equal_one_forward(visibility):
    program = Program(PAIRED, visibility, Method())
    begin = jax.jit(start, static_argnums=(1, 4))
    any_controls = controls()
    step = jax.jit(feed, static_argnums=1)
    for align in get_args(Align):
        ours = decoder(visibility=visibility, align=align)
        layout = ours.layout(FINISHED)
        full = ours.logits(layout)
        prompt = make_prompt(ASKED, [[9] * 3, [9] * 2], align, visibility)
        state, logits = begin(ours.weights, program, any_controls, prompt, BLOCK)
        compared = 0
        for column in range(12):
            fed, live = np.zeros((2, 3), np.int32), np.zeros((2, 3), bool)
            for r, sample in enumerate(FINISHED):
                for b, branch in enumerate(sample.branches):
                    said = [*branch.prompt, *branch.answer]
                    known = len(branch.prompt) - int(prompt.forced_count[r, b]) + column  # tokens that the cache holds
                    if known > len(said):
                        continue
                    place = np.flatnonzero(layout.branch[r] == b + 1)[known - 1]
                    np.testing.assert_allclose(logits[r, b], full[r, place], atol=3e-5)
                    compared += 1
                    if known < len(said):
                        fed[r, b], live[r, b] = said[known], True
            state = dataclasses.replace(state, token=fed, live=live, count=np.int32(column + 1))
            state, logits = step(ours.weights, program, state)
        # Every answer token, the last prompt token of every branch, and the prompt tokens that were not prefilled.
        assert compared == 14 + 5 + int(prompt.forced_count.sum())


def test_what_a_branch_waits_for_when_siblings_answer_beside_its_prompt():
    prompt = make_prompt(ASKED, [[9] * 3, [9] * 2], "ragged", "columns")
    assert prompt.forced_count.tolist() == [[2, 0, 1], [0, 4, 0]]
    assert make_prompt(ASKED, [[9] * 3, [9] * 2], "ragged", "isolated").forced_count.max() == 0


@pytest.mark.parametrize("align", get_args(Align))
def test_the_first_token_stands_in_the_answer_column(align):
    prompt = make_prompt(ASKED, [[9] * 3, [9] * 2], align, "columns")
    for r, sample in enumerate(ASKED):
        expected = answer_columns(sample, align)
        assert (prompt.first + prompt.forced_count)[r, : len(expected)].tolist() == expected.tolist()


LLAMA3 = Llama3Rope(8.0, 1.0, 4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="qwen3"),
        pytest.param({"family": "qwen2"}, id="qwen2", marks=pytest.mark.slow),
        pytest.param({"family": "qwen2", "tie_word_embeddings": True}, id="qwen2, tied", marks=pytest.mark.slow),
        pytest.param({"family": "llama", "llama3": LLAMA3, "head_dim": 20}, id="llama3", marks=pytest.mark.slow),
        pytest.param({"family": "llama", "tie_word_embeddings": True}, id="llama, tied", marks=pytest.mark.slow),
        pytest.param({"family": "mistral", "rope_theta": 7e4}, id="mistral", marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_transformers_on_every_branch_alone(tmp_path, changes):
    config = dataclasses.replace(PLAIN, **changes)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_params(tmp_path, params(config), config)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    def expected(eos):
        out = []
        for sample in ASKED:
            for branch in sample.branches:
                prompt = torch.tensor([[*sample.background, *branch.prompt]])
                settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": list(eos), "pad_token_id": 0}
                settings["suppress_tokens"] = list(range(KNOWN, PLAIN.vocab_size))
                new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]
                out.append(tuple(i for i in new.tolist() if i not in eos))
        return out

    # 40 tokens: more than one block, and the cache grows.
    free = alone(config=config).generate(ASKED, max_new_tokens=40)
    assert [branch for result in tokens(free) for branch in result] == expected(NEVER)
    assert {b.finish_reason for r in free for b in r.branches} == {"length"}
    eos = (free[0].branches[0].token_ids[3], free[1].branches[1].token_ids[5])
    ended = alone(eos, config).generate(ASKED, max_new_tokens=40)
    assert [branch for result in tokens(ended) for branch in result] == expected(eos)
    assert ended[0].branches[0].finish_reason == "eos"


def test_a_batch_answers_like_each_sample_alone():
    together = decoder().generate(ASKED, max_new_tokens=8)
    assert tokens(decoder().generate(ASKED[::-1], max_new_tokens=8)) == tokens(together)[::-1]
    # Two branches beside a sample of three are padded to three; alone they are not.
    assert tokens(decoder().generate([ASKED[1]], max_new_tokens=8)) == tokens(together)[1:]
    assert [result.prefill_tokens for result in together] == [15, 6]


def test_permuting_branches_permutes_the_answers():
    sample, order = ASKED[0], [2, 0, 1]
    permuted = TokenSample(sample.background, [sample.branches[b] for b in order])
    first, second = tokens(decoder(PLAIN).generate([sample, permuted], max_new_tokens=12))
    assert second == [first[b] for b in order]
    assert len({*first}) == 3


def test_siblings_are_seen_unless_isolated():
    sample = ASKED[0]
    other = TokenSample(sample.background, [sample.branches[0], Branch(ids(20, 2)), Branch(ids(21, 3))])
    seen = tokens(decoder(PLAIN).generate([sample, other], max_new_tokens=12))
    assert seen[0][0] != seen[1][0]
    unseen = tokens(alone().generate([sample, other], max_new_tokens=12))
    assert unseen[0][0] == unseen[1][0]


def test_a_bias_of_minus_infinity_is_isolated():
    config = tiny.config(tie_word_embeddings=False, sibling_bias=True)
    weights = params(config)
    layers = {**weights["layers"], "sibling_bias": jnp.full_like(weights["layers"]["sibling_bias"], -jnp.inf)}
    said = [
        tokens(
            ParallelDecoder(config, {**weights, "layers": layers}, tiny.tokenizer(), NEVER, visibility=v).generate(
                ASKED
            )
        )
        for v in ("columns", "isolated")
    ]
    assert said[0] == said[1]
    assert all(len(branch) == 32 for result in said[0] for branch in result)


@pytest.mark.parametrize("align", ["left", pytest.param("ragged", marks=pytest.mark.slow)])
def test_one_call_mixes_visibilities(align):
    """Samples with a visibility of their own answer as from a decoder of that visibility, and give its logits."""
    mixing = decoder(align=align)
    asked = [dataclasses.replace(sample, visibility=name) for name in VISIBILITIES for sample in ASKED]
    asked.append(ASKED[0])  # none of its own: the decoder's
    answers = tokens(mixing.generate(asked, max_new_tokens=6))
    expected = [tokens(mixing.variant(visibility=name).generate(ASKED, max_new_tokens=6)) for name in VISIBILITIES]
    assert answers == [*(answer for two in expected for answer in two), expected[0][0]]
    assert expected[0] != expected[1]
    layout = mixing.layout(asked)
    for row, (name, sample) in enumerate((name, sample) for name in VISIBILITIES for sample in ASKED):
        alone = mixing.variant(visibility=name)
        size = len(sample)
        np.testing.assert_allclose(
            mixing.logits(layout)[row, :size], alone.logits(alone.layout([sample]))[0], atol=2e-5
        )


def test_a_variant_shares_the_weights():
    first = decoder()
    other = first.variant(visibility="isolated", align="ragged", eos_ids=(3,))
    assert (other.visibility, other.align, other.eos_ids) == ("isolated", "ragged", (3,))
    assert (first.visibility, first.align, first.eos_ids) == ("columns", "left", NEVER)
    assert all(a is b for a, b in zip(*(jax.tree.leaves(d.weights) for d in (first, other)), strict=True))
    with pytest.raises(ValueError, match="visibility 'all' is not one of"):
        first.variant(visibility="all")


def test_columns_are_what_generate_says():
    """One object a step, none of them changed later; joined they are the answers."""
    steps = list(decoder().columns(ASKED, max_new_tokens=9, every=4))
    assert [step.first for step in steps] == [0, 1, 5]
    assert [step.tokens.shape for step in steps] == [(1, 2, 3), (4, 2, 3), (4, 2, 3)]
    joined = np.concatenate([step.tokens for step in steps])
    for s, result in enumerate(decoder().generate(ASKED, max_new_tokens=9)):
        for b, branch in enumerate(result.branches):
            assert tuple(joined[:, s, b]) == branch.token_ids
    assert (joined[:, 1, 2:] == -1).all()  # no such branch


@pytest.mark.parametrize("every", [0, BLOCK + 1])
def test_columns_come_in_blocks_of_a_size_that_exists(every):
    with pytest.raises(ValueError, match=f"every is {every}; it must be 1 to {BLOCK} columns"):
        next(decoder().columns(ASKED, every=every))


# --- ends
def test_decoding_stops_when_all_branches_have_ended(monkeypatch):
    free = tokens(alone().generate(ASKED, max_new_tokens=12))
    eos = tuple({branch[2] for result in free for branch in result})
    counts = []

    def spy(*args, **kwargs):
        state, out = decode_block(*args, **kwargs)
        counts.append(int(state.count))
        return state, out

    monkeypatch.setattr(pd_jax.decoding.decoder, "decode_block", spy)
    results = alone(eos).generate(ASKED, max_new_tokens=12)
    assert counts == [max(result.columns for result in results)]
    assert counts[0] <= 3
    for result, before in zip(results, free, strict=True):
        for branch, whole in zip(result.branches, before, strict=True):
            assert branch.finish_reason == "eos"
            assert branch.token_ids == whole[: len(branch.token_ids)]
            assert whole[len(branch.token_ids)] in eos


def test_every_branch_has_its_own_limit():
    limits = [[1, 7, 3], [4, 2]]
    results = alone().generate(ASKED, max_new_tokens=limits)
    assert [[len(branch) for branch in result] for result in tokens(results)] == limits
    assert [result.columns for result in results] == [7, 4]
    free = tokens(alone().generate(ASKED, max_new_tokens=7))
    assert tokens(results) == [
        [b[:n] for b, n in zip(r, row, strict=True)] for r, row in zip(free, limits, strict=True)
    ]


def test_what_a_branch_said_last_is_seen_by_its_siblings():
    """A limit ends a branch, it takes nothing back: the longest answer is that of one forward over all tokens."""
    sample = ASKED[0]
    result = decoder().generate([sample, sample], max_new_tokens=[[2, 6, 1]] * 2)[0]
    branches = [Branch(b.prompt, r.token_ids) for b, r in zip(sample.branches, result.branches, strict=True)]
    layout = decoder().layout([TokenSample(sample.background, branches)] * 2)
    best = decoder().logits(layout)[0, :, :KNOWN].argmax(-1)
    places = np.flatnonzero(layout.branch[0] == 2)
    assert best[places[1:-1]].tolist() == list(result.branches[1].token_ids)


def test_a_stop_string_ends_a_branch():
    free = alone().generate(ASKED, max_new_tokens=12)
    letters = [c for c in free[0].branches[0].text if c.isascii() and c.isprintable()]
    stop = letters[len(letters) // 2]
    results = alone().generate(ASKED, max_new_tokens=12, stop=[stop])
    for branch, whole in zip(
        [b for r in results for b in r.branches], [b for r in free for b in r.branches], strict=True
    ):
        assert branch.token_ids == whole.token_ids[: len(branch.token_ids)]
        assert branch.finish_reason == ("stop" if stop in whole.text else "length")
        assert branch.text == whole.text.split(stop)[0]
    assert results[0].branches[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", [(), ("京。x", "是北"), ("好",)])
def test_streamed_text_is_the_text(stop):
    tokenizer = tiny.tokenizer()
    said = tokenizer("答案是北京。The tower é 🙂", add_special_tokens=False)["input_ids"]
    transcript = Transcript(tokenizer.decode, (0,), len(said), stop)
    pieces = []
    for column, token in enumerate(said):
        if transcript.finish_reason is None:
            transcript.push(token, column)
            pieces.append(transcript.news())
    assert "".join(pieces) == transcript.result().text == ("答案" if "是北" in stop else "答案是北京。The tower é 🙂")
    assert "\ufffd" not in "".join(pieces)
    assert transcript.result().finish_reason == ("stop" if "是北" in stop else "length")


def test_stream_says_what_generate_says():
    sample = Sample("The river is long. ", ["What is long?", "Who?"])
    options = {"max_new_tokens": [[5, 3]]}
    events = list(decoder().stream(sample, **options))
    result = decoder().generate([sample], **options)[0]
    assert [event.column for event in events] == list(range(result.columns)) == list(range(5))
    for b, branch in enumerate(result.branches):
        assert "".join(event.texts[b] for event in events) == branch.text
        assert tuple(t for event in events if (t := event.tokens[b]) is not None) == branch.token_ids
        assert events[-1].finish_reasons[b] == branch.finish_reason
    assert events[-1].tokens[1] is None


# --- sampling
def controls(allowed=None, eos=NEVER, **options):
    return SamplingParams(**options).controls(eos, np.ones(8, bool) if allowed is None else allowed, 1, 1)


def test_cut_keeps_what_has_less_than_the_limit_above_it():
    scores = jnp.array([[1.0, -2.0, 3.0, -0.0, 0.0, -jnp.inf]])
    one = jnp.ones_like(scores)
    kept = [jnp.isfinite(cut(scores, one, jnp.float32(k)))[0].astype(int).tolist() for k in (1, 2, 3, 4, 5)]
    assert kept[0] == [0, 0, 1, 0, 0, 0]
    assert kept[1] == [1, 0, 1, 0, 0, 0]
    assert kept[2] == kept[3] == [1, 0, 1, 1, 1, 0]  # a tie stays together
    assert kept[4] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.4},
        {"temperature": 0.5, "top_k": 100, "top_p": 0.95, "repetition_penalty": 0.7},
    ],
)
def test_the_distribution_is_that_of_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 50)).astype(np.float32) * 3
    history = rng.integers(0, 50, (5, 6))
    asked = SamplingParams(do_sample=True, **options)
    seen = np.zeros((5, 50), bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = distribution(asked.method(), asked.controls((), np.ones(50, bool), 1, 1), scores, seen)
    makers = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    expected = torch.tensor(scores)
    for name, make in makers.items():
        if name in options:
            expected = make(options[name])(torch.tensor(history), expected)
    np.testing.assert_allclose(jax.nn.softmax(ours), torch.softmax(expected, -1).numpy(), atol=1e-6)
    assert ((np.asarray(ours) == -np.inf) == np.isinf(expected.numpy())).all()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores, count = jnp.array([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -3.0, 5.0]), 40_000
    asked = SamplingParams(do_sample=True, temperature=1.5)
    allowed = np.arange(8) != 7
    ready = distribution(asked.method(), controls(allowed, do_sample=True, temperature=1.5), scores)
    keys = jax.random.split(jax.random.key(0), count)[None]
    drawn = draw(jnp.broadcast_to(ready, (1, count, 8)), keys, jnp.zeros((1, count), jnp.int32))
    wanted = np.asarray(jax.nn.softmax(jnp.where(allowed, scores / 1.5, -jnp.inf)))
    found = np.bincount(drawn[0], minlength=8) / count
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all()


def test_narrow_sampling_is_greedy_and_wide_sampling_is_not():
    greedy = tokens(alone().generate(ASKED, max_new_tokens=6))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens(alone().generate(ASKED, max_new_tokens=6, do_sample=True, **narrow)) == greedy
    wide = tokens(alone().generate(ASKED, max_new_tokens=6, do_sample=True))
    assert wide != greedy


def test_ids_without_a_token_are_never_chosen():
    weights = dict(alone().weights)
    weights["lm_head"] = weights["lm_head"].at[KNOWN:].multiply(50)
    loud = ParallelDecoder(PLAIN, weights, tiny.tokenizer(), NEVER, visibility="isolated", align="ragged")
    assert loud.logits(loud.layout(ASKED)).argmax(-1).max() >= KNOWN
    for options in ({}, {"do_sample": True, "temperature": 5.0}):
        assert max(i for r in tokens(loud.generate(ASKED, max_new_tokens=12, **options)) for b in r for i in b) < KNOWN


def test_random_numbers_depend_on_the_branch_alone():
    def say(samples, seed=3):
        return tokens(alone().generate(samples, max_new_tokens=8, do_sample=True, seed=seed))

    first, second = ASKED
    both = say([first, second])
    assert say([second, first]) == both[::-1]
    assert say([first, first]) == [both[0]] * 2
    siblings = TokenSample(first.background, [first.branches[0], Branch(ids(30, 7)), first.branches[2]])
    changed = say([siblings, second])[0]
    assert changed[0] == both[0][0]
    assert changed[2] == both[0][2]
    assert changed[1] != both[0][1]
    other = say([first, second], seed=4)
    assert other != both
    assert say([first, first, second], seed=[3, 4, 4]) == [both[0], *other]  # a seed for every sample
    same = TokenSample(first.background, [first.branches[0]] * 3)
    assert len({*say([same, second])[0]}) == 3


def test_the_repetition_penalty_sees_a_branch_alone():
    background, prompt = ids(40, 6), ids(41, 3)
    sample = TokenSample(background, [Branch(prompt), Branch(prompt), Branch(ids(42, 4))])
    ours = alone()
    asked = SamplingParams(repetition_penalty=50.0)
    program = Program(PLAIN, "isolated", asked.method())
    rows = make_prompt([sample, sample], [[9] * 3] * 2, "ragged", "isolated")
    state, token = prefill(ours.weights, asked.controls(NEVER, ours._allowed, 2, 2), rows, program=program, room=BLOCK)
    for b, branch in enumerate(sample.branches):
        assert set(np.flatnonzero(state.seen[0, b])) == {*branch.prompt, int(token[0, b])}
    answers = tokens(ours.generate([sample, sample], max_new_tokens=10, repetition_penalty=50.0))[0]
    assert answers[0] == answers[1]  # what the sibling says is no repetition
    for branch, said in zip(sample.branches, answers, strict=True):
        assert len({*said}) == len(said)
        assert not {*said} & {*branch.prompt}


# --- programs and memory
def test_other_text_in_the_same_buckets_compiles_nothing(caplog):
    def compiled(samples, **options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            ours = ParallelDecoder(PLAIN, weights, tiny.tokenizer(), (7, 8), visibility="isolated", align="ragged")
            ours.generate(samples, **options)
        return [record.getMessage() for record in caplog.records if "Finished XLA" in record.getMessage()]

    weights = alone().weights
    sample = TokenSample(ids(50, 40), [Branch(ids(51, 3))])  # a bucket that no other test has
    first = compiled([sample], max_new_tokens=5, do_sample=True, top_k=3)
    assert [name for name in ("prefill", "decode_block") if any(f"jit({name})" in line for line in first)] == [
        "prefill",
        "decode_block",
    ]
    other = TokenSample(ids(52, 33), [Branch(ids(53, 9))])
    assert compiled([other], max_new_tokens=32, do_sample=True, top_p=0.4, temperature=2.0, seed=9) == []
    assert compiled([other], max_new_tokens=9, do_sample=True, top_k=1, min_p=0.1, stop=["a"]) == []


def test_the_cache_is_predicted_and_stays_in_place():
    ours = alone()
    program, asked = Program(PLAIN, "isolated", Method()), SamplingParams()
    rows = make_prompt(ASKED, [[9] * 3, [9] * 2], "ragged", "isolated")
    arguments = ours.weights, asked.controls(NEVER, ours._allowed, 2, 2)
    state, _ = prefill(*arguments, rows, program=program, room=BLOCK)
    predicted = cache_bytes(PLAIN, samples=2, tokens=32, branches=3, columns=BLOCK, dtype="float32")
    assert predicted == sum(array.nbytes for pair in state.cache.layers for array in pair)
    ended = np.zeros((2, 3), bool)
    memory = decode_block.lower(*arguments, state, ended, np.int32(9), program=program).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= predicted
    # A weight or a cache that is copied inside the loop would be here.
    assert memory.temp_size_in_bytes < 0.3 * predicted
    old = state.cache.layers[0][0]
    decode_block(*arguments, state, ended, np.int32(9), program=program)
    assert old.is_deleted()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1280, 8704])
def test_a_call_needs_its_weights_its_cache_and_a_tenth(tokens):
    """Qwen3-0.6B, 16 branches: what XLA reserves for the prefill and for a block of columns."""
    config, room = known_config("Qwen/Qwen3-0.6B"), BLOCK
    program = Program(config, "columns", Method())
    first, then = decoder_arguments(config, "float32", tokens=tokens, branches=16, room=room)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(first[0]))
    cache = cache_bytes(config, samples=1, tokens=tokens, branches=16, columns=room, dtype="float32")
    limit = 1.1 * (weights + cache)
    for lowered in (prefill.lower(*first, program=program, room=room), decode_block.lower(*then, program=program)):
        memory = lowered.compile().memory_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert weights < needed - memory.alias_size_in_bytes < limit


def test_bfloat16():
    half = decoder(PLAIN, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.weights)} == {"bfloat16"}
    close = half.logits(half.layout(ASKED)) - decoder(PLAIN).logits(half.layout(ASKED))
    valid = half.layout(ASKED).valid
    assert 0 < np.abs(close[valid]).max() < 0.2
    assert len(half.generate(ASKED, max_new_tokens=4)[0].branches[0].token_ids) == 4


# --- several devices
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_model_over_eight_devices_says_the_same(tmp_path, monkeypatch, family):
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "pair_indices": (2, 4)}
    shape["family"] = family
    config, source = tiny.config(**shape), tiny.model_directory(tmp_path / "source", **shape)
    save_model(tmp_path / "model", params(config), config, source)
    mesh = make_mesh(1, 1, 8)
    ours = ParallelDecoder.from_pretrained(tmp_path / "model", mesh=mesh, local_files_only=True)
    for weights in (ours.weights, decoder(config, mesh=mesh).weights):
        layer = weights["layers"][0]
        split = {name for name, w in layer.items() if {s.data.size for s in w.addressable_shards} == {w.size // 8}}
        assert split == set(PROJECTIONS) | (layer.keys() & {"q_bias", "k_bias", "v_bias"})
        assert {s.data.shape for s in weights["embed"].addressable_shards} == {(336 // 8, 48)}
    expected = decoder(config, ours.eos_ids).generate(ASKED, max_new_tokens=40)
    heads = set()

    def spy(*args, **kwargs):
        state, out = decode_block(*args, **kwargs)
        heads.update(
            s.data.shape[0] // 2 for pair in state.cache.layers for array in pair for s in array.addressable_shards
        )
        return state, out

    monkeypatch.setattr(pd_jax.decoding.decoder, "decode_block", spy)
    assert ours.generate(ASKED, max_new_tokens=40) == expected
    assert heads == {1}  # of 8, also after the cache has grown


@pytest.mark.parametrize(
    ("sizes", "message"), [((1, 2, 4), "decoding splits heads only"), ((1, 1, 8), "num_attention_heads 4 by tensor 8")]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        decoder(PLAIN, mesh=make_mesh(*sizes))


# --- directories
def test_from_pretrained_and_an_adapter(tmp_path):
    source = tiny.model_directory(tmp_path / "source", pair_indices=(2, 4, 6))
    config = tiny.config()
    weights = init_params(config, jax.random.key(5))
    save_model(tmp_path / "model", weights, config, source)
    settings = LoraConfig(r=2)
    adapters = lora.init_adapters(config, settings, jax.random.key(6))
    adapters = jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape) * 0.1, adapters)
    save_adapter(tmp_path / "adapter", adapters, settings, config, base="model")
    samples = [Sample("The tower", [" is red", " is long and red"]), Sample("", ["What?"])]
    for adapter, expected in ((None, weights), (tmp_path / "adapter", lora.merge(weights, adapters, settings))):
        loaded = ParallelDecoder.from_pretrained(tmp_path / "model", adapter, local_files_only=True)
        ours = ParallelDecoder(config, expected, tiny.tokenizer(), loaded.eos_ids)
        layout = loaded.layout(samples)
        assert loaded.config == config
        np.testing.assert_allclose(loaded.logits(layout), ours.logits(layout), atol=1e-6)
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[2, 4, 6\]"):
        ParallelDecoder.from_pretrained(tmp_path / "model", pair_indices=(1, 2))


def test_logits_need_no_prompt_array_unless_it_is_looked_at():
    layout = decoder(PLAIN).layout(ASKED)
    arrays = {name: layout[name] for name in ("tokens", "branch", "column", "segment", "valid")}
    np.testing.assert_array_equal(decoder(PLAIN).logits(arrays), decoder(PLAIN).logits(layout))
    with pytest.raises(ValueError, match="'prompt'"):
        decoder(visibility="prompts").logits(arrays)


# --- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [0, 1, 2]}, "seed is for 3 samples, not 2"),
        ({"stop": "a"}, "stop is 'a'"),
        ({"stop": [""]}, r"stop is \[''\]"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": [[1, 2]]}, r"\[2\] branches, the samples have \[3, 2\]"),
        ({"max_new_tokens": 40_000}, "max_position_embeddings 32768"),
        ({"params": SamplingParams(), "seed": 1}, "params and seed"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(options, message, monkeypatch):
    monkeypatch.setattr(pd_jax.decoding.decoder, "prefill", None)
    with pytest.raises(ValueError, match=message):
        decoder().generate(ASKED, **options)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples is empty"),
        (ASKED[0], "pass a list"),
        ([TokenSample((1,), [])], "sample 0: no branches"),
        ([ASKED[0], TokenSample((1,), [Branch((2,)), Branch(())])], r"sample 1: prompts \[1\] have no tokens"),
        (FINISHED, "answer already"),
        ([dataclasses.replace(ASKED[0], later=[Branch((1,))])], "or there are later turns"),
        ([TokenSample((1,), (), later=[[Branch(())]])], r"sample 0, turn 1: prompts \[0\] have no tokens"),
    ],
)
def test_bad_samples_are_refused(samples, message, monkeypatch):
    monkeypatch.setattr(pd_jax.decoding.decoder, "prefill", None)
    with pytest.raises(ValueError, match=message):
        decoder().generate(samples)


@pytest.mark.parametrize("setting", [{"dtype": "float16"}, {"visibility": "all"}, {"align": "middle"}])
def test_unknown_settings_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} '{value}' is not one of"):
        decoder(PLAIN, **setting)


def test_a_cache_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(pd_jax.decoding.decoder, "_free_bytes", lambda device: 1000.0)
    with pytest.raises(ValueError, match=r"the cache takes .* GiB, the device has .* GiB left"):
        decoder().generate(ASKED)


def test_options_are_the_fields_of_the_parameters():
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_controls_are_only_arrays():
    """Another value of a sampling argument must not be another program."""
    leaves = jax.tree.leaves(controls(do_sample=True, top_k=3))
    assert len(leaves) == len(Controls._fields)
    assert all(hasattr(leaf, "dtype") for leaf in leaves)
