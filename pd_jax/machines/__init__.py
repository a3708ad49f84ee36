"""Machines: what they can do by their data sheets, and how much memory a piece of work takes. No jax when imported."""

from pd_jax.machines.memory import PeakMemory
from pd_jax.machines.peak import peak_flops
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "data_sheet", "peak_flops"]
