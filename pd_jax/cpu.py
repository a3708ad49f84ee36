"""What XLA:CPU does fastest in an order of its own; every other platform takes the plain products.

Nothing here changes a result. What was measured stands at each function; delete the file when XLA:CPU needs it no more.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.mesh import compile_target


def on_cpu() -> bool:
    return compile_target()[0] == "cpu"


# --- training: x from the left, [..., I] x [I, O]
def outer(x: Array, y: Array) -> Array:
    """x [T, I] and y [T, O] -> the sum over the tokens of their outer products, [I, O], in float32.

    On a CPU the transpose, of the narrower, is put into memory, and that of the result is kept out of the product:
    XLA:CPU multiplies along the first axes of both at 2/3 of the speed, and a rank of 16 at a third.
    """
    if x.shape[1] > y.shape[1]:
        return outer(y, x).T
    still = jax.lax.optimization_barrier if on_cpu() else lambda array: array
    return still(jnp.einsum("it,to->io", still(x.T), y, preferred_element_type=jnp.float32))


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    """[..., I] x [I, O] -> [..., O]; the kernel's gradient is `outer`."""
    return x @ kernel


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    d_kernel = outer(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return dy @ kernel.T, d_kernel.astype(kernel.dtype)


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def contract(x: Array, kernel: Array, summed: str, kept: str) -> Array:
    """x [..., *summed] times a kernel [*summed, *kept] -> [..., *kept]; summed and kept name axes by letters."""
    if not on_cpu():  # a TPU's tiles would be moved to reshape the kernel
        return jnp.einsum(f"...{summed},{summed}{kept}->...{kept}", x, kernel)
    rows = x.reshape(*x.shape[: x.ndim - len(summed)], math.prod(kernel.shape[: len(summed)]))
    return _matmul(rows, kernel.reshape(rows.shape[-1], -1)).reshape(*rows.shape[:-1], *kernel.shape[len(summed) :])


# --- decoding: few rows, matrices [O, I]
def times(x: Array, matrix: Array, dtype: Any = None) -> Array:
    """x [S, n, I] and a matrix [O, I] -> [S, n, O], in x's dtype or the one asked for.

    On a CPU the matrix stands on the left, and the result is turned back outside of the product: XLA:CPU multiplies
    x [4 to 16, I] from the left at half the speed, and would put it there again.
    """
    if not on_cpu():
        return jnp.einsum("sni,oi->sno", x, matrix, preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.optimization_barrier(jnp.einsum("oi,ni->on", matrix, rows, preferred_element_type=dtype))
    return y.T.reshape(*x.shape[:2], -1)


PIECE = 256  # slots of a cache


def pieces_are_faster(rows: int) -> bool:
    """Whether `attend_in_pieces` beats all slots at once, for so many rows a kv head.

    To read behind a cache it does. The columns of 64 branches (128 rows) are 1.3 times as fast on one thread, and a
    tenth slower on two.
    """
    return on_cpu() and rows >= 256


def attend_in_pieces(
    q: Array, k: Array, v: Array, mask: Array, siblings: Array, sibling_bias: Array | None, filled: Array
) -> Array:
    """Attention over the first `filled` slots of a cache, one piece of them after the other, by the online softmax
    (https://arxiv.org/abs/2205.14135). A piece that no query sees is left out: what is empty, and in isolated rows what
    the siblings hold.

    q [K, S, n, G, H], k and v [K*S, C, H], mask and siblings [S, n, C], sibling_bias [N] or None, filled: int32 scalar
    -> [K, S, n, G, H].
    """
    (heads, s, n, groups, h), slots = q.shape, k.shape[1]
    rows, size, lowest = q.reshape(heads * s, n * groups, h), min(PIECE, slots), jnp.finfo(jnp.float32).min

    def piece(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first = jnp.minimum(i * size, slots - size)  # the last piece begins inside the one before

        def cut(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, first, size, axis)

        shown = cut(mask, 2) & (first + jnp.arange(size) >= i * size)

        def look(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            scores = jnp.einsum("brh,bch->brc", rows, cut(k, 1), preferred_element_type=jnp.float32) / math.sqrt(h)
            scores = scores.reshape(heads, s, n, groups, size)
            if sibling_bias is not None:
                scores += jnp.where(cut(siblings, 2)[None, :, :, None], sibling_bias.reshape(heads, 1, 1, groups, 1), 0)
            # A row that has seen nothing yet adds weights of 1, which its first real score takes away: `fade` is 0.
            scores = jnp.where(shown[None, :, :, None], scores, lowest).reshape(heads * s, -1, size)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            part = jnp.einsum("brc,bch->brh", weights.astype(v.dtype), cut(v, 1), preferred_element_type=jnp.float32)
            return new, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + part

        return jax.lax.cond(jnp.any(shown), look, lambda carry: carry, carry)

    out = jnp.zeros(rows.shape, jnp.float32)
    pieces = (filled + size - 1) // size
    _, total, out = jax.lax.fori_loop(0, pieces, piece, (out[..., 0] + lowest, out[..., 0], out))
    return (out / total[..., None]).astype(v.dtype).reshape(q.shape)
