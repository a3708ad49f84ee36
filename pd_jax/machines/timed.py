"""What a machine without a data sheet can do: a matrix product is timed on it. Imports jax when it is called."""

import math
import time

from pd_jax.machines.sheets import data_sheet


def peak_flops() -> tuple[float, str]:
    """FLOP/s of one device and where the figure is from: its data sheet, or where none is known a matrix product timed
    here and now in float32."""
    import jax
    import jax.numpy as jnp

    kind = jax.local_devices()[0].device_kind
    machine = data_sheet(kind)
    if machine is not None:
        return machine.flops, f"{machine.kind} data sheet"
    size = 1024
    product = jax.jit(jnp.dot)
    x = jnp.full((size, size), 1.0)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best, f"a {size} x {size} product timed on {kind}"
