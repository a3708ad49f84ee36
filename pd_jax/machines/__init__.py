"""Machines: what they can do by their data sheets, what memory a piece of work takes, disks. No jax when imported."""

from pd_jax.machines.disks import naming, write_whole
from pd_jax.machines.memory import PeakMemory, peak_bytes
from pd_jax.machines.peak import peak_flops
from pd_jax.machines.processes import on_tpu_vm, start_processes, stop_signal
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet
from pd_jax.machines.trace import Trace

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "Trace", "data_sheet", "naming", "on_tpu_vm"]
__all__ += ["peak_bytes", "peak_flops", "start_processes", "stop_signal", "write_whole"]
