"""Answering: prompts become rows, a prefill runs them once, then every step adds one token to every branch."""

from pd_jax.decoding.answers import BranchResult as BranchResult, Columns as Columns, Event as Event, Result as Result
from pd_jax.decoding.decoder import ParallelDecoder as ParallelDecoder
from pd_jax.decoding.prompts import Prompt as Prompt
from pd_jax.decoding.sampling import Method as Method, SamplingParams as SamplingParams
from pd_jax.decoding.steps import (
    BLOCK as BLOCK,
    Program as Program,
    State as State,
    cache_bytes as cache_bytes,
    decode_block as decode_block,
    encode as encode,
    prefill as prefill,
    unstack as unstack,
)
