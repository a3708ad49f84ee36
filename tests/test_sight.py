"""Attention mass: shares that sum to 1, none where the mask or the bias forbids, and the bias moves them."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from examples import SMALL, WORKED

from pd_jax.columns import Coordinates
from pd_jax.layout import build_layout
from pd_jax.params import init_params
from pd_jax.sight import attention_mass

CONFIG = tiny.config(sibling_bias=True)


def mass(bias: float, visibility="columns", samples=(WORKED, SMALL)):
    params = init_params(CONFIG, jax.random.key(0), sibling_bias_start=bias)
    layout = build_layout([[sample] for sample in samples], length=20)
    return np.asarray(
        attention_mass(params, CONFIG, jnp.asarray(layout.tokens), Coordinates.of(layout), visibility=visibility)
    )


def test_shares_sum_to_one_for_every_layer_and_head():
    shares = mass(0.0)
    assert shares.shape == (2, 4, 3)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    assert (shares > 0.05).all()


def test_siblings_get_nothing_when_hidden_and_more_the_wider_the_door():
    assert mass(0.0, "isolated")[..., 2].max() == 0
    shut, ajar, wide = (mass(bias)[..., 2].mean() for bias in (-8.0, -2.0, 2.0))
    assert 0 < shut < 1e-3 < ajar < wide < 1
    assert 0 < mass(0.0, "prompts", (SMALL,))[..., 2].min() < mass(0.0, "columns", (SMALL,))[..., 2].min()
