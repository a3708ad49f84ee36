"""What the model must not do, whatever its weights: look ahead, look sideways, depend on the order of branches."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from examples import SMALL, WORKED

from pd_jax.columns import Coordinates, column_mask
from pd_jax.config import VISIBILITIES
from pd_jax.layout import Branch, TokenSample, build_layout
from pd_jax.model import forward, logits
from pd_jax.params import init_params, param_shapes, parameter_count

CONFIG = tiny.config()


@cache
def params(**changes):
    return jax.jit(partial(init_params, tiny.config(**changes)))(jax.random.key(0))


def outputs(layout, config=CONFIG, visibility="columns", **changes):
    weights = params(**changes)
    run = jax.jit(lambda tokens, at: logits(weights, forward(weights, config, tokens, at, visibility=visibility)))
    return np.asarray(run(layout.tokens, Coordinates.of(layout)))


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_gradients_reach_exactly_what_the_mask_allows(visibility):
    """One layer: the derivative of output i by embedding j is zero where the mask is 0, and not zero where it is 1."""
    config = tiny.config(num_hidden_layers=1)
    weights = params(num_hidden_layers=1)
    layout = build_layout([[SMALL]], length=9)
    at = Coordinates.of(layout)

    def run(table):
        """Every token has an embedding of its own."""
        changed = weights | {"embed": table}
        return forward(changed, config, jnp.arange(9)[None], at, visibility=visibility)[0].sum(-1) ** 2

    slopes = np.asarray(jax.jit(jax.jacrev(run))(weights["embed"][jnp.asarray(layout.tokens[0])]))
    reached = np.abs(slopes).max(-1) > 0
    np.testing.assert_array_equal(reached, np.asarray(column_mask(at, at, visibility=visibility)[0]))


def test_news_takes_two_columns():
    """What stands in a branch at column c first moves a sibling's logits at column c+1, which choose the token of c+2;
    the first answer token does not know the last prompt column."""
    prompts = [Branch([11, 12, 13], [41, 42, 43]), Branch([21, 22, 23], [51, 52, 53])]
    layout = build_layout([[TokenSample([1, 2], prompts)]])
    weights = params()
    at = Coordinates.of(layout)

    def run(table):
        return forward(weights | {"embed": table}, CONFIG, jnp.arange(14)[None], at)[0].sum(-1) ** 2

    slopes = np.asarray(jax.jit(jax.jacrev(run))(weights["embed"][jnp.asarray(layout.tokens[0])]))
    reached = np.abs(slopes).max(-1) > 0  # [logits, token that stands there]
    branch, column = layout.branch[0], layout.column[0]
    for i, j in np.ndindex(14, 14):
        if branch[i] and branch[j] and branch[i] != branch[j]:
            chosen = column[i] + 1  # the column of the token that these logits choose
            assert reached[i, j] == (chosen >= column[j] + 2)
    first_answer = 2 + 3
    ends = (branch == 1) & (column == first_answer - 1)
    assert not reached[ends][0, (branch == 2) & (column == first_answer - 1)].any()
    assert reached[ends][0, (branch == 2) & (column == first_answer - 2)].all()


def test_branches_with_the_same_prompt_are_one_branch_without_pairs():
    """Whatever the visibility and the bias; the pairs tell them apart."""
    same = build_layout([[TokenSample([1, 2], [Branch([11, 12], [41])] * 3)]])
    for bias in (False, True):
        config = tiny.config(pair_indices=(), sibling_bias=bias)
        for visibility in VISIBILITIES:
            out = outputs(same, config, visibility, sibling_bias=bias)[0]
            for number in (2, 3):
                np.testing.assert_allclose(out[same.branch[0] == number], out[same.branch[0] == 1], atol=2e-5)
    out = outputs(same)[0]
    assert np.abs(out[same.branch[0] == 2] - out[same.branch[0] == 1]).max() > 1e-2


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_mix_is_every_visibility_by_itself(backend):
    """One forward over rows and packed samples of three visibilities gives what three forwards give."""
    weights = params(sibling_bias=True)
    config = tiny.config(sibling_bias=True)
    seen = [replace(SMALL, visibility=visibility) for visibility in VISIBILITIES]
    layout = build_layout([[seen[0], seen[1]], [seen[2]]], length=136)
    mixed = forward(
        weights, config, jnp.asarray(layout.tokens), Coordinates.of(layout, "mix"), visibility="mix", backend=backend
    )
    alone = build_layout([[SMALL]])
    for (row, place), visibility in zip(((0, 0), (0, 8), (1, 0)), VISIBILITIES, strict=True):
        tokens, at = jnp.asarray(alone.tokens), Coordinates.of(alone)
        expected = forward(weights, config, tokens, at, visibility=visibility, backend="dense")[0]
        np.testing.assert_allclose(mixed[row, place : place + 8], expected, atol=2e-5)


def test_nothing_depends_on_later_or_same_column_tokens_of_others():
    """Two layers, every token in turn: only outputs of later columns, and its own, change."""
    layout = build_layout([[SMALL]])
    before = outputs(layout)[0]
    for j in range(layout.tokens.shape[1]):
        tokens = layout.tokens.copy()
        tokens[0, j] += 1
        after = outputs(build_layout([[SMALL]]).__class__(**{**layout, "tokens": tokens}))[0]
        changed = np.abs(after - before).max(-1) > 0
        expected = layout.column[0] > layout.column[0, j]
        expected[j] = True
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("align", ["left", "right", "ragged"])
def test_permuting_branches_permutes_outputs(align):
    branches = [Branch([11, 12, 13], [41, 42]), Branch([21], [51]), Branch([31, 32], [61, 62, 63])]
    order = [2, 0, 1]
    config = tiny.config(pair_indices=())
    one = build_layout([[TokenSample([1, 2, 3], branches)]], align=align)
    other = build_layout([[TokenSample([1, 2, 3], [branches[i] for i in order])]], align=align)
    first, second = outputs(one, config)[0], outputs(other, config)[0]
    for new, old in enumerate(order, start=1):
        mine, theirs = one.branch[0] == old + 1, other.branch[0] == new
        np.testing.assert_allclose(first[mine], second[theirs], atol=2e-5)
    with_pairs = outputs(one)[0][one.branch[0] == 1], outputs(other)[0][other.branch[0] == 2]
    assert np.abs(with_pairs[0] - with_pairs[1]).max() > 1e-2  # branch pairs do tell branches apart


def test_own_and_sibling_are_told_apart_by_the_pairs_only():
    """Different questions of equal length that end in the same token: equal logits without pairs, others with them."""
    layout = build_layout([[TokenSample([1, 2], [Branch([11, 9]), Branch([21, 9])])]])
    ends = outputs(layout, tiny.config(pair_indices=()))[0, -2:]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)
    ends = outputs(layout)[0, -2:]
    assert np.abs(ends[0] - ends[1]).max() > 0.05 * ends.std()


def test_a_sibling_bias_of_minus_8_is_the_isolated_model():
    """The worked example on Qwen3's own initialisation, normal(0.02): siblings have a weight of exp(-8)."""
    config = tiny.config(hidden_size=512, intermediate_size=1536, head_dim=64, sibling_bias=True)
    weights = jax.tree.map(lambda x: x, init_params(config, jax.random.key(0), sibling_bias_start=-8.0))
    for tree in (weights, weights["layers"]):
        tree |= {
            n: 0.02 * x / x.std() for n, x in tree.items() if n != "layers" and n.split("_")[-1] not in ("norm", "bias")
        }
    layout = build_layout([[WORKED]])
    at, tokens = Coordinates.of(layout), jnp.asarray(layout.tokens)

    def run(visibility, bias):
        layers = {**weights["layers"], "sibling_bias": weights["layers"]["sibling_bias"] + bias}
        changed = {**weights, "layers": layers}
        return np.asarray(logits(changed, forward(changed, config, tokens, at, visibility=visibility)))

    isolated = run("isolated", 0.0)
    assert np.abs(run("columns", 0.0) - isolated).max() < 1e-3
    assert np.abs(run("columns", 8.0) - isolated).max() > 0.3  # no bias: siblings are seen


def test_packed_samples_do_not_see_one_another():
    other = TokenSample([7, 8, 9], [Branch([15], [45])])
    packed = build_layout([[SMALL, other]])
    alone = build_layout([[other]])
    np.testing.assert_allclose(outputs(packed)[0][packed.segment[0] == 1], outputs(alone)[0], atol=2e-5)


def test_padding_changes_nothing_and_is_finite():
    short, long = build_layout([[SMALL]]), build_layout([[SMALL]], length=20, pad_id=3)
    np.testing.assert_allclose(outputs(long)[0, :8], outputs(short)[0], atol=2e-5)
    weights = params()
    run = jax.jit(lambda at: forward(weights, CONFIG, jnp.asarray(long.tokens), at, dtype=jnp.bfloat16))
    assert np.isfinite(np.asarray(run(Coordinates.of(long)), np.float32)).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_weights_are_those_of_the_table(tied, bias):
    config = tiny.config(tie_word_embeddings=tied, sibling_bias=bias)
    weights = init_params(config, jax.random.key(3))
    assert jax.tree.map(lambda x: x.shape, weights) == param_shapes(config)
    assert sum(x.size for x in jax.tree.leaves(weights)) == parameter_count(config)
    assert ("lm_head" in weights) == (not tied)
    assert ("sibling_bias" in weights["layers"]) == bias
