"""Prompts on rows: samples of token ids become the arrays that a prefill takes, rounded up to buckets."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pd_jax.columns import Coordinates
from pd_jax.config import MIX, Align, RowVisibility, Visibility
from pd_jax.errors import InputError, check_whole
from pd_jax.layout import Branch, TokenSample, bucket, build_layout, members, place_texts

SMALLEST_ROW = 32  # tokens; the smallest bucket of a prefill


class Prompt(NamedTuple):
    """S rows with n branches each, n and T rounded up to buckets."""

    tokens: Any  # int32 [S, T]
    coordinates: Coordinates  # [S, T]
    branch: Any  # int32 [S, n], the branches' numbers; 0 for a join
    last: Any  # int32 [S, n], the place of the branch's last token in its row
    first: Any  # int32 [S, n], the column after that
    forced: Any  # int32 [S, n, W], prompt tokens fed column by column because a sibling already answers there
    forced_count: Any  # int32 [S, n], their number
    limit: Any  # int32 [S, n], the most tokens to come, forced and answered; 0 where there is no branch
    stream: Any  # uint32 [S, n], beside the seed, what random numbers depend on


def branch_limits(
    samples: Sequence[TokenSample], asked: int | Sequence[Sequence[int]], least: int = 1
) -> list[list[int]]:
    """max_new_tokens of every branch of the last turns, each `least` or more."""
    counts = [len(members(sample.turns[-1])) for sample in samples]
    nested = asked if isinstance(asked, Sequence | np.ndarray) else [[asked] * n for n in counts]
    rows = [row if isinstance(row, Sequence | np.ndarray) else [row] for row in nested]
    limits = [
        [check_whole(limit, "max_new_tokens", f"a whole number, {least} or more") for limit in row] for row in rows
    ]
    if [len(row) for row in limits] != counts:
        raise InputError(
            f"max_new_tokens is for {[len(row) for row in limits]} branches, the samples have {counts}; "
            "pass one number, or one per branch of every sample"
        )
    wrong = [limit for row in limits for limit in row if not least <= limit < 2**30]
    if wrong:
        raise InputError(
            f"max_new_tokens is {wrong[0]}; it must be {least} or more, and fit into max_position_embeddings"
        )
    return limits


def make_prompt(
    samples: Sequence[TokenSample], limits: Sequence[Sequence[int]], align: Align, visibility: Visibility
) -> Prompt:
    """Rows that ask for the last turn of every sample, rounded up to buckets in every axis: rows without tokens and
    branches without tokens are never seen.

    `visibility` is that of the samples that have none of their own.
    """
    turns = [members(sample.turns[-1]) for sample in samples]
    s, n = bucket(len(samples)), bucket(max(map(len, turns)))
    rows: list[list[TokenSample]] = [[] for _ in range(s)]
    forced: dict[tuple[int, int], Sequence[int]] = {}
    stream = np.zeros((s, n), np.uint32)
    first, forced_count, limit, last = (np.zeros((s, n), np.int32) for _ in range(4))
    branch = np.tile(np.arange(1, n + 1, dtype=np.int32), (s, 1))
    for r, (sample, turn) in enumerate(zip(samples, turns, strict=True)):
        row = replace(sample, visibility=sample.visibility or visibility)
        # A prompt cannot be prefilled where it reaches into columns in which a sibling that it sees answers already.
        if align == "ragged" and row.visibility == "columns" and len(turn) > 1:
            shortest = min(len(text.prompt) for text in turn)
            forced |= {(r, b): text.prompt[shortest:] for b, text in enumerate(turn)}
            cut = [Branch(text.prompt[:shortest]) for text in turn]
            row = replace(row, later=[*row.later[:-1], cut]) if row.later else replace(row, branches=cut)
        rows[r] = [row]
        places = place_texts(row, align)[-1]
        branch[r] += places[0].branch - 1
        first[r, : len(turn)] = [place.answer for place in places]
        limit[r, : len(turn)] = limits[r]
        # Nothing of the siblings, the batch or its order. A join's draws depend on how many turns are before it.
        background, turned = _crc(sample.background), branch[r] - 1 if branch[r, 0] else [len(sample.later) << 16]
        stream[r, : len(turn)] = [_crc((background, _crc(x.prompt), b)) for b, x in zip(turned, turn, strict=False)]
    layout = build_layout(rows, bucket(max(len(row[0]) for row in rows if row), SMALLEST_ROW), align)
    for r, numbers in enumerate(branch):
        here = np.where(layout.valid[r], layout.branch[r], -1)
        last[r] = [np.flatnonzero(here == number).max(initial=0) for number in numbers]
    longest = max(map(len, forced.values()), default=0)
    tokens = np.zeros((s, n, bucket(longest, SMALLEST_ROW) if longest else 0), np.int32)
    for place, ids in forced.items():
        tokens[place][: len(ids)] = ids
        forced_count[place] = len(ids)
    coordinates = Coordinates.of(layout, row_visibility(samples, visibility))
    return Prompt(layout.tokens, coordinates, branch, last, first, tokens, forced_count, limit + forced_count, stream)


def row_visibility(samples: Sequence[TokenSample], visibility: Visibility) -> RowVisibility:
    """The visibility of rows that hold these samples: that of all, or "mix" where they differ."""
    own = {sample.visibility or visibility for sample in samples}
    return own.pop() if len(own) == 1 else MIX


def _crc(ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(ids, np.uint32).tobytes())
