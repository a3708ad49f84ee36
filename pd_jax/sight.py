"""Where attention goes: to the background, the own branch and the siblings, by layer and head.

Looking is worth nothing where this says that nobody looks. The shares come from a forward of their own, with the scores
of all pairs in memory: for a few rows, not for training.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.attention import attention_weights, sibling_scores
from pd_jax.columns import Coordinates, column_mask, rope_tables, sibling_mask
from pd_jax.config import LoraConfig, ModelConfig, RowVisibility
from pd_jax.model import block, project
from pd_jax.params import Params

PLACES = ("background", "own branch", "siblings")  # the last axis of `attention_mass`


@partial(jax.jit, static_argnames=("config", "visibility", "lora"))
def attention_mass(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    coordinates: Coordinates,
    *,
    visibility: RowVisibility = "columns",
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
) -> Array:
    """Mean shares of the attention of tokens that stand in branches, float32 [L, N, 3] in the order of `PLACES`.

    tokens int32 [B, T] with their coordinates; adapters and lora as in `model.forward`. The three shares sum to 1; NaN
    when no token stands in a branch.
    """
    mask = column_mask(coordinates, coordinates, visibility)
    siblings = sibling_mask(coordinates, coordinates)
    background = jnp.broadcast_to((coordinates.branch == 0)[:, None, :], mask.shape)
    places = jnp.stack([background, ~background & ~siblings, siblings], axis=-1).astype(jnp.float32)  # [B, T, S, 3]
    asking = (coordinates.valid & (coordinates.branch > 0)).astype(jnp.float32)  # [B, T]
    rope = rope_tables(config, coordinates.branch, coordinates.column)

    def layer_step(x: Array, xs: tuple[Params, Params | None]) -> tuple[Array, Array]:
        layer, adapter = xs
        seen: list[Array] = []

        def attend(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
            bias = None if sibling_bias is None else sibling_scores(siblings, sibling_bias)
            weights = attention_weights(q, k, mask, bias)
            seen.append(jnp.einsum("bkgts,btsp,bt->kgp", weights, places, asking) / jnp.sum(asking))
            return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v).reshape(q.shape)

        linear = partial(project, layer=layer, adapter=adapter, lora=lora)
        x = block(config, layer, x, rope=rope, attend=attend, linear=linear)
        return x, seen[0].reshape(config.num_attention_heads, len(PLACES))

    return jax.lax.scan(layer_step, params["embed"][tokens], (params["layers"], adapters))[1]
