"""What a job asks: lines of documents with their prompts, or the contexts of a data set in SQuAD's format."""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_jax.data.squad import json_line, load_squad, to_sample
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError, check_text, check_whole, shown
from pd_jax.layout import Sample

FORMAT = '{"id": "a", "background": "the text that all share", "branches": ["a prompt", "another"]}'
KEYS = {"id", "background", "branches", "max_new_tokens"}


@dataclass(frozen=True)
class Request:
    """One document with its prompts."""

    line: int  # of the file, or the context's number, from 1: what answers are put in order by
    id: str
    sample: Sample
    questions: tuple[str, ...] | None = None  # the ids of a SQuAD context's questions
    max_new_tokens: tuple[int, ...] | None = None  # for each branch; None: as the job says


def read_requests(path: Path, bad: BadRows) -> Iterator[Request]:
    """The requests of a file: JSON lines like `FORMAT` (.jsonl, .jsonl.gz), the same keys as columns of a .parquet
    file, or questions in SQuAD's format. `max_new_tokens` is a number or one a branch, and may be left out.

    Raises `InputError` naming file and line for one that cannot be used; `bad` may count it instead.
    """
    if not path.is_file():
        raise InputError(f"--input {path} is no file; give one of lines like {FORMAT}, or questions in SQuAD's format")
    rows = _rows(path)
    if rows is None:
        for number, context in enumerate(load_squad(str(path), bad=bad), start=1):
            ids = tuple(question.id for question in context.questions)
            yield Request(number, context.title or str(number), to_sample(context), ids)
        return
    for number, row in rows:
        try:
            yield _request(row, number)
        except InputError as error:
            bad.meet(InputError(f"{path}, line {number}: {error}"))


def _rows(path: Path) -> Iterator[tuple[int, Any]] | None:
    """(line, what it holds) of a file in our own format; None for one in SQuAD's."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} is not a parquet file: {error}") from None
        if "branches" not in file.schema_arrow.names:
            return None
        return enumerate((row for batch in file.iter_batches(1024) for row in batch.to_pylist()), start=1)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return None
    return None if _is_squad(path) else _lines(path)


def _is_squad(path: Path) -> bool:
    """Whether the first line that is an object is a question of SQuAD's flat format."""
    first = next((row for _, row in _lines(path) if isinstance(row, Mapping)), {})
    return "question" in first and "branches" not in first


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """What every line holds that is not empty; an `InputError` where it is no JSON."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json_line(line)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read to its end: {error}") from None


def _request(row: Any, number: int) -> Request:
    """The request of a line. Raises `InputError`."""
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, Mapping) or "branches" not in row:
        raise InputError(f"it is {shown(row)}; write {FORMAT}")
    row = {key: value for key, value in row.items() if value is not None}
    if unknown := sorted(row.keys() - KEYS):
        raise InputError(f"unknown key {unknown[0]!r}; write {FORMAT}")
    branches, limit = row["branches"], row.get("max_new_tokens")
    if not isinstance(branches, list):
        raise InputError(f"branches is {shown(branches)}; write {FORMAT}")
    sample = Sample(row.get("background", ""), branches)
    name = row.get("id", number)
    name = check_text(str(name) if isinstance(name, int) and not isinstance(name, bool) else name, "id")
    limits = None
    if limit is not None:
        asked = limit if isinstance(limit, list) else [limit] * len(branches)
        limits = tuple(check_whole(n, "max_new_tokens") for n in asked)
        if len(limits) != len(branches) or min(limits) < 1:
            raise InputError(f"max_new_tokens is {shown(limit)}; give one number from 1, or one for each branch")
    return Request(number, name, sample, None, limits)
