"""Layouts: samples become rows of tokens with coordinates, targets and weights. numpy only.

A token's coordinate is `(branch, column)`. The background is branch 0 at columns `0..N-1`; branches are `1..B`. Prompts
take the block of columns `[N, N+P)`, P the longest prompt; answers start together at column `N+P`. A background of 8
tokens with questions of 4, 3 and 2 tokens, `align="left"`:

    column    0..7     8                    9                    10              11      12
    holds     B0..B7   Q1[0] Q2[0] Q3[0]    Q1[1] Q2[1] Q3[1]    Q1[2] Q2[2]     Q1[3]   the first answer tokens

The text may go on. After a set of branches (a fork) branch 0, the trunk, may continue in the columns behind the last
one that the fork used (a join); then another fork may follow, with branch numbers that were not used before. A
background of two, a fork of two branches, a join and a fork of one:

    column    0  1    2           3       4           5       6  7    8      9
    branch 0  B0 B1                                           J  S
    branch 1          Q1[0]       Q1[1]   A1[0]       A1[1]
    branch 2          Q2[0]               A2[0]
    branch 3                                                          Q3[0]  A3[0]

A row holds one sample or several (`segment` tells them apart); inside a sample tokens stand in column-major order, that
is sorted by `(column, branch)`.

An end-of-sequence token is a target and never an input: a branch that has ended adds nothing that others can see, in
training exactly as in decoding.
"""

import itertools
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
    """One branch, or a join, as token ids. `end` closes the answer (a target only); None: the text goes on."""

    prompt: Sequence[int]
    answer: Sequence[int] = ()
    end: int | None = None


Turn = Branch | Sequence[Branch]  # a join, which is the trunk's, or a fork


def members(turn: Turn) -> Sequence[Branch]:
    """The branches of a fork; a join alone."""
    return [turn] if isinstance(turn, Branch) else turn


@dataclass(frozen=True)
class TokenSample:
    """A background and its branches as token ids, and what follows them."""

    background: Sequence[int]
    branches: Sequence[Branch]
    visibility: Visibility | None = None  # None: that of the rows it is laid out in, of the decoder or of the training
    later: Sequence[Turn] = ()  # behind the branches, each in the columns behind the one before

    @property
    def turns(self) -> list[Turn]:
        """The branches and what follows them."""
        return [self.branches, *self.later]

    @property
    def prompt_columns(self) -> int:
        """P, the number of columns of the block of prompts."""
        return max((len(b.prompt) for b in self.branches), default=0)

    def __len__(self) -> int:
        return len(self.background) + sum(len(t.prompt) + len(t.answer) for turn in self.turns for t in members(turn))


@dataclass(frozen=True)
class Layout:
    """Rows of laid-out tokens: every array is [S rows, T tokens].

    Fields can be read as attributes or by key.
    """

    tokens: np.ndarray  # int32
    branch: np.ndarray  # int32; 0 is the trunk: the background and the joins
    column: np.ndarray  # int32
    segment: np.ndarray  # int32, the sample's number in its row; -1 for PAD
    valid: np.ndarray  # bool; False for PAD
    prompt: np.ndarray  # bool; part of a prompt, a branch's or a join's
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


class Placed(NamedTuple):
    """A text of a sample and where it stands."""

    branch: int
    text: Branch
    first: int  # the column where its prompt begins
    answer: int  # the column where its answer begins

    def end(self) -> int:
        """The column behind its last token."""
        return self.answer + len(self.text.answer) if self.text.answer else self.first + len(self.text.prompt)


def place_texts(sample: TokenSample, align: Align) -> list[list[Placed]]:
    """The background (as a prompt), and the texts of every turn."""
    column, count = len(sample.background), 0
    turns = [[Placed(0, Branch(sample.background), 0, column)]]
    for turn in sample.turns:
        texts, number = ([turn], 0) if isinstance(turn, Branch) else (turn, count + 1)
        width = max((len(text.prompt) for text in texts), default=0)
        placed = []
        for branch, text in enumerate(texts, start=number):
            length = len(text.prompt)
            first = column + (width - length if align == "right" else 0)
            placed.append(Placed(branch, text, first, column + (length if align == "ragged" else width)))
        turns.append(placed)
        count = max((p.branch for p in placed), default=0) or count
        column = max((p.end() for p in placed), default=column)
    return turns


def answer_columns(sample: TokenSample, align: Align = "left") -> np.ndarray:
    """The columns where the answers of the last turn begin, int32 [B]; [1] for a join."""
    return np.array([placed.answer for placed in place_texts(sample, align)[-1]], np.int32)


def _text_arrays(placed: Placed, end: int | None, objective: Objective) -> _Tokens:
    """The tokens of a text; `end` is the target of the last one, if it has one."""
    length, ids = len(placed.text.prompt), [*placed.text.prompt, *placed.text.answer]
    n = len(ids)
    index = np.arange(n)
    after = np.array([*ids[1:], -1 if end is None else end], np.int32)[:n]
    # A weight belongs to a token's target: the last prompt token carries the first answer token.
    asked = index >= (length - 1 if objective == "answers" else 0)
    return _Tokens(
        tokens=np.array(ids, np.int32),
        branch=np.full(n, placed.branch, np.int32),
        column=(index + np.where(index < length, placed.first, placed.answer - length)).astype(np.int32),
        prompt=index < length,
        targets=np.maximum(after, 0),
        weights=(asked & (after >= 0)).astype(np.float32),
    )


def _sample_row(sample: TokenSample, align: Align, objective: Objective) -> _Tokens:
    """All tokens of one sample in column-major order."""
    placed = list(itertools.chain(*place_texts(sample, align)))
    ends = [p.text.end for p in placed]
    trunk = [i for i, p in enumerate(placed) if p.branch == 0]
    for i, j in itertools.pairwise(trunk):  # what a join answers without a prompt is said behind the trunk's last token
        if ends[i] is None and not placed[j].text.prompt:
            ends[i] = next(iter(placed[j].text.answer), None)
    parts = [_text_arrays(p, end, objective) for p, end in zip(placed, ends, strict=True)]
    parts[0].prompt[:] = False
    row = _Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
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
    """The prompts alone, as decoding takes them: those of the branches, and nothing later."""
    return replace(sample, branches=[Branch(branch.prompt) for branch in sample.branches], later=())


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
