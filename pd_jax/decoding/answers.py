"""What decoding gives back: the answer of a branch, the result of a sample, the event of a column."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class BranchResult:
    """A branch's answer. `token_ids` are without the end-of-sequence token; `text` is cut before a stop string."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Result:
    """A sample's answers, what they took and what was prefilled for them.

    columns: until the last branch has ended, its end-of-sequence token included. The prefill gives the first one and
    every forward after it one more, so this is the number of forwards too. prefill_tokens: without padding.
    """

    branches: tuple[BranchResult, ...]
    columns: int
    prefill_tokens: int


@dataclass(frozen=True)
class Event:
    """One column as it arrives. All are per branch; joined over the events, `texts` are the texts of the answers.

    column: counted from the first answer column. tokens: None where the branch has ended (or, with align "ragged", not
    begun). texts: what can be shown now; half a character, or what may become a stop string, comes later.
    """

    column: int
    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    finish_reasons: tuple[FinishReason | None, ...]


class Transcript:
    """What one branch has said so far. `push` takes its tokens, `news` tells what can be shown since the last time."""

    def __init__(self, decode: Callable[[list[int]], str], eos: Sequence[int], limit: int, stop: Sequence[str]) -> None:
        self._decode, self._eos, self._stop, self.limit = decode, eos, stop, limit
        self._shown = 0  # characters
        self.ids: list[int] = []
        self.columns = 0
        self.finish_reason: FinishReason | None = None

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
