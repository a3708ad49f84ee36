"""Text on its way in: rows that hold none are refused or counted, and what people typed is tokenised as text."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from pd_jax.errors import InputError
from pd_jax.layout import TokenSample

log = logging.getLogger(__name__)


@dataclass
class BadRows:
    """What to do with a row of a data set that cannot be used, and how many there were so far."""

    skip: bool = False
    count: int = 0

    def meet(self, error: InputError) -> None:
        """Count a bad row and log what is wrong with it; where rows are not skipped, raise `InputError`."""
        if not self.skip:
            raise InputError(f"{error}; mend or remove that row, or pass --skip-bad-rows") from None
        self.count += 1
        log.warning("skipped: %s", error)

    def summary(self) -> str:
        """For the last line of a run; nothing where there was none."""
        return f"; {self.count} bad rows of the data were skipped" if self.count else ""


def tokenise(tokenizer: Any, text: Any, chat_markup: bool = False) -> Any:
    """The token ids of a text, or of every text of a list. What spells a control token (`<|im_end|>`) is text like any
    other, unless `chat_markup` says that it is meant."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not chat_markup)["input_ids"]


def check_ids(ids: Any, rows: int, name: str) -> None:
    """Raise `InputError` for what is no token id of a model with so many rows of embeddings: it would be clamped."""
    array = np.asarray(ids)
    if not array.size or (array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < rows):
        return
    wrong = next(i for i in array.flat if not isinstance(i, int | np.integer) or not 0 <= i < rows)
    raise InputError(f"{name}: {wrong!s} is no token id; the model has {rows}, 0 to {rows - 1}")


def check_sample(sample: TokenSample, rows: int, name: str) -> None:
    """`check_ids` of all parts of a sample."""
    check_ids(sample.background, rows, f"{name}, background")
    for b, branch in enumerate(sample.branches):
        for ids in (branch.prompt, branch.answer, () if branch.end is None else (branch.end,)):
            check_ids(ids, rows, f"{name}, branch {b}")
