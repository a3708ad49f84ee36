"""Every test runs on the CPU (8 virtual devices, float32) and offline, whatever the machine has.

Nearly all of the suite's time is compilation, so what is compiled is optimised less, and random weights come from a
generator that compiles fast; what must not depend on the generator names its own.
"""

import os
import runpy
import sys
from pathlib import Path

import pytest

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    JAX_DEFAULT_PRNG_IMPL="rbg",
    XLA_FLAGS="--xla_backend_optimization_level=0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)


@pytest.fixture
def command(monkeypatch):
    """A script of ours as a user runs it, with some arguments; its exit code."""

    def run(script: str, *arguments) -> int:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "scripts" / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run
