"""The reference for attention: an explicit mask and a float32 softmax; any platform, T x S memory."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def attention_weights(q: Array, k: Array, mask: Array, bias: Array | None = None) -> Array:
    """How much every query takes of every key: float32 [B, K, G, T, S], sums of 1 along S.

    q [B, T, N, H], k [B, S, K, H] with N = K * G, mask [B, T, S], bias [B, N, T, S].
    """
    b, t, _, h = q.shape
    groups = q.reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=jnp.float32) / math.sqrt(h)
    if bias is not None:
        scores += bias.reshape(b, k.shape[2], -1, t, k.shape[1])
    # finfo.min and not -inf: a row with nothing to see must not become NaN.
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def sibling_scores(siblings: Array, sibling_bias: Array) -> Array:
    """sibling_bias [N] where `siblings` [B, T, S] says so, [B, N, T, S]; 0 elsewhere."""
    # Not a product: -inf hides siblings and is no number times 0.
    return jnp.where(siblings[:, None], sibling_bias[None, :, None, None], 0.0)


def dense_attention(q: Array, k: Array, v: Array, mask: Array, bias: Array | None = None) -> Array:
    """Grouped-query attention with an explicit mask [B, T, S] and an additive bias [B, N, T, S].

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K -> [B, T, N, H].
    """
    weights = attention_weights(q, k, mask, bias).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
