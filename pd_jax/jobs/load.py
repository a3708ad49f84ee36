"""The decoder that the flags of a script name."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from pd_jax.config import Align, Visibility
from pd_jax.decoding import ParallelDecoder

log = logging.getLogger(__name__)


def load_decoder(
    model: Path,
    adapter: Path | None,
    *,
    dtype: Literal["auto", "float32", "bfloat16"],
    visibility: Visibility | None,
    align: Align | None,
    pair_indices: Sequence[int] | None,
    local_files_only: bool,
) -> ParallelDecoder:
    """`ParallelDecoder.from_pretrained`, with dtype "auto": float32 on a CPU, bfloat16 elsewhere. Says so in one line
    when it shows siblings to a model that has never seen columns."""
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    decoder = ParallelDecoder.from_pretrained(
        model,
        adapter,
        dtype=default if dtype == "auto" else dtype,
        visibility=visibility,
        align=align,
        pair_indices=pair_indices,
        local_files_only=local_files_only,
    )
    if decoder.config.visibility is None and decoder.visibility != "isolated":
        log.warning(
            "%s has no column settings: it has never learned to tell branches apart (--visibility isolated --align "
            "ragged answers as without siblings, finetune.py teaches it)", adapter or model,
        )  # fmt: skip
    return decoder
