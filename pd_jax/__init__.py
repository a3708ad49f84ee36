"""Columnar parallel decoding for Qwen3 in JAX.

The public API is three names; they are imported lazily so that `--help` does not wait for jax.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pd_jax.decode import ParallelDecoder, SamplingParams
    from pd_jax.layout import Sample

__all__ = ["ParallelDecoder", "Sample", "SamplingParams"]


def __getattr__(name: str):
    if name == "Sample":
        from pd_jax.layout import Sample

        return Sample
    if name in __all__:
        from pd_jax import decode

        return getattr(decode, name)
    raise AttributeError(f"module 'pd_jax' has no attribute {name!r}")
