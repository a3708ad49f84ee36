"""Adapters as after training, and the logits of a model that has them beside its weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pd_jax.columns import Coordinates
from pd_jax.config import LORA_TARGETS
from pd_jax.layout import Branch, TokenSample, build_layout
from pd_jax.lora import adapter_shapes
from pd_jax.model import forward, logits

LAYOUT = build_layout([[TokenSample(list(range(3, 9)), [Branch(list(range(10, 20)))])]])
CHOICES = [(LORA_TARGETS, False), (("q_proj", "v_proj"), True), (("o_proj", "down_proj"), False)]


def random_adapters(config, lora):
    """Adapters as after training: neither part is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.2 * rng.standard_normal(shape, np.float32)),
        adapter_shapes(config, lora),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@partial(jax.jit, static_argnames=("config", "lora"))
def ours(params, config, adapters=None, lora=None):
    coordinates, tokens = Coordinates.of(LAYOUT), jnp.asarray(LAYOUT.tokens)
    return logits(params, forward(params, config, tokens, coordinates, adapters=adapters, lora=lora))


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)
