"""Machines: what they can do by their data sheets and as measured, what memory a piece of work takes, disks.

No jax when imported.
"""

from pd_jax.machines.disks import naming, write_whole
from pd_jax.machines.measured import measured, report_path, wrong_backends
from pd_jax.machines.memory import PeakMemory, peak_bytes
from pd_jax.machines.peak import least_seconds, matrix_flops, memory_bandwidth, peak_flops
from pd_jax.machines.processes import on_tpu_vm, start_processes, stop_signal
from pd_jax.machines.sheets import GIB, MACHINES, Machine, cpu_name, data_sheet
from pd_jax.machines.trace import Trace

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "Trace", "cpu_name", "data_sheet", "least_seconds"]
__all__ += [
    "matrix_flops",
    "measured",
    "memory_bandwidth",
    "naming",
    "on_tpu_vm",
    "peak_bytes",
    "peak_flops",
    "report_path",
]
__all__ += ["start_processes", "stop_signal", "write_whole", "wrong_backends"]
