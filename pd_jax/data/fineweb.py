"""Web documents cut into segments: FineWeb from the hub (streamed or not), or local files with a `text` column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
from datasets.exceptions import DatasetGenerationError

from pd_jax.errors import InputError
from pd_jax.layout import Branch, TokenSample

FORMATS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}
Documents = datasets.Dataset | datasets.IterableDataset


def load_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    max_samples: int | None = None,
    local_files_only: bool = False,
) -> Documents:
    """The first `max_samples` documents of a local file, a local directory or a hub data set; only their `text`.

    Raises `InputError` when the data cannot be had or has no `text` column.
    """
    suffix = next((s for s in sorted(FORMATS, key=len, reverse=True) if name.endswith(s)), None)
    try:
        if Path(name).is_file() and suffix:
            documents = datasets.load_dataset(FORMATS[suffix], data_files=name, split="train", streaming=streaming)
        elif suffix:
            raise FileNotFoundError("no such file")
        elif Path(name).is_dir():
            documents = datasets.load_dataset(name, split=split, streaming=streaming)
        else:
            if local_files_only and not huggingface_hub.is_offline_mode():
                # A snapshot in the cache is found by its path only; by name, `datasets` asks the hub first.
                name = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
            documents = datasets.load_dataset(name, config, split=split, streaming=streaming)
        columns = documents.column_names or list(next(iter(documents), {}))
    except (OSError, ValueError, DatasetGenerationError, pyarrow.ArrowException) as error:
        cause = str(error.__cause__ or error).split("\n")[0]
        raise InputError(
            f"documents {name!r} cannot be loaded ({cause}); pass --dataset-name a file (.jsonl, .jsonl.gz, .json, "
            ".parquet) or directory, or a hub id with network or a prepared cache"
        ) from None
    if "text" not in columns:
        raise InputError(f"documents {name!r} have columns {columns} but no 'text'; rename the one that holds the text")
    documents = documents.select_columns(["text"])
    if max_samples is None:
        return documents
    if isinstance(documents, datasets.IterableDataset):
        return documents.take(max_samples)
    return documents.select(range(min(max_samples, len(documents))))


def segments(documents: Documents, tokenizer: Any, seq_length: int, end: int) -> Documents:
    """Documents as rows {"ids": at most `seq_length` tokens, "end": the closing token or -1 where the text goes on}.

    A document is cut every `seq_length` tokens; its last piece is as long as it is. A piece of one token has nothing
    to predict but the end, and is dropped. The result is on disk (memory-mapped) unless the documents are streamed.
    """

    def cut(batch: dict[str, list[str]]) -> dict[str, list]:
        out: dict[str, list] = {"ids": [], "end": []}
        for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            for start in range(0, len(ids), seq_length):
                piece = ids[start : start + seq_length]
                if len(piece) > 1:
                    out["ids"].append(piece)
                    out["end"].append(end if start + seq_length >= len(ids) else -1)
        return out

    options: dict[str, Any] = {"batched": True, "batch_size": 64, "remove_columns": ["text"]}
    if isinstance(documents, datasets.IterableDataset):
        return documents.map(cut, **options)
    return documents.map(cut, desc="tokenising", **options)


def branch_sample(rows: Sequence[dict[str, Any]]) -> TokenSample:
    """Segments as the branches of one sample without a background."""
    return TokenSample((), [Branch((), r["ids"], None if r["end"] < 0 else int(r["end"])) for r in rows])
