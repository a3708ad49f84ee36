"""Machines: what they can do by their data sheets and as measured, and how much memory a piece of work takes.

No jax when imported.
"""

from pd_jax.machines.measured import measured, report_path, wrong_backends
from pd_jax.machines.memory import PeakMemory, peak_bytes
from pd_jax.machines.peak import least_seconds, matrix_flops, memory_bandwidth, peak_flops
from pd_jax.machines.processes import on_tpu_vm, start_processes, stop_signal
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet
from pd_jax.machines.trace import Trace

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "Trace", "data_sheet", "least_seconds", "matrix_flops"]
__all__ += ["measured", "memory_bandwidth", "on_tpu_vm", "peak_bytes", "peak_flops", "report_path", "start_processes"]
__all__ += ["stop_signal", "wrong_backends"]
