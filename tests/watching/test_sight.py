"""Where attention goes and what siblings change: nothing where they are hidden, more the wider the door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from examples import SMALL, WORKED

from pd_jax import ParallelDecoder
from pd_jax.columns import Coordinates
from pd_jax.layout import TokenSample, build_layout
from pd_jax.params import init_params
from pd_jax.watching.sight import attention_mass

CONFIG = tiny.config(sibling_bias=True)


def mass(bias: float, visibility="columns", samples=(WORKED, SMALL)):
    params = init_params(CONFIG, jax.random.key(0), sibling_bias_start=bias)
    layout = build_layout([[sample] for sample in samples], length=20)
    return np.asarray(
        attention_mass(params, CONFIG, jnp.asarray(layout.tokens), Coordinates.of(layout), visibility=visibility)
    )


def test_shares_sum_to_one_for_every_layer_and_head():
    shares = mass(0.0)
    assert shares.shape == (2, 2, 4, 3)  # rows, layers, heads
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    assert (shares > 0.05).all()


def test_siblings_get_nothing_when_hidden_and_more_the_wider_the_door():
    assert mass(0.0, "isolated")[..., 2].max() == 0
    shut, ajar, wide = (mass(bias)[..., 2].mean() for bias in (-8.0, -2.0, 2.0))
    assert 0 < shut < 1e-3 < ajar < wide < 1
    assert 0 < mass(0.0, "prompts", (SMALL,))[..., 2].min() < mass(0.0, "columns", (SMALL,))[..., 2].min()


def decoder(bias: float = 0.0, **settings) -> ParallelDecoder:
    params = init_params(CONFIG, jax.random.key(0), sibling_bias_start=bias)
    return ParallelDecoder(CONFIG, params, tiny.tokenizer(), (), **settings)


def test_a_decoder_sees_as_its_weights_do():
    for visibility in ("columns", "isolated", "prompts"):
        own = decoder(visibility=visibility)
        seen = own.attention(own.layout([WORKED, SMALL]))
        np.testing.assert_allclose(seen, mass(0.0, visibility), atol=1e-5)


def test_the_effect_of_siblings_is_that_of_hiding_them():
    own, alone = decoder(), decoder(visibility="isolated")
    layout = own.layout([WORKED, SMALL])
    effect = own.sibling_effect(layout)
    shown, hidden = own.logits(layout), alone.logits(layout)
    for row, branch in ((0, 1), (0, 3), (1, 2)):
        place = (layout.branch[row] == branch) & layout.valid[row]
        change = np.abs(shown - hidden)[row, place].mean() / shown[layout.valid].std()
        assert effect[row, branch - 1] == pytest.approx(change, rel=1e-5)
        assert change > 0.01
    assert np.isnan(effect[1, 2])  # no such branch
    assert decoder(-8.0).sibling_effect(layout)[0].max() < 0.1 * effect[0].min()


def test_siblings_that_are_hidden_or_absent_change_nothing():
    lonely = TokenSample(WORKED.background, WORKED.branches[:1])
    hidden = TokenSample(SMALL.background, SMALL.branches, "isolated")
    assert np.nanmax(decoder().sibling_effect(decoder().layout([lonely, hidden]))) == 0
    assert np.nanmax(decoder(visibility="isolated").sibling_effect(decoder().layout([WORKED, SMALL]))) == 0
