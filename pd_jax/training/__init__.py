"""Training: two stages, pretraining and finetuning, over one step and one loop. Flags stop at the stages.

The flags can be had without jax; the stages import it with their first use.
"""

from typing import TYPE_CHECKING, Any

from pd_jax.training.flags import FinetuneFlags, PretrainFlags, TrainFlags

if TYPE_CHECKING:
    from pd_jax.training.loop import abstract_state
    from pd_jax.training.stages import finetune, finished, pretrain
    from pd_jax.training.step import Optimisation, State, StepSettings, make_optimizer, make_step

__all__ = ["FinetuneFlags", "PretrainFlags", "TrainFlags", "finetune", "finished", "pretrain"]
__all__ += ["Optimisation", "State", "StepSettings", "abstract_state", "make_optimizer", "make_step"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pd_jax.training import loop, stages, step

        return next(getattr(module, name) for module in (stages, loop, step) if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
