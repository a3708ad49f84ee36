"""Weighted cross-entropy from hidden states, one chunk of tokens at a time: all logits never exist at once.

The gradients are made in the forward pass, while a chunk's logits are there, so that nothing is computed twice
(https://arxiv.org/abs/2410.10989, section 3.2).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.cpu import outer

CHUNK = 1024  # tokens; at a vocabulary of 151,936 their float32 logits take 0.6 GB


def weighted_nll(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int = CHUNK) -> Array:
    """sum(weight * -log p(target)), a float32 scalar.

    hidden [..., T, D] (any float dtype), head [V, D], targets int32 [..., T], weights float32 [..., T]. Divide by the
    sum of the weights only after summing over micro-batches and devices. A chunk takes the same places of all rows,
    about `chunk` tokens on every device: rows stay on the devices that they are on.
    """
    tokens, d = hidden.shape[-2:]
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis != "tensor")
    rows = math.prod(hidden.shape[:-2])
    count = -(-tokens * max(rows // ways, 1) // chunk)
    size = -(-tokens // count)  # as many chunks as needed, of equal size: little padding

    def cut(array: Array, *rest: int) -> Array:
        """[..., T, *rest] -> [I, rows, C, *rest]"""
        array = jnp.pad(array.reshape(rows, tokens, *rest), ((0, 0), (0, -tokens % size), *((0, 0) for _ in rest)))
        return array.reshape(rows, -1, size, *rest).swapaxes(0, 1)

    return _nll(cut(hidden, d), head, cut(targets), cut(weights))


def _scores(x: Array, head: Array, target: Array) -> tuple[Array, Array, Array]:
    """float32 logits [B, C, V] of a chunk [B, C, D], their log-sum-exp [B, C], and the nll of the targets [B, C]."""
    logits = jnp.einsum("bcd,vd->bcv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return logits, lse, lse - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]


@jax.custom_vjp
def _nll(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    """hidden [I, B, C, D], targets and weights [I, B, C] -> a scalar."""

    def body(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, target, weight = part
        return total + jnp.sum(weight * _scores(x, head, target)[2]), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]


def _forward(hidden: Any, head: Any, targets: Any, weights: Any) -> tuple[Array, tuple]:
    """The sum, and its gradients to hidden, head (None for a frozen one) and weights."""
    trained, head = head.perturbed, head.value

    def body(carry: tuple[Array, Array | None], part: tuple[Array, Array, Array]) -> tuple[tuple, tuple]:
        total, d_head = carry
        x, target, weight = part
        logits, lse, nll = _scores(x, head, target)
        hit = target[..., None] == jnp.arange(head.shape[0], dtype=target.dtype)
        d_logits = (weight[..., None] * (jnp.exp(logits - lse[..., None]) - hit)).astype(x.dtype)
        if d_head is not None:  # summed over the chunks in the head's own dtype
            flat = (array.reshape(-1, array.shape[-1]) for array in (x, d_logits))
            d_head += outer(*flat).T.astype(d_head.dtype)
        return (total + jnp.sum(weight * nll), d_head), (d_logits @ head.astype(x.dtype), nll)

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(head) if trained else None)
    parts = (hidden.value, targets.value, weights.value)
    (total, d_head), (d_hidden, d_weights) = jax.lax.scan(body, start, parts)
    return total, (d_hidden, d_head, d_weights)


def _backward(saved: tuple, d_total: Array) -> tuple:
    d_hidden, d_head, d_weights = jax.tree.map(lambda x: (x * d_total).astype(x.dtype), saved)
    return d_hidden, d_head, None, d_weights


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
