"""How several processes start, on one machine or on many, and how a signal stops them all at one step."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


class StopSignal:
    """Whether SIGTERM or SIGINT has asked the run to stop; a second signal stops at once.

    With several processes jax agrees on the step at which all of them stop (its own handler takes the SIGTERM).
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def hit(self, step: int) -> bool:
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None


@contextmanager
def stop_signal() -> Generator[StopSignal]:
    import jax

    stop = StopSignal()
    numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
