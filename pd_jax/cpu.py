"""Matrix products in the order that XLA:CPU multiplies fastest; on every other platform they are plain products.

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


def cache_stands_left(rows: int) -> bool:
    """Whether `attend_from_the_left` is faster for so many rows a kv head; few make its inner loops short."""
    return on_cpu() and 8 <= rows <= 64


def attend_from_the_left(q: Array, k: Array, v: Array, mask: Array, bias: Array | None) -> Array:
    """The attention of a column with the cache on the left of the scores' product.

    q [K, S, n, G, H], k and v [K*S, C, H], mask [S, n, C], bias [K, S, n, G, C] -> [K, S, n, G, H].
    """
    heads, s, n, groups, h = q.shape
    rows = q.reshape(heads * s, n * groups, h)
    scores = jnp.einsum("bch,brh->bcr", k, rows, preferred_element_type=jnp.float32)
    scores = jax.lax.optimization_barrier(scores).reshape(heads, s, -1, n, groups) / math.sqrt(h)
    if bias is not None:
        scores += jnp.moveaxis(bias, 4, 2)
    scores = jnp.where(mask.swapaxes(1, 2)[None, ..., None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=2).astype(v.dtype)
    return jnp.einsum("bcr,bch->brh", weights.reshape(heads * s, -1, n * groups), v).reshape(q.shape)
