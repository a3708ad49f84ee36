"""Answering: prompts become rows, a prefill runs them once, then every step adds one token to every branch."""

from pd_jax.decoding.answers import BranchResult, Columns, Event, Result
from pd_jax.decoding.decoder import ParallelDecoder
from pd_jax.decoding.prompts import Prompt, make_prompt
from pd_jax.decoding.sampling import Method, SamplingParams
from pd_jax.decoding.steps import (
    BLOCK,
    Program,
    State,
    cache_bytes,
    decode_block,
    encode,
    feed,
    prefill,
    start,
    unstack,
)

__all__ = ["BLOCK", "BranchResult", "Columns", "Event", "Method", "ParallelDecoder", "Program", "Prompt", "Result"]
__all__ += ["SamplingParams", "State", "cache_bytes", "decode_block", "encode", "feed", "make_prompt", "prefill"]
__all__ += ["start", "unstack"]
