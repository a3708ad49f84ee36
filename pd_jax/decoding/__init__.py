"""Answering: prompts become rows, a prefill runs them once, then every step adds one token to every branch."""

from pd_jax.decoding.answers import BranchResult, Columns, Event, Result
from pd_jax.decoding.decoder import ParallelDecoder
from pd_jax.decoding.prompts import Prompt
from pd_jax.decoding.sampling import Method, SamplingOptions, SamplingParams
from pd_jax.decoding.steps import BLOCK, Program, cache_bytes, decode_block, prefill, unstack

__all__ = [
    "BLOCK",
    "BranchResult",
    "Columns",
    "Event",
    "Method",
    "ParallelDecoder",
    "Program",
    "Prompt",
    "Result",
    "SamplingOptions",
    "SamplingParams",
    "cache_bytes",
    "decode_block",
    "prefill",
    "unstack",
]
