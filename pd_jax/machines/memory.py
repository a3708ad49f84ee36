"""How much memory a piece of work takes."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal


class PeakMemory:
    """The most memory that is held at once while a `with` block runs. Known when the block has ended.

    counts: "process", its resident memory, known on Linux; "jax", JAX's first accelerator, whose peak is that of the
    whole process, because JAX cannot start it anew; "torch", torch's accelerator.
    """

    peak: int | None = None  # bytes; None: the system does not say
    beyond: int | None = None  # bytes, of them those that were not held when the block began

    def __init__(self, counts: Literal["process", "jax", "torch"] = "process") -> None:
        self._counts = counts

    def __enter__(self) -> "PeakMemory":
        if self._counts == "process":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        elif self._counts == "torch":
            sys.modules["torch"].cuda.reset_peak_memory_stats()
        self._before = self._held()[0]
        return self

    def __exit__(self, *_: Any) -> None:
        self.peak = self._held()[1]
        if self.peak is not None and self._before is not None:
            self.beyond = max(self.peak - self._before, 0)

    def _held(self) -> tuple[int | None, int | None]:
        """Bytes held now, and at the most."""
        if self._counts == "torch":
            cuda = sys.modules["torch"].cuda
            return cuda.memory_allocated(), cuda.max_memory_allocated()
        if self._counts == "jax":
            memory = sys.modules["jax"].local_devices()[0].memory_stats() or {}
            return memory.get("bytes_in_use"), memory.get("peak_bytes_in_use")
        with suppress(OSError, KeyError):
            lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
            kibibytes = {words[0]: int(words[1]) for words in lines if words and words[0] in ("VmRSS:", "VmHWM:")}
            return kibibytes["VmRSS:"] * 1024, kibibytes["VmHWM:"] * 1024
        return None, None


def peak_bytes(memory: Any) -> int:
    """All that is alive at once, by the compiler's account: what comes in, what goes out, and what is between."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes
