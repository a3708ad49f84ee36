"""Weighted cross-entropy from hidden states, one chunk of tokens at a time: all logits never exist at once."""

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 1024  # tokens; at a vocabulary of 151,936 their float32 logits take 0.6 GB


def weighted_nll(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int = CHUNK) -> Array:
    """sum(weight * -log p(target)), a float32 scalar.

    hidden [..., D] (any float dtype), head [V, D], targets int32 [...], weights float32 [...]. Divide by the sum of the
    weights only after summing over micro-batches and devices. The backward pass recomputes each chunk's logits.
    """
    d = hidden.shape[-1]
    hidden, targets, weights = hidden.reshape(-1, d), targets.reshape(-1), weights.reshape(-1)
    tokens = hidden.shape[0]
    chunk = -(-tokens // -(-tokens // chunk))  # as many chunks as needed, of equal size: little padding
    padding = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, d)
    targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)
    weights = jnp.pad(weights, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def body(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, target, weight = part
        # The cast is inside the scan, so that the head's gradient is summed over the chunks in the head's own dtype.
        logits = jnp.einsum("td,vd->tv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - chosen)), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]
