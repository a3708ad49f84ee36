"""A profiler trace of some steps of a run: what the machine did in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pd_jax.errors import InputError


class Trace:
    """Writes a profiler trace of steps FIRST..LAST (`--profile FIRST:LAST`) for TensorBoard or Perfetto."""

    def __init__(self, wanted: str | None, directory: Path, say: Callable[[str], None]) -> None:
        self.directory, self.say, self.on = directory, say, False
        self.first, self.last = (0, 0) if wanted is None else self.parse(wanted)

    @staticmethod
    def parse(wanted: str) -> tuple[int, int]:
        first, colon, last = wanted.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise InputError(f"--profile {wanted}: give the first and the last step, as 10:12")
        return int(first), int(last)

    def before(self, step: int) -> None:
        if step == self.first:
            import jax

            jax.profiler.start_trace(str(self.directory))
            self.on = True

    def after(self, step: int, result: Any) -> None:
        if self.on and step >= self.last:
            import jax

            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.on = False
            self.say(f"the trace of steps {self.first} to {step} is in {self.directory}")
