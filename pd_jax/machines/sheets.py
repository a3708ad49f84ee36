"""What accelerators can do, from their vendors' data sheets: the one place for such figures; and the CPU's name."""

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One device. Figures that nothing here needs are 0."""

    kind: str  # what jax's `device_kind` contains
    flops: float  # dense bfloat16 matrix products, FLOP/s
    memory: float = 0  # bytes
    bandwidth: float = 0  # of the memory, bytes/s
    link: float = 0  # what one device sends to the others of its slice or node, bytes/s


MACHINES = {
    "a100": Machine("A100", 312e12),
    "h100": Machine("H100", 989e12, 84978434048, 3352e9, 450e9),
    "h200": Machine("H200", 989e12),
    "gh200": Machine("GH200", 989e12),
    "b200": Machine("B200", 2250e12),
    "gb200": Machine("GB200", 2500e12),
    "v4": Machine("TPU v4", 275e12),
    "v5e": Machine("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Machine("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Machine("TPU v6 lite", 918e12, 32 * GIB, 1640e9, 448e9),
}


def data_sheet(device_kind: str) -> Machine | None:
    """The machine that a jax `device_kind` names; the longest matching name counts. None for what is not known."""
    known = [machine for machine in MACHINES.values() if machine.kind in device_kind]
    return max(known, key=lambda machine: len(machine.kind), default=None)


def cpu_name() -> str:
    """What Linux calls the CPU; "" where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
