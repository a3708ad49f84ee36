"""Evaluation: ways of answering the same questions side by side, their scores with intervals, and what they cost.

The flags can be had without jax; `evaluate` imports it with its first use.
"""

from typing import TYPE_CHECKING, Any

from pd_jax.evaluation.flags import EvaluateFlags

if TYPE_CHECKING:
    from pd_jax.evaluation.run import evaluate

__all__ = ["EvaluateFlags", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pd_jax.evaluation import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
