"""Web documents cut into segments: FineWeb from the hub (streamed or not), or local files with a `text` column."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
from datasets.exceptions import DatasetGenerationError

from pd_jax.data.text import BadRows, tokenise
from pd_jax.errors import InputError, check_text
from pd_jax.layout import Branch, TokenSample

JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
ADVICE = (
    "pass --dataset-name a file (.jsonl, .jsonl.gz, .json, .parquet) or directory, or a hub id with network or a "
    "prepared cache"
)
Documents = datasets.Dataset | datasets.IterableDataset
TEXTS = (datasets.Value("string"), datasets.Value("large_string"))


def load_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    max_samples: int | None = None,
    local_files_only: bool = False,
) -> Documents:
    """The first `max_samples` documents of a local file, a local directory or a hub data set: their `text`, and for
    JSON files `fault`, which says of a row whose text is null what is wrong with it.

    Raises `InputError` when the data cannot be had, are empty or have no `text` column that holds text.
    """
    try:
        if Path(name).is_file() and name.endswith(JSON):
            documents = _read_json(name, streaming)
        elif Path(name).is_file() and name.endswith(".parquet"):
            documents = datasets.load_dataset("parquet", data_files=name, split="train", streaming=streaming)
        elif name.endswith((*JSON, ".parquet")):
            raise FileNotFoundError("no such file")
        elif Path(name).is_dir():
            documents = datasets.load_dataset(name, split=split, streaming=streaming)
        else:
            if local_files_only and not huggingface_hub.is_offline_mode():
                # A snapshot in the cache is found by its path only; by name, `datasets` asks the hub first.
                name = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
            documents = datasets.load_dataset(name, config, split=split, streaming=streaming)
        first = next(iter(documents), None)
    except InputError:
        raise
    except (OSError, ValueError, DatasetGenerationError, pyarrow.ArrowException) as error:
        cause = str(error.__cause__ or error).split("\n")[0]
        raise InputError(f"documents {name!r} cannot be loaded ({cause}); {ADVICE}") from None
    if first is None:
        raise InputError(f"documents {name!r} are empty; {ADVICE}")
    columns = documents.column_names or list(first)
    if "text" not in columns:
        raise InputError(f"documents {name!r} have columns {columns} but no 'text'; rename the one that holds the text")
    kind = (documents.features or {}).get("text", TEXTS[0])
    if kind not in TEXTS:
        shown = getattr(kind, "dtype", kind)
        raise InputError(f"documents {name!r}: the column 'text' is {shown}, not text; use the one that holds text")
    documents = documents.select_columns([column for column in ("text", "fault") if column in columns])
    if max_samples is None:
        return documents
    if isinstance(documents, datasets.IterableDataset):
        return documents.take(max_samples)
    return documents.select(range(min(max_samples, len(documents))))


def _read_json(name: str, streaming: bool) -> Documents:
    """A local JSON file, read row by row: of a stream, arrow would give up at one bad row, and say nothing of where."""
    first = next(_json_rows(name), None)
    if isinstance(first, dict) and "text" not in first:
        raise InputError(
            f"documents {name!r} have columns {sorted(first)} but no 'text'; rename the one that holds the text"
        )
    if isinstance(first, OSError):
        raise first
    if first is None:
        raise InputError(f"documents {name!r} are empty; {ADVICE}")
    features = datasets.Features({"text": datasets.Value("string"), "fault": datasets.Value("string")})
    # What `datasets` keeps of an earlier file under this name must not be taken for this one.
    state = Path(name).stat()
    made = datasets.IterableDataset.from_generator if streaming else datasets.Dataset.from_generator
    return made(_json_documents, features, gen_kwargs={"name": name, "state": (state.st_size, state.st_mtime_ns)})


def _json_documents(name: str, state: tuple[int, int]) -> Iterator[dict[str, str | None]]:
    """Every row of a local JSON file as {"text", "fault"}, one of them null."""
    for row in _json_rows(name):
        if isinstance(row, dict) and "text" in row:
            try:
                yield {"text": check_text(row["text"], "its text"), "fault": None}
            except InputError as error:
                yield {"text": None, "fault": str(error)}
        else:
            yield {"text": None, "fault": str(row) if isinstance(row, Exception) else "it has no 'text'"}


def _json_rows(name: str) -> Iterator[Any]:
    """What the rows of a file hold, a list of objects or one a line, or the exception that reading one raised. A file
    that cannot be read further ends with an `OSError`."""
    try:
        with gzip.open(name) if name.endswith(".gz") else Path(name).open("rb") as file:
            if file.read(1) == b"[":
                file.seek(0)
                yield from json.load(file)
                return
            file.seek(0)
            for line in file:
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        row = InputError(f"it is not JSON: {error}")
                    yield row
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        yield OSError(f"the file is damaged or cut off behind it: {error}")


def segments(documents: Documents, tokenizer: Any, seq_length: int, end: int, *, name: str, bad: BadRows) -> Documents:
    """Documents as rows {"ids": at most `seq_length` tokens, "end": the closing token or -1 where the text goes on}.

    A document is cut every `seq_length` tokens; its last piece is as long as it is. A piece of one token has nothing
    to predict but the end, and is dropped. The result is on disk (memory-mapped) unless the documents are streamed.
    `bad` meets the rows of data set `name` whose text is null: now, or of a stream when their turn has come.
    """

    def cut(batch: dict[str, list[str]]) -> dict[str, list]:
        out: dict[str, list] = {"ids": [], "end": []}
        for ids in tokenise(tokenizer, batch["text"]) if batch["text"] else ():
            for start in range(0, len(ids), seq_length):
                piece = ids[start : start + seq_length]
                if len(piece) > 1:
                    out["ids"].append(piece)
                    out["end"].append(end if start + seq_length >= len(ids) else -1)
        return out

    def cut_good(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list]:
        faults = batch.get("fault", [None] * len(rows))
        kept = []
        for row, text, fault in zip(rows, batch["text"], faults, strict=True):
            try:
                kept.append(check_text(text, "its text"))
            except InputError as error:
                bad.meet(InputError(f"documents {name!r}: row {row}: {fault or error}"))
        return cut({"text": kept})

    options: dict[str, Any] = {"batched": True, "batch_size": 64, "remove_columns": documents.column_names}
    if isinstance(documents, datasets.IterableDataset):
        return documents.map(cut_good, with_indices=True, **options)
    null = documents.with_format("arrow")[:]["text"].is_null().to_numpy(zero_copy_only=False)
    for row in null.nonzero()[0].tolist():
        bad.meet(InputError(f"documents {name!r}: row {row}: {documents[row].get('fault') or 'its text is null'}"))
    if null.any():
        documents = documents.select((~null).nonzero()[0])
    return documents.map(cut, desc="tokenising", **options)


def branch_sample(rows: Sequence[dict[str, Any]]) -> TokenSample:
    """Segments as the branches of one sample without a background."""
    return TokenSample((), [Branch((), r["ids"], None if r["end"] < 0 else int(r["end"])) for r in rows])
