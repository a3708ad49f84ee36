"""What one device of this machine can do at most, timed here: the yardstick of training and of decoding."""

import math
import time
from collections.abc import Callable
from typing import Any

from pd_jax.machines.sheets import data_sheet


def least_seconds(call: Callable[[], Any], repeat: int = 10, queue: int = 1, cpu_time: bool = False) -> float:
    """The least time of one of `repeat` calls of a compiled function, after one that does not count.

    queue: so many are sent to the device before the first is waited for, so that a short one does not measure the way
    there. cpu_time: the time of this process counts, not that of the clock.
    """
    import jax

    clock, best = time.process_time if cpu_time else time.perf_counter, math.inf
    jax.block_until_ready(call())
    for _ in range(repeat):
        began = clock()
        jax.block_until_ready([call() for _ in range(queue)])
        best = min(best, (clock() - began) / queue)
    return best


def matrix_flops(size: int = 1024, dtype: str = "float32", cpu_time: bool = False) -> float:
    """FLOP/s of the product of two square matrices."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.full((size, size), 1.0, dtype), jax.jit(jnp.dot)
    return 2 * size**3 / least_seconds(lambda: product(x, x), 10, _queue(), cpu_time)


def memory_bandwidth(size: int = 256 << 20, cpu_time: bool = False) -> float:
    """Bytes a second that a float32 matrix of `size` bytes is read with: multiplied with a vector as a layer's weights
    are, or summed; the faster of the two."""
    import jax
    import jax.numpy as jnp

    width = 8192
    matrix, vector = jnp.ones((size // (4 * width), width), jnp.float32), jnp.ones((1, width), jnp.float32)
    product, total = jax.jit(lambda matrix, vector: jnp.einsum("ni,oi->no", vector, matrix)), jax.jit(jnp.sum)
    calls = (lambda: product(matrix, vector), lambda: total(matrix))
    return matrix.nbytes / min(least_seconds(call, 5, _queue(), cpu_time) for call in calls)


def _queue() -> int:
    """A CPU would run queued calls at once."""
    import jax

    return 1 if jax.default_backend() == "cpu" else 10


def peak_flops(cpu_time: bool = False) -> tuple[float, str]:
    """FLOP/s of one device and where the figure is from: its data sheet, or where none is known a matrix product timed
    here and now in float32 (by this process's time with `cpu_time`)."""
    import jax

    kind = jax.local_devices()[0].device_kind
    machine = data_sheet(kind)
    if machine is not None:
        return machine.flops, f"{machine.kind} data sheet"
    return matrix_flops(cpu_time=cpu_time), f"a 1024 x 1024 product timed on {kind}"
