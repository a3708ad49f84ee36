"""Evaluation: ways of answering the same questions side by side, their scores with intervals, and what they cost.

The flags can be had without jax; everything else is imported with its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pd_jax.evaluation.flags import EvaluateFlags
from pd_jax.evaluation.results import Results

if TYPE_CHECKING:
    from pd_jax.evaluation.pictures import draw_layout, draw_losses, draw_mask, draw_rope
    from pd_jax.evaluation.report import FOOTNOTE, tables
    from pd_jax.evaluation.run import evaluate

__all__ = [
    "FOOTNOTE",
    "EvaluateFlags",
    "Results",
    "draw_layout",
    "draw_losses",
    "draw_mask",
    "draw_rope",
    "evaluate",
    "tables",
]

_FILES = {"FOOTNOTE": "report", "evaluate": "run", "tables": "report"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, 'pictures')}"), name)
