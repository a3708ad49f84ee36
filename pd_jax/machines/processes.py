"""Start-up of several processes, on one machine or on many."""

import os
from importlib.util import find_spec
from pathlib import Path

from pd_jax.errors import InputError


def start_processes(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes, if there are any: as the arguments say, or as found out on a TPU pod or under SLURM.

    Must come before anything else of jax. Raises `InputError` when only some of the three are given.
    """
    import jax

    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        if None in given:
            raise InputError(
                f"--coordinator-address {given[0]} --num-processes {given[1]} --process-id {given[2]}: give all three"
            )
        if not jax.distributed.is_initialized():
            jax.distributed.initialize(*given)
        return
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1
    if (slurm or on_tpu_vm()) and not jax.distributed.is_initialized():
        jax.distributed.initialize()  # a TPU VM asks Google's metadata server or TPU_WORKER_HOSTNAMES for its slice


def on_tpu_vm(devices: Path = Path("/dev")) -> bool:
    """Whether this host has TPU chips and their runtime. To ask jax would start it, too early for other processes."""
    chips = any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
    return chips and find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
