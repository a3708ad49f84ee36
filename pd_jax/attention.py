"""Column attention: one entry, `make_attention`, over backends that all equal `dense`."""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.columns import Coordinates, Visibility, column_mask, sibling_mask


class Attention(Protocol):
    def __call__(self, q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        """q [B, T, N, H], k and v [B, S, K, H], sibling_bias [N] or None -> [B, T, N, H] in q's dtype."""
        ...


def dense_attention(q: Array, k: Array, v: Array, mask: Array, bias: Array | None = None) -> Array:
    """Grouped-query attention with an explicit mask [B, T, S] and an additive bias [B, N, T, S]; float32 softmax.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K -> [B, T, N, H].
    """
    b, t, n, h = q.shape
    groups = q.reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=jnp.float32) / math.sqrt(h)
    if bias is not None:
        scores += bias.reshape(b, k.shape[2], -1, t, k.shape[1])
    # finfo.min and not -inf: a row with nothing to see must not become NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def make_attention(coordinates: Coordinates, visibility: Visibility = "columns") -> Attention:
    """Self-attention over laid-out rows with `coordinates` [B, T]; the mask is computed once for all layers."""
    mask = column_mask(coordinates, coordinates, visibility)
    siblings = sibling_mask(coordinates, coordinates)

    def attend(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        bias = None if sibling_bias is None else sibling_bias[:, None, None] * siblings[:, None]
        return dense_attention(q, k, v, mask, bias)

    return attend
