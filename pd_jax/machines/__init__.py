"""Machines: what they can do by their data sheets, and how much memory a piece of work takes of one. No jax."""

from pd_jax.machines.memory import PeakMemory
from pd_jax.machines.sheets import GIB, MACHINES, Machine, data_sheet

__all__ = ["GIB", "MACHINES", "Machine", "PeakMemory", "data_sheet"]
