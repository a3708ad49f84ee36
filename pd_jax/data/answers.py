"""Text on its way out: what decoding gives back of a branch, of a sample and of a column."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class BranchResult:
    """A branch's answer."""

    text: str  # cut before a stop string
    token_ids: tuple[int, ...]  # without the end-of-sequence token
    finish_reason: FinishReason


@dataclass(frozen=True)
class Result:
    """A sample's answers, what they took and what was prefilled for them."""

    branches: tuple[BranchResult, ...]
    columns: int  # until the last branch has ended, its end-of-sequence token included: the number of forwards too
    prefill_tokens: int  # without padding


@dataclass(frozen=True)
class Event:
    """One column as it arrives. Joined over the events, `texts` are the texts of the answers."""

    column: int  # counted from the first answer column
    tokens: tuple[int | None, ...]  # per branch; None where it has ended (or, with align "ragged", not begun)
    texts: tuple[str, ...]  # per branch, what can be shown now; half a character, or a stop string begun, comes later
    finish_reasons: tuple[FinishReason | None, ...]  # per branch; None while it goes on


@dataclass(frozen=True)
class Columns:
    """Columns of all samples of a call, as they arrive."""

    first: int  # the first of them, counted from the first answer column
    tokens: np.ndarray  # int32 [C, S, n], -1 where a branch says nothing; S, n rounded up


class Transcript:
    """What one branch has said so far. `push` takes its tokens, `news` tells what can be shown since the last time."""

    def __init__(self, decode: Callable[[list[int]], str], eos: Sequence[int], limit: int, stop: Sequence[str]) -> None:
        self._decode, self._eos, self._stop, self.limit = decode, eos, stop, limit
        self._shown = 0  # characters
        self.ids: list[int] = []
        self.columns = 0
        self.finish_reason: FinishReason | None = None if limit else "length"

    def push(self, token: int, column: int) -> None:
        self.columns = column + 1
        if token in self._eos:
            self.finish_reason = "eos"
            return
        self.ids.append(token)
        if self._stop and any(s in self._decode(self.ids) for s in self._stop):
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"

    def text(self) -> str:
        whole = self._decode(self.ids)
        return whole[: min((whole.index(s) for s in self._stop if s in whole), default=len(whole))]

    def news(self) -> str:
        text = self.text()
        if self.finish_reason is None:
            # U+FFFD at the end is a character whose bytes have not all come; a stop string may have begun.
            text = text.rstrip("\ufffd")
            begun = [n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])]
            text = text[: len(text) - max(begun, default=0)]
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def result(self) -> BranchResult:
        assert self.finish_reason is not None
        return BranchResult(self.text(), tuple(self.ids), self.finish_reason)


def result_of(branches: Sequence[Transcript], prefill_tokens: int) -> Result:
    """Of a sample whose branches have ended."""
    return Result(tuple(t.result() for t in branches), max(t.columns for t in branches), prefill_tokens)


def events(steps: Iterable[tuple[Columns, list[Transcript]]]) -> Iterator[Event]:
    """What there is to show of one sample, from its single columns and what its branches have said by then."""
    said: list[int] = []
    for columns, branches in steps:
        said = said or [0] * len(branches)
        tokens = tuple(t.ids[-1] if len(t.ids) > n else None for t, n in zip(branches, said, strict=True))
        said = [len(t.ids) for t in branches]
        texts, reasons = tuple(t.news() for t in branches), tuple(t.finish_reason for t in branches)
        yield Event(columns.first, tokens, texts, reasons)
