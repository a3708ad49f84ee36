"""NVIDIA GPUs: two stock flash attention kernels that take the column mask as a boolean array.

In column-major order the mask is a part of the causal one: `is_causal` makes the kernels skip the blocks above the
diagonal, forward and backward, and the array does the rest. It costs a byte a pair of tokens in tokamax (which keeps no
log-sum-exp gradient: never merge its results), two bytes and their gradient in cuDNN.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.columns import Coordinates, column_mask, prefix_ends
from pd_jax.config import RowVisibility


def make_mask(coordinates: Coordinates, visibility: RowVisibility) -> tuple[Array, Array]:
    """The mask bool [B, 1, T, T], and float32 [B]: 1, or NaN where a row is not in column-major order."""
    _, ordered = prefix_ends(coordinates)
    return column_mask(coordinates, coordinates, visibility)[:, None], jnp.where(ordered, 1.0, jnp.nan)


def _poison(q: Array, scale: Array) -> Array:
    return q * scale.astype(q.dtype)[:, None, None, None]


def cudnn_attention(q: Array, k: Array, v: Array, mask: tuple[Array, Array]) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], bfloat16 or float16 -> [B, T, N, H]; NaN for a row out of order."""
    q = _poison(q, mask[1])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[0], is_causal=True, implementation="cudnn")


def tokamax_attention(q: Array, k: Array, v: Array, mask: tuple[Array, Array]) -> Array:
    """As `cudnn_attention`, by tokamax's Mosaic kernel (sm90 and sm100)."""
    import tokamax  # ty: ignore[import-not-found] -- optional

    q = _poison(q, mask[1])
    return tokamax.dot_product_attention(q, k, v, mask=mask[0], is_causal=True, implementation="mosaic")
