"""The signals that stop a run, and how several processes agree to stop."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


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
        if jax.process_count() == 1:
            return self.name is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None


@contextmanager
def stop_signal() -> Generator[StopSignal]:
    stop = StopSignal()
    numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
