"""Branches side by side on a terminal: a lane each, filled column by column while they are decoded."""

import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pd_jax.decoding import Event

MARKS = {None: " ", "eos": "✓", "stop": "✓", "length": "…"}
BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # would turn the rest of the line around


def one_line(text: str) -> str:
    """`text` as a terminal may show it in one line: line ends as ⏎, no control characters, which could steer it."""
    shown = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join("\ufffd" if c in BIDI or unicodedata.category(c) in ("Cc", "Cs") else c for c in shown)


class Lanes:
    """What `rich.live.Live` shows of one sample: `take` every event of its stream.

    While it goes on the words of a column stand under one another, and the lanes scroll to the left; when all branches
    have ended the answers stand there whole. `clock` gives seconds.
    """

    def __init__(self, questions: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.questions = [one_line(question) for question in questions]
        self.answers = [""] * len(questions)
        self.reasons: Sequence[str | None] = [None] * len(questions)
        self._columns: list[list[str]] = []
        self._tokens, self._clock = 0, clock
        self._timed: list[tuple[float, int]] = []  # when the second column had come and the last, and tokens until then

    @property
    def over(self) -> bool:
        return all(self.reasons)

    @property
    def columns(self) -> int:
        return len(self._columns)

    def take(self, event: Event) -> None:
        self._columns.append([one_line(text) for text in event.texts])
        self.answers = [answer + text for answer, text in zip(self.answers, event.texts, strict=True)]
        self.reasons = [old or new for old, new in zip(self.reasons, event.finish_reasons, strict=True)]
        self._tokens += sum(token is not None for token in event.tokens)
        if len(self._columns) > 1:  # the first two may have waited for a compiler
            self._timed = [*self._timed[:1], (self._clock(), self._tokens)]

    def footer(self) -> str:
        parts = [f"column {self.columns}", f"{self._tokens} tokens"]
        if len(self._timed) == 2 and self._timed[1][1] > self._timed[0][1]:
            (began, before), (now, after) = self._timed
            parts.append(f"{(after - before) / max(now - began, 1e-9):.0f} tokens/s")
        if "length" in self.reasons:
            parts.append("… cut at --max-new-tokens")
        return " · ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._whole() if self.over else self._filling(options.max_width, console.height)
        yield Text(self.footer(), Style(dim=True))

    def _whole(self) -> Iterator[Table]:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right")
        grid.add_column()
        grid.add_column(max_width=40)
        grid.add_column(ratio=1)
        for b, (question, answer, reason) in enumerate(zip(self.questions, self.answers, self.reasons, strict=True), 1):
            lines = "\n".join(one_line(line) for line in answer.strip().splitlines())
            grid.add_row(str(b), MARKS[reason], Text(question, Style(dim=True)), Text(lines, Style(bold=True)))
        yield grid

    def _filling(self, width: int, height: int) -> Iterator[Text]:
        """The lanes that fit on the screen, those that go on first, each cut to `width` cells."""
        label = min(max(map(cell_len, self.questions), default=0), width // 3)
        number = len(str(len(self.questions)))
        room = max(1, width - label - number - 5)
        widths: list[int] = []
        for column in reversed(self._columns):
            if sum(widths) + (widest := min(room, max(map(cell_len, column)))) > room:
                break
            widths.insert(0, widest)
        shown = self._columns[len(self._columns) - len(widths) :]
        fit = max(1, height - 3)
        order = sorted(range(len(self.questions)), key=lambda b: self.reasons[b] is not None)
        for b in sorted(order[:fit]):
            words = "".join(set_cell_size(c[b], w) for c, w in zip(shown, widths, strict=True))
            head = f"{b + 1:{number}} {MARKS[self.reasons[b]]} "
            question = set_cell_size(self.questions[b], label)
            style = Style(dim=self.reasons[b] is not None)
            line = Text.assemble((head, "bold"), (question, "dim"), ("│ ", "dim"), (words, style))
            line.no_wrap = True
            yield line
        if len(order) > fit:
            yield Text(f"and {len(order) - fit} more branches", Style(dim=True))
