"""Weighted cross-entropy from hidden states, one chunk of tokens at a time: all logits never exist at once.

The gradients are made in the forward pass, while a chunk's logits are there, so that nothing is computed twice
(https://arxiv.org/abs/2410.10989, section 3.2). Tokens of weight 0 stand behind the others and get no logits.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.cpu import outer
from pd_jax.mesh import HEAD_VD

CHUNK = 1024  # tokens; at a vocabulary of 151,936 their float32 logits take 0.6 GB
SHARES = (16, 8, 4, 2, 1)  # a chunk is computed up to the first 1/16, 1/8 ... of it that holds all its weights


def weighted_nll(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int = CHUNK) -> Array:
    """sum(weight * -log p(target)), a float32 scalar.

    hidden [..., T, D] (any float dtype), head [V, D], targets int32 [..., T], weights float32 [..., T]. Divide by the
    sum of the weights only after summing over micro-batches and devices. A chunk takes about `chunk` tokens of every
    device, which lays the rows that are on it end to end.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis != "tensor")
    lanes = math.gcd(math.prod(targets.shape[:-1]), ways)
    hidden, targets, weights = (x.reshape(lanes, -1, *x.shape[targets.ndim :]) for x in (hidden, targets, weights))
    return _nll(hidden, head, targets, weights, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> Array:
    """hidden [B, N, D], targets and weights [B, N] -> a scalar."""
    return _with_gradients(hidden, head, targets, weights, None, weights != 0, chunk)[0]


def _with_gradients(
    hidden: Array, head: Array, targets: Array, weights: Array, d_head: Array | None, counts: Array, chunk: int
) -> tuple[Array, tuple]:
    """The sum, and its gradients to hidden, head (added to `d_head`; None for a frozen one) and weights. Tokens where
    `counts` is False may be left out. The sum alone costs no more than itself: XLA removes what is not used.
    """
    lanes, tokens, _ = hidden.shape
    number = -(-tokens // chunk)
    size = -(-tokens // number)  # as many chunks as needed, of equal size: little padding
    order = jnp.argsort(~counts, axis=1, stable=True)
    take = jax.vmap(lambda array, places: array[places])
    matrix = head.astype(hidden.dtype)
    if "tensor" in jax.sharding.get_abstract_mesh().axis_names:  # gathered once, not in every chunk
        matrix = jax.lax.with_sharding_constraint(matrix, HEAD_VD)

    def cut(array: Array) -> Array:
        """[B, N, ...] -> [I, B, C, ...]"""
        array = jnp.pad(take(array, order), ((0, 0), (0, -tokens % size), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(lanes, number, size, *array.shape[2:]).swapaxes(0, 1)

    def first(n: int, carry: tuple[Array, Array | None], *part: Array) -> tuple[tuple, tuple]:
        """The first n tokens [B, n] of a chunk."""
        total, d_head = carry
        x, target, weight = (array[:, :n] for array in part)
        logits = jnp.einsum("bcd,vd->bcv", x, matrix, preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        hit = target[..., None] == jnp.arange(head.shape[0], dtype=target.dtype)
        d_logits = (weight[..., None] * (jnp.exp(logits - lse[..., None]) - hit)).astype(x.dtype)
        if d_head is not None:  # summed over the chunks in the head's own dtype
            d_head += outer(*(y.reshape(-1, y.shape[-1]) for y in (x, d_logits))).T.astype(d_head.dtype)
        rest = (0, 0), (0, size - n)
        gradients = jnp.pad(d_logits @ matrix, (*rest, (0, 0))), jnp.pad(nll, rest)
        return (total + jnp.sum(weight * nll), d_head), gradients

    sizes = sorted({-(-size // share) for share in SHARES})
    left = jnp.max(jnp.sum(counts, axis=1)) - size * jnp.arange(number)
    choice = jnp.searchsorted(jnp.array([0, *sizes[:-1]]), left)
    (total, d_head), gradients = jax.lax.scan(
        lambda carry, part: jax.lax.switch(part[0], [partial(first, n) for n in (0, *sizes)], carry, *part[1:]),
        (jnp.zeros((), jnp.float32), d_head),
        (choice, cut(hidden), cut(targets), cut(weights)),
    )
    back = jnp.argsort(order, axis=1)
    d_hidden, d_weights = (take(x.swapaxes(0, 1).reshape(lanes, -1, *x.shape[3:]), back) for x in gradients)
    return total, (d_hidden, d_head, d_weights)


def _forward(hidden: Any, head: Any, targets: Any, weights: Any, chunk: int) -> tuple[Array, tuple]:
    d_head = jnp.zeros_like(head.value) if head.perturbed else None
    counts = jnp.ones_like(weights.value, bool) if weights.perturbed else weights.value != 0  # a 0 has a gradient too
    return _with_gradients(hidden.value, head.value, targets.value, weights.value, d_head, counts, chunk)


def _backward(chunk: int, saved: tuple, d_total: Array) -> tuple:
    d_hidden, d_head, d_weights = jax.tree.map(lambda x: (x * d_total).astype(x.dtype), saved)
    return d_hidden, d_head, None, d_weights


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
