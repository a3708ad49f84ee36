"""Answering: prompts become rows, a prefill runs them once, then every step adds one token to every branch."""

from pd_jax.decoding.answers import BranchResult, Event, Result
from pd_jax.decoding.decoder import ParallelDecoder
from pd_jax.decoding.sampling import SamplingParams

__all__ = ["BranchResult", "Event", "ParallelDecoder", "Result", "SamplingParams"]
