"""Prompts on rows: samples of token ids become the arrays that a prefill takes, rounded up to buckets."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pd_jax.columns import Coordinates
from pd_jax.config import MIX, Align, RowVisibility, Visibility
from pd_jax.errors import InputError, check_whole
from pd_jax.layout import Branch, TokenSample, answer_columns, bucket, build_layout

SMALLEST_ROW = 32  # tokens; the smallest bucket of a prefill


class Prompt(NamedTuple):
    """S rows with n branches each, n and T rounded up to buckets."""

    tokens: Any  # int32 [S, T]
    coordinates: Coordinates  # [S, T]
    last: Any  # int32 [S, n], the place of the branch's last token in its row
    first: Any  # int32 [S, n], the column after that
    forced: Any  # int32 [S, n, W], prompt tokens fed column by column because a sibling already answers there
    forced_count: Any  # int32 [S, n], their number
    limit: Any  # int32 [S, n], the most tokens to come, forced and answered; 0 where there is no branch
    stream: Any  # uint32 [S, n], beside the seed, what random numbers depend on


def branch_limits(samples: Sequence[TokenSample], asked: int | Sequence[Sequence[int]]) -> list[list[int]]:
    """max_new_tokens of every branch."""
    counts = [len(sample.branches) for sample in samples]
    nested = asked if isinstance(asked, Sequence | np.ndarray) else [[asked] * n for n in counts]
    rows = [row if isinstance(row, Sequence | np.ndarray) else [row] for row in nested]
    limits = [[check_whole(limit, "max_new_tokens", "a whole number, 1 or more") for limit in row] for row in rows]
    if [len(row) for row in limits] != counts:
        raise InputError(
            f"max_new_tokens is for {[len(row) for row in limits]} branches, the samples have {counts}; "
            "pass one number, or one per branch of every sample"
        )
    wrong = [limit for row in limits for limit in row if not 1 <= limit < 2**30]
    if wrong:
        raise InputError(f"max_new_tokens is {wrong[0]}; it must be 1 or more, and fit into max_position_embeddings")
    return limits


def make_prompt(
    samples: Sequence[TokenSample], limits: Sequence[Sequence[int]], align: Align, visibility: Visibility
) -> Prompt:
    """Rows, rounded up to buckets in every axis: rows without tokens and branches without tokens are never seen.

    `visibility` is that of the samples that have none of their own.
    """
    s, n = bucket(len(samples)), bucket(max(len(sample.branches) for sample in samples))
    rows: list[list[TokenSample]] = [[] for _ in range(s)]
    forced: dict[tuple[int, int], Sequence[int]] = {}
    stream = np.zeros((s, n), np.uint32)
    for r, sample in enumerate(samples):
        # A prompt cannot be prefilled where it reaches into columns in which a sibling that it sees answers already.
        cut = align == "ragged" and (sample.visibility or visibility) == "columns"
        shortest = min(len(branch.prompt) for branch in sample.branches) if cut else None
        prompts = [Branch(branch.prompt[:shortest]) for branch in sample.branches]
        rows[r] = [TokenSample(sample.background, prompts, sample.visibility or visibility)]
        if cut:
            forced |= {(r, b): branch.prompt[shortest:] for b, branch in enumerate(sample.branches)}
        background = _crc(sample.background)  # nothing of the siblings, the batch or its order
        stream[r, : len(prompts)] = [_crc((background, _crc(x.prompt), b)) for b, x in enumerate(sample.branches)]
    layout = build_layout(rows, bucket(max(len(row[0]) for row in rows if row), SMALLEST_ROW), align)
    last, first, forced_count, limit = (np.zeros((s, n), np.int32) for _ in range(4))
    for r, row in enumerate(rows[: len(samples)]):
        place = np.flatnonzero(layout.branch[r])
        np.maximum.at(last[r], layout.branch[r, place] - 1, place)
        first[r, : len(limits[r])] = answer_columns(row[0], align)
        limit[r, : len(limits[r])] = limits[r]
    longest = max(map(len, forced.values()), default=0)
    tokens = np.zeros((s, n, bucket(longest, SMALLEST_ROW) if longest else 0), np.int32)
    for place, ids in forced.items():
        tokens[place][: len(ids)] = ids
        forced_count[place] = len(ids)
    coordinates = Coordinates.of(layout, row_visibility(samples, visibility))
    return Prompt(layout.tokens, coordinates, last, first, tokens, forced_count, limit + forced_count, stream)


def row_visibility(samples: Sequence[TokenSample], visibility: Visibility) -> RowVisibility:
    """The visibility of rows that hold these samples: that of all, or "mix" where they differ."""
    own = {sample.visibility or visibility for sample in samples}
    return own.pop() if len(own) == 1 else MIX


def _crc(ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(ids, np.uint32).tobytes())
