"""Column attention in linear memory on any platform: tiles of queries and keys, the mask made inside the tile.

The forward pass is the online softmax (https://arxiv.org/abs/2205.14135); the backward pass keeps only the output and
the log-sum-exp and recomputes the probabilities of a tile. Both are one `custom_vjp` over the whole masked attention,
which is exact; a merge of partial results left to autodiff would not be. Nothing is assumed about the order of the
tokens: order only decides how many tiles are skipped.

Axes: B batch, K kv heads, G query heads per kv head, I tiles, M queries of a tile, J keys of a tile, H head_dim.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pd_jax.columns import Coordinates, column_mask, sibling_mask
from pd_jax.config import RowVisibility

LOWEST = float(jnp.finfo(jnp.float32).min)


@struct.dataclass
class Tiles:
    """Coordinates cut into tiles, [I, B, M], and the key tiles [first, last) that query tile i may see, int32 [I]."""

    coordinates: Coordinates
    first: Array
    last: Array


def make_tiles(coordinates: Coordinates, block: int) -> Coordinates:
    """Rows of coordinates [B, T] cut into equal tiles of about `block` tokens, [I, B, M], padded with PAD."""
    b, tokens = coordinates.column.shape
    count = -(-tokens // block)
    size = -(-tokens // (8 * count)) * 8  # a multiple of 8 (one vector), so that 300 tokens are not padded to 512
    padding = ((0, 0), (0, count * size - tokens))

    def cut(array: Array) -> Array:  # padded with zeros, and so with tokens that are not valid
        return jnp.pad(array, padding).reshape(b, count, size).swapaxes(0, 1)

    return jax.tree.map(cut, coordinates)


def visible_tiles(tiles: Coordinates) -> Array:
    """bool [I, J, B]: False where samples and columns show that no query of tile I sees a key of tile J."""

    def span(array: Array) -> tuple[Array, Array]:
        """Smallest and largest value among the valid tokens of each tile, [I, B]."""
        limit = jnp.iinfo(array.dtype)
        return (
            jnp.min(array, axis=-1, where=tiles.valid, initial=limit.max),
            jnp.max(array, axis=-1, where=tiles.valid, initial=limit.min),
        )

    (low, high), (early, late) = span(tiles.segment), span(tiles.column)
    seen = (low[None] <= high[:, None]) & (low[:, None] <= high[None]) & (early[None] < late[:, None])
    return seen | jnp.eye(tiles.column.shape[0], dtype=bool)[:, :, None]  # every token sees itself


def make_mask(coordinates: Coordinates, block: int) -> Tiles:
    """What `chunked_attention` needs of rows of coordinates [B, T], for tiles of about `block` tokens."""
    tiles = make_tiles(coordinates, block)
    seen = jnp.any(visible_tiles(tiles), axis=-1)
    index = jnp.arange(seen.shape[0], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, index, seen.shape[0]), axis=-1)
    return Tiles(tiles, first, jnp.max(jnp.where(seen, index + 1, 0), axis=-1))


def chunked_attention(
    q: Array, k: Array, v: Array, tiles: Tiles, visibility: RowVisibility, sibling_bias: Array | None = None
) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], sibling_bias [N] or None -> [B, T, N, H]; never a T x T array."""
    b, tokens, n, h = q.shape
    count, _, size = tiles.coordinates.column.shape
    kv_heads = k.shape[2]

    def cut(x: Array) -> Array:  # [B, T, heads, H] -> [I, B, K, heads / K, M, H]
        x = jnp.pad(x, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
        return x.reshape(b, count, size, kv_heads, -1, h).transpose(1, 0, 3, 4, 2, 5)

    bias = None if sibling_bias is None else sibling_bias.astype(jnp.float32).reshape(kv_heads, -1)
    out = _attend(visibility, tiles, cut(q), cut(k)[:, :, :, 0], cut(v)[:, :, :, 0], bias)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, count * size, n, h)[:, :tokens]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(visibility: RowVisibility, tiles: Tiles, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """q [I, B, K, G, M, H], k and v [I, B, K, J, H], bias [K, G] -> [I, B, K, G, M, H]."""
    return _forward(visibility, tiles, q, k, v, bias)[0]


def _scores(visibility: RowVisibility, tiles: Tiles, i: Array, j: Array, q: Array, k: Array, bias: Array | None):
    """float32 scores [B, K, G, M, J] of query tile i and key tile j, and who sees whom, who is whose sibling."""
    query, key = (jax.tree.map(lambda x, at=at: x[at], tiles.coordinates) for at in (i, j))
    size = query.column.shape[-1]
    mask = column_mask(query, key, visibility, (i - j) * size + jnp.arange(size))[:, None, None]
    siblings = sibling_mask(query, key)[:, None, None]
    scores = jnp.einsum("bkgmh,bkjh->bkgmj", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores += jnp.where(siblings, bias[:, :, None, None], 0.0)
    return scores, mask, siblings


def _forward(visibility: RowVisibility, tiles: Tiles, q: Array, k: Array, v: Array, bias: Array | None):
    def query_tile(queries, i):
        q_i = queries[i]

        def key_tile(j, carry):
            top, total, out = carry
            scores, mask, _ = _scores(visibility, tiles, i, j, q_i, k[j], bias)
            # A row that has seen nothing yet adds weights of 1; the first real score, at the latest its own, takes
            # them away again, because then `fade` is 0.
            scores = jnp.where(mask, scores, LOWEST)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            part = jnp.einsum("bkgmj,bkjh->bkgmh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + part

        rows = jnp.zeros(q_i.shape[:-1], jnp.float32)
        start = (rows + LOWEST, rows, jnp.zeros(q_i.shape, jnp.float32))
        top, total, out = jax.lax.fori_loop(tiles.first[i], tiles.last[i], key_tile, start)
        return queries.at[i].set((out / total[..., None]).astype(q.dtype)), top + jnp.log(total)

    # A tile's output takes the place of its queries: for a buffer of its own XLA:CPU makes the zeros of every layer of
    # an unrolled model at the start.
    out, lse = jax.lax.scan(query_tile, q, jnp.arange(q.shape[0]))
    return out, (tiles, q, k, v, bias, out, lse)


def _backward(visibility: RowVisibility, saved: tuple, d_out: Array):
    tiles, q, k, v, bias, out, lse = saved
    scale = 1 / math.sqrt(q.shape[-1])
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def query_tile(carry, item):
        i, q_i, d_out_i, lse_i, delta_i = item
        # Sums over the queries are written [H, M] x [M, J]: XLA:CPU runs them 2.5 times faster than [M, J]^T x [M, H].
        q_t, d_out_t = q_i.swapaxes(-1, -2), d_out_i.swapaxes(-1, -2)

        def key_tile(j, carry):
            dq, dk, dv, d_bias = carry
            scores, mask, siblings = _scores(visibility, tiles, i, j, q_i, k[j], bias)
            weights = jnp.where(mask, jnp.exp(scores - lse_i[..., None]), 0.0)
            d_weights = jnp.einsum("bkgmh,bkjh->bkgmj", d_out_i, v[j], preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - delta_i[..., None])
            if bias is not None:
                d_bias += jnp.sum(jnp.where(siblings, d_scores, 0.0), axis=(0, 3, 4))
            weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)
            sum_queries = partial(jnp.einsum, "bkghm,bkgmj->bkhj", preferred_element_type=jnp.float32)
            dq += jnp.einsum("bkgmj,bkjh->bkgmh", d_scores, k[j], preferred_element_type=jnp.float32)
            dk = dk.at[j].add(sum_queries(q_t, d_scores))
            dv = dv.at[j].add(sum_queries(d_out_t, weights))
            return dq, dk, dv, d_bias

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(tiles.first[i], tiles.last[i], key_tile, start)
        return tuple(carry), (dq * scale).astype(q.dtype)

    keys = jnp.zeros(k.swapaxes(-1, -2).shape, jnp.float32)  # [I, B, K, H, J]
    start = (keys, keys, None if bias is None else jnp.zeros_like(bias))
    items = (jnp.arange(q.shape[0]), q, d_out, lse, delta)
    (dk, dv, d_bias), dq = jax.lax.scan(query_tile, start, items)
    dk, dv = (dk * scale).swapaxes(-1, -2).astype(k.dtype), dv.swapaxes(-1, -2).astype(v.dtype)
    return None, dq, dk, dv, d_bias


_attend.defvjp(_forward, _backward)
