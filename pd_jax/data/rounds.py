"""Texts that go on: JSON lines of backgrounds and rounds, for finetuning. A round is a fork, and the join behind it.

    {"background": "...", "rounds": [{"branches": [{"prompt": "...", "answer": "..."}, ...],
                                      "join": {"prompt": "...", "answer": "..."}}, ...]}

Every text is tokenised by itself and as it stands: a space between a prompt and its answer belongs to the answer. An
answer is closed by the end token. Without `answer` a branch is read and says nothing; a round may lack its `branches`
or its `join`; a join may have an empty prompt, and then says the word behind the last one that the trunk has said.
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pd_jax.data.squad import file_rows, json_line
from pd_jax.data.text import BadRows, tokenise, tokenise_background
from pd_jax.errors import InputError, check_text
from pd_jax.layout import Branch, TokenSample, Turn


def holds_rounds(name: str) -> bool:
    """Whether the first row of data set `name` is one of rounds; of a file of JSON lines that can be read."""
    path = Path(name)
    if not path.is_file() or ".jsonl" not in path.suffixes:
        return False
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            first = json_line(next((line for line in file if line.strip()), b""))
    except (OSError, zlib.error, EOFError):
        return False  # who reads all of it says what is wrong
    return isinstance(first, dict) and "rounds" in first


def load_rounds(name: str, tokenizer: Any, end: int, bad: BadRows) -> list[TokenSample]:
    """The samples of file `name`, whose answers `end` closes. `bad` counts rows that cannot be used, where it skips
    them. Raises `InputError`, which names file, row and place."""
    samples = []
    for where, row in file_rows(Path(name)):
        try:
            samples.append(_sample(where, row, tokenizer, end))
        except InputError as error:
            bad.meet(error)
    if not samples:
        raise InputError(f"{name} has no rows that can be used")
    return samples


def draw(samples: Sequence[TokenSample], most: int | None, seed: int | None) -> list[TokenSample]:
    """At most so many, in the data's order: drawn by `seed`, or (None) the first."""
    if seed is None or most is None or most >= len(samples):
        return list(samples[:most])
    return [samples[i] for i in sorted(np.random.default_rng(seed).choice(len(samples), most, replace=False))]


def _sample(where: str, row: Any, tokenizer: Any, end: int) -> TokenSample:
    if isinstance(row, InputError):
        raise row
    _only(row, {"background", "rounds"}, where)
    if not isinstance(row.get("rounds"), list) or not row["rounds"]:
        raise InputError(f"{where}: 'rounds' is not a list of one round or more")
    turns: list[Turn] = []
    for r, part in enumerate(row["rounds"]):
        here = f"{where}: rounds[{r}]"
        _only(part, {"branches", "join"}, here)
        if not part.get("branches") and not part.get("join"):
            raise InputError(f"{here} has neither 'branches' nor a 'join'")
        if not isinstance(branches := part.get("branches", []), list):
            raise InputError(f"{here}: 'branches' is not a list")
        if branches:
            turns.append([_text(text, f"{here}.branches[{b}]", tokenizer, end) for b, text in enumerate(branches)])
        if "join" in part:
            turns.append(_text(part["join"], f"{here}.join", tokenizer, end, may_be_empty=True))
    background = tokenise_background(tokenizer, check_text(row.get("background", ""), f"{where}: 'background'"))
    first = [] if isinstance(turns[0], Branch) else turns.pop(0)
    return TokenSample(background, first, later=turns)  # ty: ignore[invalid-argument-type] -- it is no join


def _text(text: Any, where: str, tokenizer: Any, end: int, may_be_empty: bool = False) -> Branch:
    _only(text, {"prompt", "answer"}, where)
    prompt = tokenise(tokenizer, check_text(text.get("prompt", ""), f"{where}: 'prompt'"))
    answer = tokenise(tokenizer, check_text(text.get("answer", ""), f"{where}: 'answer'"))
    if not (prompt or (may_be_empty and answer)):
        raise InputError(f"{where} has no prompt")
    return Branch(prompt, answer, end if answer else None)


def _only(value: Any, keys: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, not an object with {' and '.join(sorted(keys))}")
    if wrong := sorted(set(value) - keys):
        raise InputError(f"{where} has {wrong[0]!r}, which nothing reads; it may have {' and '.join(sorted(keys))}")
