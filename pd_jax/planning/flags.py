"""The flags of scripts/plan.py."""

from dataclasses import dataclass

from pd_jax.cli import flag
from pd_jax.config import Backend, Remat


@dataclass(frozen=True)
class PlanFlags:
    """scripts/plan.py"""

    model: str = flag("Qwen/Qwen3-4B", "hub id of a known model (no download), or a directory with config.json")
    topology: str = flag("v5e:4x4", "machine, like v5e:4x4, v5p:2x2x1 or h100:8; it need not exist")
    mesh: tuple[int, ...] = flag((1, -1, 1), "devices along data, fsdp and tensor; -1 takes the rest")
    batch_size: int = flag(16, "rows of a micro-batch, over all devices", minimum=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches an optimiser step", minimum=1)
    branch_count: int = flag(16, "branches a row", minimum=1)
    seq_length: int = flag(256, "tokens a branch", minimum=2)
    use_lora: bool = flag(False, "train low-rank adapters only")
    lora_r: int = flag(16, "rank", minimum=1)
    remat: Remat = flag("full", "what the backward pass recomputes")
    attention: Backend = flag("auto", "attention backend")
