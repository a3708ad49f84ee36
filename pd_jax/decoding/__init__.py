"""Answering: prompts become rows, a prefill runs them once, then every step adds one token to every branch."""

from pd_jax.data.answers import BranchResult, Columns, Event, Result
from pd_jax.decoding.decoder import ParallelDecoder
from pd_jax.decoding.prompts import Prompt, make_prompt
from pd_jax.decoding.sampling import Method, SamplingParams
from pd_jax.decoding.session import Session
from pd_jax.decoding.steps import (
    BLOCK,
    Cache,
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

__all__ = ["BLOCK", "BranchResult", "Cache", "Columns", "Event", "Method", "ParallelDecoder", "Program", "Prompt"]
__all__ += ["Result", "SamplingParams", "Session", "State", "cache_bytes", "decode_block", "encode", "feed"]
__all__ += ["make_prompt", "prefill", "start", "unstack"]
