"""Machines: what they can do by their data sheets, and how much memory a piece of work takes of one. Imported
without jax."""

from pd_jax.machines.memory import PeakMemory
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet
from pd_jax.machines.timed import peak_flops

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "data_sheet", "peak_flops"]
