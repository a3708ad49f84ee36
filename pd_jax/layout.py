"""Layouts: samples become rows of tokens with coordinates, targets and weights. numpy only.

A token's coordinate is `(branch, column)`. The background is branch 0 at columns `0..N-1`; branches are `1..B`. Prompts
take the block of columns `[N, N+P)`, P the longest prompt; answers start together at column `N+P`. A background of 8
tokens with questions of 4, 3 and 2 tokens, `align="left"`:

    column    0..7     8                    9                    10              11      12
    holds     B0..B7   Q1[0] Q2[0] Q3[0]    Q1[1] Q2[1] Q3[1]    Q1[2] Q2[2]     Q1[3]   the first answer tokens

A row holds one sample or several (`segment` tells them apart); inside a sample tokens stand in column-major order, that
is sorted by `(column, branch)`.

An end-of-sequence token is a target and never an input: a branch that has ended adds nothing that others can see, in
training exactly as in decoding.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import numpy as np

from pd_jax.config import VISIBILITIES, Align, Visibility, check_choice
from pd_jax.errors import InputError, check_text

Objective = Literal["answers", "all"]
CALL = 'Sample("the text that all share", ["a prompt", "another"])'


@dataclass(frozen=True)
class Sample:
    """A shared background and the prompts that unfold after it, as text.

    chat_markup: control tokens that the texts spell (`<|im_start|>`) are meant; else they are text like any other.
    """

    background: str
    branches: Sequence[str]
    visibility: Visibility | None = None  # None: that of the decoder
    chat_markup: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.branches, str):
            raise InputError(f"branches is one string, {self.branches!r}; pass a list of prompts")
        if not isinstance(self.branches, Sequence) or not self.branches:
            raise InputError(f"a sample has no branches, {self.branches!r}; give at least one prompt, as {CALL}")
        for name, text in (("background", self.background), *((f"prompt {i}", t) for i, t in enumerate(self.branches))):
            check_text(text, f"as {CALL} wants it, {name}")
        check_choice("visibility", self.visibility or "columns", Visibility)
        empty = [i for i, text in enumerate(self.branches) if not text.strip()]
        if empty:
            raise InputError(f"prompts {empty} of {len(self.branches)} are empty; every branch needs a prompt")


@dataclass(frozen=True)
class Branch:
    """One branch as token ids. `end` is the token that closes the answer (a target only); None: the text goes on."""

    prompt: Sequence[int]
    answer: Sequence[int] = ()
    end: int | None = None


@dataclass(frozen=True)
class TokenSample:
    """A background and its branches as token ids."""

    background: Sequence[int]
    branches: Sequence[Branch]
    visibility: Visibility | None = None  # None: that of the rows it is laid out in, of the decoder or of the training

    @property
    def prompt_columns(self) -> int:
        """P, the number of columns of the block of prompts."""
        return max((len(b.prompt) for b in self.branches), default=0)

    def __len__(self) -> int:
        return len(self.background) + sum(len(b.prompt) + len(b.answer) for b in self.branches)


@dataclass(frozen=True)
class Layout:
    """Rows of laid-out tokens: every array is [S rows, T tokens].

    Fields can be read as attributes or by key.
    """

    tokens: np.ndarray  # int32
    branch: np.ndarray  # int32; 0 is the background
    column: np.ndarray  # int32
    segment: np.ndarray  # int32, the sample's number in its row; -1 for PAD
    valid: np.ndarray  # bool; False for PAD
    prompt: np.ndarray  # bool; part of a branch's prompt
    visibility: np.ndarray = field(
        repr=False
    )  # int32, the place of the sample's own in `config.VISIBILITIES`; -1: none
    targets: np.ndarray = field(repr=False)  # int32, the next token of the same branch
    weights: np.ndarray = field(repr=False)  # float32, the target's share in the loss

    def __getitem__(self, name: str) -> np.ndarray:
        return getattr(self, name)

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


class _Tokens(NamedTuple):
    """One sample's tokens before padding, each [n]; the fields of `Layout` without segment, valid and visibility."""

    tokens: np.ndarray
    branch: np.ndarray
    column: np.ndarray
    prompt: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def answer_columns(sample: TokenSample, align: Align = "left") -> np.ndarray:
    """The column of every branch's first answer token, int32 [B]."""
    n = len(sample.background)
    if align == "ragged":
        return np.array([n + len(b.prompt) for b in sample.branches], np.int32)
    return np.full(len(sample.branches), n + sample.prompt_columns, np.int32)


def _branch_arrays(number: int, first: int, prompt: int, ids: Sequence[int], end: int | None, gap: int) -> _Tokens:
    """A run of tokens of one branch: `prompt` prompt tokens from column `first`, the rest `gap` columns later."""
    tokens = np.asarray(ids, np.int32)
    n = len(tokens)
    index = np.arange(n)
    after = np.append(tokens[1:], -1 if end is None else end).astype(np.int32)[:n]
    return _Tokens(
        tokens=tokens,
        branch=np.full(n, number, np.int32),
        column=(first + index + gap * (index >= prompt)).astype(np.int32),
        prompt=index < prompt,
        targets=np.maximum(after, 0),
        weights=(after >= 0).astype(np.float32),
    )


def _sample_row(sample: TokenSample, align: Align, objective: Objective) -> _Tokens:
    """All tokens of one sample in column-major order."""
    n, width = len(sample.background), sample.prompt_columns
    parts = [_branch_arrays(0, 0, 0, sample.background, None, 0)]
    for number, branch in enumerate(sample.branches, start=1):
        length = len(branch.prompt)
        slack = 0 if align == "ragged" else width - length
        first = n + slack if align == "right" else n
        gap = slack if align == "left" else 0
        parts.append(_branch_arrays(number, first, length, [*branch.prompt, *branch.answer], branch.end, gap))
    row = _Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if objective == "answers":
        # A weight belongs to a token's target: the last prompt token carries the branch's first answer token.
        asked = np.concatenate(
            [np.zeros(n, bool)]
            + [np.arange(len(b.prompt) + len(b.answer)) >= len(b.prompt) - 1 for b in sample.branches]
        )
        row = row._replace(weights=row.weights * asked)
    order = np.lexsort((row.branch, row.column))
    return _Tokens(*(array[order] for array in row))


def build_layout(
    rows: Sequence[Sequence[TokenSample]],
    length: int | None = None,
    align: Align = "left",
    objective: Objective = "answers",
    pad_id: int = 0,
) -> Layout:
    """Lay out `rows`, each a list of samples packed one after the other, padded to `length` (default: the longest).

    `objective` says which targets count: "answers" (answer tokens and their end) or "all" (every token that has a
    successor in its branch). Raises `InputError` for an unknown `align` and for a row that does not fit.
    """
    check_choice("align", align, Align)
    sizes = [sum(map(len, row)) for row in rows]
    length = max(sizes, default=0) if length is None else length
    if max(sizes, default=0) > length:
        raise InputError(f"a row of {max(sizes)} tokens does not fit in {length}; raise the length or use fit()")
    shape = (len(rows), length)
    out = Layout(
        tokens=np.full(shape, pad_id, np.int32),
        branch=np.zeros(shape, np.int32),
        column=np.zeros(shape, np.int32),
        segment=np.full(shape, -1, np.int32),
        valid=np.zeros(shape, bool),
        prompt=np.zeros(shape, bool),
        visibility=np.full(shape, -1, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
    )
    for r, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            stop = start + len(sample)
            for name, array in _sample_row(sample, align, objective)._asdict().items():
                out[name][r, start:stop] = array
            out.segment[r, start:stop] = segment
            if sample.visibility is not None:
                out.visibility[r, start:stop] = VISIBILITIES.index(sample.visibility)
            out.valid[r, start:stop] = True
            start = stop
    return out


def unanswered(sample: TokenSample) -> TokenSample:
    """The prompts alone, as decoding takes them."""
    return replace(sample, branches=[Branch(branch.prompt) for branch in sample.branches])


def fit(sample: TokenSample, length: int) -> TokenSample | None:
    """`sample` within `length` tokens: the end of the background is cut first; None when even that is not enough.

    A prompt or an answer is never cut.
    """
    excess = len(sample) - length
    if excess <= 0:
        return sample
    if excess > len(sample.background):
        return None
    return replace(sample, background=sample.background[: len(sample.background) - excess])


def pack(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """First-fit packing in the given order: lists of indices whose lengths sum to at most `capacity`.

    Raises `InputError` for a length above `capacity`.
    """
    lengths = list(lengths)
    if max(lengths, default=0) > capacity:
        raise InputError(f"a length of {max(lengths)} does not fit in {capacity}; raise it or use fit()")
    bins: list[list[int]] = []
    room = np.full(len(lengths), capacity)
    for index, size in enumerate(lengths):
        place = int(np.argmax(room[: len(bins) + 1] >= size))  # the first bin with room; the last one is still empty
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
        room[place] -= size
    return bins


def bucket(size: int, smallest: int = 1) -> int:
    """The static size that serves `size`, from `smallest` on: a power of two, or three quarters of it.

    From 512 on there are quarters between powers of two: finer, because a whole forward pays for them, and still
    multiples of 128, which TPUs' kernels need.
    """
    power = smallest
    while power < size:
        power *= 2
    step = power // (8 if power >= 1024 else 4)
    return -(-size // step) * step if power > smallest and step else power
