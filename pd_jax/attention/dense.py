"""The reference for attention: an explicit mask and a float32 softmax; any platform, T x S memory."""

import math

import jax
import jax.numpy as jnp
from jax import Array


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
