"""Where attention goes: to the background, the own branch and the siblings, by layer and head.

Looking is worth nothing where this says that nobody looks. The shares come from a forward of their own, with the scores
of all pairs in memory: for a few rows, not for training.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.attention import attention_weights, sibling_scores
from pd_jax.columns import Coordinates, column_mask, rope_tables, sibling_mask
from pd_jax.config import LoraConfig, ModelConfig, RowVisibility
from pd_jax.lora import with_bias
from pd_jax.model import block, project
from pd_jax.params import Params

LOOK_TOKENS = 1024  # of one row, at which a validation looks where attention goes
SHUT = -4.0  # a sibling_bias below it lets less than 2 % through
PLACES = ("background", "own branch", "siblings")  # the last axis of `attention_mass`; joins count as background


def watching(
    coordinates: Coordinates, visibility: RowVisibility, keep: Callable[[Array], Array] | None = None
) -> tuple[Callable[..., Array], list[Array]]:
    """Attention for `model.block` over rows [B, T], and the list that every call appends to what it keeps: `keep` of
    its weights [B, K, N/K, T, S], by default their mean shares of the tokens that stand in branches, float32 [B, N, 3]
    in the order of `PLACES`; NaN in a row without any."""
    mask = column_mask(coordinates, coordinates, visibility)
    siblings = sibling_mask(coordinates, coordinates)
    background = jnp.broadcast_to((coordinates.branch == 0)[:, None, :], mask.shape)
    places = jnp.stack([background, ~background & ~siblings, siblings], axis=-1).astype(jnp.float32)  # [B, T, S, 3]
    asking = (coordinates.valid & (coordinates.branch > 0)).astype(jnp.float32)  # [B, T]
    asking /= jnp.sum(asking, axis=1, keepdims=True)
    seen: list[Array] = []

    def shares(weights: Array) -> Array:
        return jnp.einsum("bkgts,btsp,bt->bkgp", weights, places, asking).reshape(len(weights), -1, len(PLACES))

    def attend(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        bias = None if sibling_bias is None else sibling_scores(siblings, sibling_bias)
        weights = attention_weights(q, k, mask, bias)
        seen.append((keep or shares)(weights))
        return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v).reshape(q.shape)

    return attend, seen


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
    """Mean shares of the attention of every row's tokens that stand in branches, float32 [B, L, N, 3] in the order of
    `PLACES`; they sum to 1, and are NaN in a row without branches.

    tokens int32 [B, T] with their coordinates; adapters and lora as in `model.forward`. For the weights of a decoder
    see `ParallelDecoder.attention`.
    """
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    params = with_bias(params, adapters)

    def layer_step(x: Array, xs: tuple[Params, Params | None]) -> tuple[Array, Array]:
        layer, adapter = xs
        attend, seen = watching(coordinates, visibility)
        linear = partial(project, layer=layer, adapter=adapter, lora=lora)
        return block(config, layer, x, rope=rope, attend=attend, linear=linear), seen[0]

    return jnp.moveaxis(jax.lax.scan(layer_step, params["embed"][tokens], (params["layers"], adapters))[1], 0, 1)


def sibling_share(
    config: ModelConfig, lora: LoraConfig | None, trained: Params, frozen: Params, batch: dict[str, Array]
) -> Array:
    """The share of attention on siblings, over all layers and heads, in the first row of a training batch, whose arrays
    are [A, B, T]; a scalar."""
    params, adapters = (trained, None) if lora is None else (frozen, trained)
    row = {name: array[0, :1, :LOOK_TOKENS] for name, array in batch.items()}  # in column-major order a part is whole
    visibility = config.visibility or "columns"
    coordinates = Coordinates.of(row, visibility)
    mass = attention_mass(
        params, config, row["tokens"], coordinates, visibility=visibility, adapters=adapters, lora=lora
    )
    return jnp.mean(mass[..., 2])


def door_line(config: ModelConfig, trained: Params) -> str:
    """What the last line says of a sibling_bias that hides the siblings from every head; else nothing."""
    if not config.sibling_bias or config.visibility == "isolated":
        return ""
    bias = trained.get("layers", trained)["sibling_bias"]
    low, high = float(jnp.min(bias)), float(jnp.max(bias))
    if high >= SHUT:
        return ""
    return (
        f"; its siblings are never seen: sibling_bias ends at {low:.2f} .. {high:.2f}. Begin with a higher "
        "--sibling-bias-start or raise --sibling-bias-lr"
    )
