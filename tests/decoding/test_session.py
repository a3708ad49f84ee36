"""Sessions: one forward over the finished layout says what is right, and transformers with our positions and mask."""

import contextlib
import dataclasses
import itertools
import json
import logging
from functools import cache
from typing import get_args

import jax
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings, strategies as st
from sources import random_params

import pd_jax.decoding.steps
from pd_jax import Branch, ParallelDecoder, Sample, TokenSample
from pd_jax.columns import Coordinates, column_mask
from pd_jax.config import Align
from pd_jax.decoding.steps import PIECE
from pd_jax.files import config_to_hf, write_params
from pd_jax.mesh import make_mesh

PAIRED = tiny.config(tie_word_embeddings=False, sibling_bias=True)
PLAIN = tiny.config(tie_word_embeddings=False, pair_indices=())
KNOWN = len(tiny.tokenizer())
OFTEN = tuple(range(0, KNOWN, 7))  # a branch ends at one token of seven
ALIGNMENTS = get_args(Align)
NEVER = tuple(KNOWN for _ in OFTEN)  # an id that the tokenizer does not have: a branch goes on to its limit


@cache
def params(config):
    tree = random_params(config, jax.random.key(1))
    if config.sibling_bias:
        tree["layers"]["sibling_bias"] = jax.random.normal(jax.random.key(2), tree["layers"]["sibling_bias"].shape)
    return tree


@cache
def decoder(config=PAIRED, eos=NEVER, **settings):
    return ParallelDecoder(config, params(config), tiny.tokenizer(), eos, **settings)


def ids(seed, length):
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, KNOWN, length))


def said(answer):
    """The token ids of a fork or of a join."""
    return [b.token_ids for b in answer.branches] if hasattr(answer, "branches") else answer.token_ids


# --- the invariant
LOUD = dataclasses.replace(PAIRED, max_position_embeddings=4096)  # its programs are traced while `heard` listens


@contextlib.contextmanager
def heard():
    """Of every choice that a session makes: branch, column of the token that is chosen, logits."""
    found, choose = [], pd_jax.decoding.steps.choose

    def spy(program, controls, state, scores):
        def record(branch, column, done, scores):
            found.extend((int(b), int(c), s) for b, c, d, s in zip(branch, column, done, scores, strict=True) if not d)

        at = state.first[0] + state.count
        jax.debug.callback(record, state.branch[0], at, state.done[0], scores[0])
        return choose(program, controls, state, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd_jax.decoding.steps, "choose", spy)
        yield found
        jax.effects_barrier()


def assert_equal_to_one_forward(session, ours, found):
    """The logits of every choice are those of the finished layout at the token before it in its branch."""
    layout = ours.layout([session.sample])
    full, branch, column = ours.logits(layout)[0], layout.branch[0], layout.column[0]
    for number, at, logits in found:
        before = np.flatnonzero((branch == number) & (column < at))[-1]
        np.testing.assert_allclose(logits, full[before], atol=1e-4 * full.std(), rtol=0)


def play(session, turns, **options):
    """Forks (lists of prompts) and joins (prompts); every answer."""
    answers = []
    for turn, limit in turns:
        ask = session.join if isinstance(turn, tuple) else session.fork
        answers.append(ask(turn, max_new_tokens=limit, **options))
    return answers


STORY = [
    ([ids(1, 4), ids(2, 2), ids(3, 3)], [[6, 2, 5]]),
    (ids(4, 3), 5),
    ([ids(5, 2), ids(6, 5)], 4),
    (ids(7, 2), 6),
    ([ids(8, 1)], 3),
]


@pytest.mark.parametrize(
    ("visibility", "room"),
    [
        ("columns", 1024),
        *(pytest.param(v, 1024, marks=pytest.mark.slow) for v in ("isolated", "prompts")),
        pytest.param("columns", 20, marks=pytest.mark.slow),
    ],
)
def test_the_logits_are_those_of_one_forward(visibility, room):
    with heard() as found:
        for align in ALIGNMENTS:
            for eos in (NEVER, OFTEN):
                ours = decoder(LOUD, eos, visibility=visibility, align=align)
                session = ours.session(ids(0, 6), room=room)
                answers = [said(answer) for answer in play(session, STORY)]
                jax.effects_barrier()
                lengths = [len(t) for answer in answers for t in ([answer] if isinstance(answer, tuple) else answer)]
                assert lengths == [6, 2, 5, 5, 4, 4, 6, 3] if eos == NEVER else sum(lengths) < 35
                assert len(found) >= sum(lengths)  # and where an end was chosen
                assert_equal_to_one_forward(session, ours, found)
                assert (session._cache.size > 32 + room) == (room == 20)
                found.clear()


ASKED = st.lists(st.integers(1, 6), min_size=1, max_size=3)  # tokens of prompts
TURNS = st.lists(st.tuples(ASKED | st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


@given(st.integers(0, 9), ASKED, TURNS, st.sampled_from(ALIGNMENTS), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_session_is_one_forward(background, first, turns, align, ends):
    with heard() as found:
        ours = decoder(LOUD, OFTEN if ends else NEVER, align=align)
        session = ours.session(ids(0, background))
        story = [
            (first + [1] * (3 - len(first)), 3),
            *turns,
        ]  # three branches at first: the programs of all are the same
        play(
            session,
            [
                (ids(i, turn) if isinstance(turn, int) else [ids((i, b), n) for b, n in enumerate(turn)], limit)
                for i, (turn, limit) in enumerate(story)
            ],
        )
        jax.effects_barrier()
        assert_equal_to_one_forward(session, ours, found)


# --- transformers
@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("model")
    write_params(directory, params(PLAIN), PLAIN)
    (directory / "config.json").write_text(json.dumps(config_to_hf(PLAIN)))
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_one_branch_is_transformers_generate(theirs):
    torch = pytest.importorskip("torch")
    prompt = torch.tensor([[*ids(0, 6), *ids(1, 4)]])
    rest = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rest["suppress_tokens"] = list(range(KNOWN, PLAIN.vocab_size))
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, **rest)[0, 10:]
    for align in ALIGNMENTS:
        session = decoder(PLAIN, visibility="isolated", align=align).session(ids(0, 6))
        assert said(session.fork([ids(1, 4)], max_new_tokens=40)) == [tuple(expected.tolist())]


def test_fork_join_fork_is_transformers_with_our_positions_and_mask(theirs):
    torch = pytest.importorskip("torch")
    ours = decoder(PLAIN, visibility="isolated")
    session = ours.session(ids(0, 6))
    play(session, STORY[:3])
    layout = ours.layout([session.sample])
    at = Coordinates.of(layout)
    allowed = torch.tensor(np.asarray(column_mask(at, at, "isolated")))
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        scores = theirs(
            torch.tensor(layout.tokens).long(), attention_mask=mask, position_ids=torch.tensor(layout.column).long()
        ).logits[0, :, :KNOWN]
    best, compared = scores.argmax(-1).numpy(), 0
    for number in range(6):
        places = np.flatnonzero(layout.branch[0] == number)
        for before, place in itertools.pairwise(places):
            if layout.column[0, place] >= 6 and not layout.prompt[0, place]:
                assert layout.tokens[0, place] == best[before]
                compared += 1
    assert compared == 6 + 2 + 5 + 5 + 4 + 4


# --- what a session is
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"do_sample": True, "seed": 3, "repetition_penalty": 3.0}, marks=pytest.mark.slow),
        pytest.param({"align": "ragged"}, marks=pytest.mark.slow),
        pytest.param({"align": "ragged", "repetition_penalty": 3.0}, marks=pytest.mark.slow),
    ],
)
def test_a_fork_is_what_generate_says(options):
    ours = decoder(PAIRED, OFTEN, align=options.pop("align", "left"))
    sample = TokenSample(ids(0, 6), [Branch(prompt) for prompt in STORY[0][0]])
    (expected,) = ours.generate([sample], max_new_tokens=9, **options)
    found = ours.session(ids(0, 6)).fork(STORY[0][0], max_new_tokens=9, **options)
    assert found.branches == expected.branches
    assert found.columns == expected.columns


def test_text_is_what_a_sample_says():
    ours = decoder()
    prompts = [" is red", " is long", " is"]
    (expected,) = ours.generate([Sample("The tower", prompts)], max_new_tokens=5)
    session = ours.session("The tower")
    assert session.fork(prompts, max_new_tokens=5).branches == expected.branches
    tokenizer = tiny.tokenizer()
    join = session.join(" and <|im_end|>", max_new_tokens=3)
    assert tokenizer.decode(session.sample.later[0].prompt) == " and <|im_end|>"
    assert tokenizer.eos_token_id not in session.sample.later[0].prompt
    assert tokenizer.decode(join.token_ids) == join.text


@pytest.mark.parametrize(
    "visibility", ["isolated", *(pytest.param(v, marks=pytest.mark.slow) for v in ("columns", "prompts"))]
)
def test_the_trunk_sees_what_the_branches_say_and_later_branches_see_the_trunk(visibility):
    answers = []
    for seed in (1, 2):
        session = decoder(visibility=visibility).session(ids(0, 6))
        session.fork([ids((seed, b), 4) for b in range(3)], max_new_tokens=0)
        fork = said(session.fork([ids(9, 3)], max_new_tokens=12))
        join = said(session.join(ids(4, 3), max_new_tokens=12))
        answers.append((fork, join, said(session.fork([ids(9, 3)], max_new_tokens=12))))
    (forked, joined, later), (other_forked, other_joined, other_later) = answers
    assert (forked == other_forked) == (visibility == "isolated")
    assert joined != other_joined
    assert later != other_later


def test_a_bias_of_minus_infinity_hides_siblings_and_nothing_from_the_trunk():
    weights = params(PAIRED)
    layers = {**weights["layers"], "sibling_bias": np.full_like(weights["layers"]["sibling_bias"], -np.inf)}
    columns, isolated = (
        ParallelDecoder(PAIRED, {**weights, "layers": layers}, tiny.tokenizer(), NEVER, visibility=visibility)
        for visibility in ("columns", "isolated")
    )
    answers = [said(answer) for answer in play(columns.session(ids(0, 6)), STORY)]
    assert [said(answer) for answer in play(isolated.session(ids(0, 6)), STORY)] == answers
    other = play(columns.session(ids(0, 6)), [([ids(1, 4), ids(99, 2), ids(3, 3)], [[6, 2, 5]]), STORY[1]])
    assert said(other[0])[0] == answers[0][0]
    assert said(other[1]) != answers[1]


def test_branch_numbers_are_never_used_twice():
    session = decoder().session(ids(0, 6))
    play(session, STORY)
    layout = decoder().layout([session.sample])
    columns = [(layout.column[0][layout.branch[0] == b].min(), (layout.branch[0] == b).sum()) for b in range(1, 7)]
    assert [n for _, n in columns] == [10, 4, 8, 6, 9, 4]
    assert [c for c, _ in columns] == [6, 6, 6, 24, 24, 41]
    assert layout.branch.max() == 6


def test_streams_say_what_calls_say():
    called = decoder(PAIRED, OFTEN).session(ids(0, 6))
    expected = [said(answer) for answer in play(called, STORY)]
    streamed = decoder(PAIRED, OFTEN).session(ids(0, 6))
    for (turn, limit), answer in zip(STORY, expected, strict=True):
        joins = isinstance(turn, tuple)
        events = list((streamed.stream_join if joins else streamed.stream_fork)(turn, max_new_tokens=limit))
        found = [tuple(t for t in tokens if t is not None) for tokens in zip(*(e.tokens for e in events), strict=True)]
        assert found == ([answer] if joins else answer)
    assert streamed.sample == called.sample


def test_a_stream_that_is_overtaken_ends_there():
    ours = decoder()
    left, whole = ours.session(ids(0, 6)), ours.session(ids(0, 6))
    stream = left.stream_fork(STORY[0][0], max_new_tokens=6)
    for _ in range(3):
        next(stream)
    join = left.join(ids(4, 3), max_new_tokens=5)
    assert [len(b.answer) for b in left.sample.branches] == [3, 3, 3]
    assert next(stream, None) is None
    whole.fork(STORY[0][0], max_new_tokens=3)
    assert whole.join(ids(4, 3), max_new_tokens=5) == join


def test_reset_keeps_the_background_alone():
    session = decoder().session(ids(0, 6))
    session.fork(STORY[0][0], max_new_tokens=60)
    session.reset(to="background")
    assert session.sample == TokenSample(ids(0, 6), (), "columns")
    # A join takes a slot a column, the fork took three: in most of the fork's slots nothing else is written.
    story = [(ids(4, 3), 60), *STORY]
    assert play(session, story) == play(decoder().session(ids(0, 6)), story)
    with pytest.raises(ValueError, match="to 'fork' is not one of background"):
        session.reset(to="fork")


def test_sessions_share_a_decoder():
    ours = decoder()
    alone = [play(ours.session(ids(seed, 6)), STORY) for seed in (0, 50)]
    both = [ours.session(ids(seed, 6)) for seed in (0, 50)]
    for turn, *expected in zip(STORY, *alone, strict=True):
        assert [play(session, [turn]) for session in both] == [[answer] for answer in expected]


def test_branches_may_say_nothing():
    session = decoder().session(())
    result = session.fork([ids(1, 9), ids(2, 5), ids(4, 1)], max_new_tokens=0)
    assert [(b.token_ids, b.finish_reason, b.text) for b in result.branches] == [((), "length", "")] * 3
    assert result.columns == 0
    assert session.join(ids(3, 2), max_new_tokens=3).finish_reason == "length"


@pytest.mark.slow
def test_a_session_over_eight_devices_says_the_same():
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "pair_indices": (2, 4)}
    config = tiny.config(**shape)
    expected = play(decoder(config).session(ids(0, 6), room=20), STORY)
    session = decoder(config, mesh=make_mesh(1, 1, 8)).session(ids(0, 6), room=20)
    assert play(session, STORY) == expected
    assert {s.data.shape[0] for s in session._cache.layers[0][0].addressable_shards} == {1}  # a head each, of 8


# --- what it costs
def test_what_was_said_is_read_once(monkeypatch):
    """A prompt is one block behind the cache: its tokens, and those that the turn before said last."""
    blocks = []

    def spy(weights, controls, prompt, cache, *, program):
        blocks.append(int(prompt.coordinates.valid.sum()))
        return pd_jax.decoding.steps.extend(weights, controls, prompt, cache, program=program)

    monkeypatch.setattr(pd_jax.decoding.session, "extend", spy)
    session = decoder().session(ids(0, 30))
    answers = play(session, STORY)
    assert blocks == [9, 1 + 3, 1 + 7, 2 + 2, 1 + 1]
    assert answers[2].prefill_tokens == 8


@pytest.mark.slow
def test_a_long_prompt_is_read_in_pieces():
    prompts = [ids(1, 130), ids(2, 120), ids(3, 50)]
    session = decoder().session(ids(0, 6))
    found = session.fork(prompts, max_new_tokens=5)
    assert max(session._sizes["tokens"]) == 2 * PIECE
    (expected,) = decoder().generate([TokenSample(ids(0, 6), [Branch(prompt) for prompt in prompts])], max_new_tokens=5)
    assert said(found) == said(expected)


def test_twenty_calls_compile_six_programs(caplog):
    own = dataclasses.replace(PAIRED, max_position_embeddings=9999)  # no other test has its programs
    ours = ParallelDecoder(own, params(PAIRED), tiny.tokenizer(), OFTEN)
    rng = np.random.default_rng(0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        session = ours.session(ids(0, 11), room=400)
        for call in range(20):
            if call % 3 == 2:
                session.join(ids(call, int(rng.integers(1, 9))), max_new_tokens=int(rng.integers(1, 40)))
            else:
                prompts = [ids((call, b), int(rng.integers(1, 12))) for b in range(int(rng.integers(2, 5)))]
                session.fork(prompts, max_new_tokens=int(rng.integers(1, 40)))
    programs = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert session._cache.size == 32 + 4 * 400  # it has grown
    assert 3 <= len(programs) <= 6, programs


def test_the_cache_stays_in_place():
    session = decoder().session(ids(0, 6))
    play(session, STORY[:1])
    old = session._cache.layers[0][0]
    pointer = old.unsafe_buffer_pointer()
    session.join(ids(2, 4), max_new_tokens=9)
    assert old.is_deleted()
    assert session._cache.layers[0][0].unsafe_buffer_pointer() == pointer


# --- bad input
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.fork([ids(1, 2)], max_new_tokens=40_000), "max_position_embeddings 32768"),
        (lambda s: s.join(ids(1, 2), max_new_tokens=40_000), "max_position_embeddings 32768"),
        (lambda s: s.fork("Question"), "pass a list of prompts"),
        (lambda s: s.fork([]), "no branches"),
        (lambda s: s.fork(["Question", " "]), r"prompts \[1\] of 2 are empty"),
        (lambda s: s.fork([ids(1, 2), ()]), r"prompts \[1\] have no tokens"),
        (lambda s: s.fork([[KNOWN + 99]]), "is no token id"),
        (lambda s: s.fork([5]), "not text"),
        (lambda s: s.join(""), "empty"),
        (lambda s: s.join("a", max_new_tokens=-1), "max_new_tokens is -1; it must be 0 or more"),
        (lambda s: s.fork(["a", "b"], max_new_tokens=[[1]]), r"for \[1\] branches, the samples have \[2\]"),
        (lambda s: s.join("a", temperature=0), "temperature is 0"),
        (lambda s: s.join("a", seed=[1, 2]), "seed is for 2 samples"),
        (lambda s: next(s.stream_join("a", max_new_tokens=40_000)), "max_position_embeddings"),
    ],
)
def test_what_cannot_be_is_refused_and_the_session_stays(ask, message, monkeypatch):
    session = decoder().session(ids(0, 6))
    play(session, STORY[:2])
    with monkeypatch.context() as patch:
        patch.setattr(pd_jax.decoding.session, "extend", lambda *_, **__: pytest.fail("it runs"))
        with pytest.raises(ValueError, match=message):
            ask(session)
    again = decoder().session(ids(0, 6))
    play(again, STORY[:2])
    assert play(session, STORY[2:]) == play(again, STORY[2:])


@pytest.mark.parametrize(
    ("background", "options", "message"),
    [
        (5, {}, "background"),
        ([KNOWN + 99], {}, "is no token id"),
        ("a", {"visibility": "all"}, "visibility 'all' is not one of"),
        ("a", {"room": 0}, "room is 0"),
        (ids(0, 33_000), {}, "max_position_embeddings 32768"),
    ],
)
def test_a_session_that_cannot_be_is_refused(background, options, message):
    with pytest.raises(ValueError, match=message):
        decoder().session(background, **options)


def test_a_cache_that_does_not_fit_is_refused(monkeypatch):
    session = decoder().session(ids(0, 6))
    monkeypatch.setattr(pd_jax.decoding.decoder, "_free_bytes", lambda device: 100_000.0)
    play(session, STORY)  # nothing has to grow
    with pytest.raises(ValueError, match=r"the cache takes .* GiB, the device has .* GiB left"):
        session.fork([ids(1, 3)], max_new_tokens=5000)
    assert len(session.join(ids(1, 3), max_new_tokens=5).token_ids) == 5
