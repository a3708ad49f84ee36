"""Machines: what they can do by their data sheets, and how much memory a piece of work takes. No jax when imported."""

from pd_jax.machines.memory import PeakMemory, peak_bytes
from pd_jax.machines.peak import peak_flops
from pd_jax.machines.processes import on_tpu_vm, start_processes, stop_signal
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet
from pd_jax.machines.trace import Trace

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "Trace", "data_sheet", "on_tpu_vm", "peak_bytes"]
__all__ += ["peak_flops", "start_processes", "stop_signal"]
