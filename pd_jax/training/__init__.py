"""Training: two stages, pretraining and finetuning, over one step and one loop. Flags stop at the stages.

The flags can be had without jax; the stages import it with their first use.
"""

from typing import TYPE_CHECKING, Any

from pd_jax.training.flags import FinetuneFlags, PretrainFlags, TrainFlags

if TYPE_CHECKING:
    from pd_jax.training.stages import finetune, pretrain

__all__ = ["FinetuneFlags", "PretrainFlags", "TrainFlags", "finetune", "pretrain"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pd_jax.training import stages

        return getattr(stages, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
