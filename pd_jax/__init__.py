"""Columnar parallel decoding in JAX: many branches of one shared text at once, one column at a time.

The public API; what needs jax is imported with its first use, so that `--help` does not wait for it.
"""

from typing import TYPE_CHECKING, Any

from pd_jax.layout import Branch, Layout, Sample, TokenSample

if TYPE_CHECKING:
    from pd_jax.decoding import BranchResult, Event, ParallelDecoder, Result, SamplingParams, Session

__version__ = "0.2.0"
__all__ = ["Branch", "Layout", "Sample", "TokenSample"]
__all__ += ["BranchResult", "Event", "ParallelDecoder", "Result", "SamplingParams", "Session"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pd_jax import decoding

        return getattr(decoding, name)
    raise AttributeError(f"module 'pd_jax' has no attribute {name!r}")
