"""The answers of a job: appended as they are made, put in the order of the questions at the end.

While a job goes on its answers are in OUTPUT.partial: what it depends on in the first line, then a document a line. A
line that a kill cut short is dropped; every other one is kept, and none is made twice.
"""

import fcntl
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pd_jax.data.text import BadRows, tokenise_samples
from pd_jax.decoding import ParallelDecoder, Result
from pd_jax.errors import InputError
from pd_jax.jobs.requests import Request
from pd_jax.layout import TokenSample
from pd_jax.machines import naming, write_whole

WINDOW = 64  # batches that are sorted by length together: rows of a batch wait for its longest


@dataclass(frozen=True)
class Settings:
    """How a job answers."""

    max_new_tokens: int = 32  # of an answer, where the request does not say
    stop: tuple[str, ...] = ()
    batch_size: int = 8  # documents answered at once


@contextmanager
def open_answers(output: Path, about: dict[str, Any]) -> Generator[tuple[IO[bytes], set[int]]]:
    """The file that answers are appended to, and the lines that are answered; when the block has ended without an
    error, `output` is whole and in order. `about` is what the answers depend on.

    Raises `InputError` when `output` exists, when another process writes it, and when answers are there that were made
    in another way.
    """
    if output.exists():
        raise InputError(f"--output {output} exists; choose another, or remove it")
    partial = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("a+b")
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error}); choose another") from None
    with naming(partial), file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial} is being written by another process; wait for it") from None
        try:
            yield file, _go_on(file, partial, about)
        except BaseException:
            with suppress(OSError):
                file.flush()
            if len(partial.read_bytes().splitlines()) <= 1:
                partial.unlink()  # nothing has been answered: nothing is left behind
            raise
        file.seek(0)
        records = sorted(map(json.loads, file.read().splitlines()[1:]), key=lambda record: record.pop("line"))
        write_whole(output, b"".join(map(_as_line, records)))
        partial.unlink()


def _go_on(file: IO[bytes], partial: Path, about: dict[str, Any]) -> set[int]:
    """The lines that are answered already; a new file gets `about`. A cut line is dropped."""
    file.seek(0)
    whole = file.read()
    kept = whole[: whole.rfind(b"\n") + 1]
    file.truncate(len(kept))
    lines = kept.splitlines()
    if not lines:
        file.write(_as_line(about))
        file.flush()
        return set()
    try:
        made, done = json.loads(lines[0]), {json.loads(line)["line"] for line in lines[1:]}
        differ = [f"{key} {made.get(key)} (now {value})" for key, value in about.items() if made.get(key) != value]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{partial} holds something else than answers; remove it") from None
    if differ:
        raise InputError(f"{partial} was made with {differ[0]}; finish it in that way, or remove it")
    return done


def answer_requests(
    decoder: ParallelDecoder,
    requests: Iterable[Request],
    file: IO[bytes],
    done: set[int],
    settings: Settings,
    bad: BadRows,
    advance: Callable[[int, int], None],
) -> None:
    """Append the answers of `requests` that are not `done` to `file`. `advance` is told how many documents and tokens
    of answers have been added. Documents of about the same length are answered together."""
    waiting = (request for request in requests if request.line not in done)
    for batch in answer_batches(decoder, waiting, settings, bad):
        for request, _, result in batch:
            file.write(_as_line(_record(request, result)))
        file.flush()
        advance(len(batch), sum(len(branch.token_ids) for _, _, result in batch for branch in result.branches))


def answer_batches(
    decoder: ParallelDecoder, requests: Iterator[Request], settings: Settings, bad: BadRows
) -> Iterator[list[tuple[Request, TokenSample, Result]]]:
    """Requests with their tokens and answers, a batch at a time; those of about the same length together."""
    for batch in _batches(requests, decoder, settings, bad):
        asked = [sample for _, sample in batch]
        limits = [_limits(request, settings) for request, _ in batch]
        results = decoder.generate(asked, max_new_tokens=limits, stop=settings.stop)
        yield [(*pair, result) for pair, result in zip(batch, results, strict=True)]


def _as_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _limits(request: Request, settings: Settings) -> list[int]:
    return list(request.max_new_tokens or [settings.max_new_tokens] * len(request.sample.branches))


def _record(request: Request, result: Result) -> dict[str, Any]:
    ids = {} if request.questions is None else {"questions": request.questions}
    answers = [branch.text.strip() for branch in result.branches]
    reasons = [branch.finish_reason for branch in result.branches]
    return {"line": request.line, "id": request.id, **ids, "answers": answers, "finish_reasons": reasons}


def _batches(
    requests: Iterator[Request], decoder: ParallelDecoder, settings: Settings, bad: BadRows
) -> Iterator[list[tuple[Request, TokenSample]]]:
    """Requests with their tokens, those of about the same size together, a window of them at a time."""
    most = decoder.config.most_columns
    while window := list(islice(requests, WINDOW * settings.batch_size)):
        sized = []
        for request in window:
            (sample,) = tokenise_samples([request.sample], decoder.tokenizer, decoder.config.vocab_size)
            columns = len(sample.background) + sample.prompt_columns + max(_limits(request, settings))
            if columns > most:
                bad.meet(InputError(f"line {request.line} takes {columns} columns, the model has {most}"))
            else:
                sized.append((request, sample))
        sized.sort(key=lambda pair: (len(pair[1].branches), len(pair[1])))
        yield from (sized[i : i + settings.batch_size] for i in range(0, len(sized), settings.batch_size))


class Progress:
    """Says at most every few seconds how far a job is."""

    def __init__(self, total: int, say: Callable[[str], Any], every: float = 10.0) -> None:
        self.total, self.say, self.every = total, say, every
        self.documents = self.tokens = 0
        self.began = self.said = time.monotonic()

    def __call__(self, documents: int, tokens: int) -> None:
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        now = time.monotonic()
        if now - self.said >= self.every:
            self.said = now
            left = (self.total - self.documents) * (now - self.began) / self.documents
            self.say(f"{self.line()}, about {left / 60:.1f} min left")

    def line(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = f"{self.documents / seconds:.2f} documents/s, {self.tokens / seconds:.0f} tokens/s"
        return f"{self.documents} of {self.total} documents, {speed}"
