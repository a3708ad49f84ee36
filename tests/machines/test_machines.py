"""Data sheets are found by what JAX calls a device; a block's peak of memory is told from what was held before."""

from pathlib import Path

import pytest

from pd_jax.machines import MACHINES, PeakMemory, data_sheet


def test_the_longest_name_counts():
    assert data_sheet("TPU v5 lite") is MACHINES["v5e"]
    assert data_sheet("NVIDIA GH200 480GB") is MACHINES["gh200"]
    assert data_sheet("cpu") is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says it")
def test_peak_memory_of_a_block():
    size = 64 << 20
    held = bytearray(size)
    with PeakMemory() as memory:
        more = bytearray(size)
        del more
    assert memory.peak is not None
    assert memory.beyond is not None
    assert size * 0.9 < memory.beyond < size * 1.5
    assert memory.peak > memory.beyond + len(held)
    with PeakMemory() as nothing:
        pass
    assert nothing.beyond is not None
    assert nothing.beyond < size / 4  # an earlier peak is forgotten
