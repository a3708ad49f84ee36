"""TPU: jax's splash attention kernel with the column mask computed inside it, in linear memory.

In column-major order the keys of a query are the prefix [0, end) of its row, cut to its sample, and itself. `end` and
the query's own index travel to the kernel as one integer per query; the samples travel as segment ids. The block map is
a traced array, so every row of a batch may have its own columns. `MaskInfo` and `SplashAttentionKernel` can be imported
but are not documented: they are used in this file only.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pd_jax.attention.chunked import make_tiles, visible_tiles
from pd_jax.columns import Coordinates, prefix_ends

LANES = 128  # a block is a multiple of it
OWN_BITS = 16
MAX_TOKENS = 1 << 15  # `end` takes the 15 bits that an int32 has left


@struct.dataclass
class SplashMask:
    """What the kernel needs to know of each row: everything has a leading B.

    queries int32 [B, T] (end << 16 | own index), segment int32 [B, T] (-1 for PAD), blocks bool [B, I, J] (query block
    I sees something of key block J), scale float32 [B] (1 / sqrt is put on it; NaN where tokens are out of order).
    """

    queries: Array
    segment: Array
    blocks: Array
    scale: Array


def block_size(tokens: int) -> int:
    """The largest block up to 512 that divides a row; `tokens` is a multiple of 128."""
    return next(size for size in (512, 384, 256, LANES) if tokens % size == 0)


def make_mask(coordinates: Coordinates) -> SplashMask:
    """The mask of rows of coordinates [B, T], visibility "columns", tokens in column-major order."""
    tokens = coordinates.column.shape[-1]
    ends, ordered = prefix_ends(coordinates)
    return SplashMask(
        queries=ends << OWN_BITS | jnp.arange(tokens, dtype=jnp.int32),
        segment=jnp.where(coordinates.valid, coordinates.segment, -1),
        blocks=jnp.moveaxis(visible_tiles(make_tiles(coordinates, block_size(tokens))), -1, 0),
        scale=jnp.where(ordered, 1.0, jnp.nan),
    )


def _sees(query: Array, key: Array) -> Array:
    return (key < query >> OWN_BITS) | (key == query & (1 << OWN_BITS) - 1)


def splash_attention(q: Array, k: Array, v: Array, mask: SplashMask, interpret: bool = False) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]. A row that is not in column-major order becomes NaN."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask_info as infos,
    )

    block = block_size(q.shape[1])
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def info(blocks: Array, queries: Array, axis: int) -> infos.MaskInfo:
        """The block map, with the block to load at every step of a walk along `axis`.

        Outside the seen range the walk stays at its nearest end: nothing is loaded for a step that computes nothing.
        """
        index = jnp.arange(blocks.shape[axis], dtype=jnp.int32)
        index = jnp.expand_dims(index, 1 - axis)
        first = jnp.min(jnp.where(blocks, index, blocks.shape[axis]), axis=axis, keepdims=True)
        last = jnp.max(jnp.where(blocks, index, 0), axis=axis, keepdims=True)
        load = jnp.clip(jnp.broadcast_to(index, blocks.shape), first, last)
        return infos.MaskInfo(
            data_next=load[None],
            mask_next=None,
            block_mask=blocks.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=queries,  # ty: ignore[invalid-argument-type] -- says numpy, takes traced arrays
        )

    def row(q: Array, k: Array, v: Array, mask: SplashMask) -> Array:
        forward = info(mask.blocks, mask.queries, axis=1)
        kernel = kernels.SplashAttentionKernel(
            forward,
            forward,
            info(mask.blocks, mask.queries, axis=0),
            is_mqa=False,
            block_sizes=sizes,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_sees,
            interpret=interpret,
        )
        scaled = (q.astype(jnp.float32) * (mask.scale / math.sqrt(q.shape[-1]))).astype(q.dtype)
        heads_first = (x.swapaxes(0, 1) for x in (scaled, k, v))
        out = kernel(*heads_first, segment_ids=kernels.SegmentIds(mask.segment, mask.segment))
        return jnp.swapaxes(out, 0, 1)  # ty: ignore[invalid-argument-type] -- a tuple only with save_residuals

    return jax.vmap(row)(q, k, v, mask)
