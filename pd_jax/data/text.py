"""Text on its way in: rows that hold none are refused or counted, and what people typed is tokenised as text."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pd_jax.config import Visibility, check_choice
from pd_jax.errors import InputError, shown
from pd_jax.layout import CALL, Branch, Sample, TokenSample, members

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


def tokenise_background(tokenizer: Any, text: Any, chat_markup: bool = False) -> list[int]:
    """The token ids of a background, behind the token with which the model's texts begin, if its tokenizer puts one
    there (Llama 3 and Mistral do, Qwen and SmolLM2 do not)."""
    begin = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id]
    return begin + tokenise(tokenizer, text, chat_markup)


def check_ids(ids: Any, rows: int, name: str) -> None:
    """Raise `InputError` for what is no token id of a model with so many rows of embeddings: it would be clamped."""
    array = np.asarray(ids)
    if not array.size or (array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < rows):
        return
    wrong = next(i for i in array.flat if not isinstance(i, int | np.integer) or not 0 <= i < rows)
    raise InputError(f"{name}: {wrong!s} is no token id; the model has {rows}, 0 to {rows - 1}")


def check_sample(sample: TokenSample, rows: int, name: str) -> None:
    """`check_ids` of all parts of a sample. Raises `InputError` for what cannot be decoded, too."""
    check_choice(f"{name}: visibility", sample.visibility or "columns", Visibility)
    check_ids(sample.background, rows, f"{name}, background")
    for number, turn in enumerate(sample.turns):
        where = f"{name}, turn {number}" if number else name
        branches: list[Any] = list(members(turn)) if isinstance(turn, Iterable | Branch) else [None]
        if not all(isinstance(branch, Branch) for branch in branches):
            raise InputError(f"{where}: branches is {shown(turn)}; pass [Branch(prompt=[1, 2]), ...], token ids")
        for b, branch in enumerate(branches):
            for ids in (branch.prompt, branch.answer, () if branch.end is None else (branch.end,)):
                check_ids(ids, rows, f"{where}, branch {b}")
        empty = [] if isinstance(turn, Branch) else [b for b, branch in enumerate(branches) if not len(branch.prompt)]
        if empty or not (branches or sample.later):
            raise InputError(f"{where}: " + (f"prompts {empty} have no tokens" if empty else "no branches"))


def tokenise_samples(samples: Sequence[Sample | TokenSample], tokenizer: Any, rows: int) -> list[TokenSample]:
    """Samples of text as samples of token ids, the pieces tokenised one by one; others as they are. All are checked.

    Raises `InputError` for what is no sample, and for ids that a model with so many rows of embeddings does not have.
    """
    if not isinstance(samples, Iterable) or isinstance(samples, str | Mapping):
        raise InputError(f"samples is {shown(samples)}; pass a list of samples, [{CALL}]")
    samples, out = list(samples), []
    if not samples:
        raise InputError("samples is empty; pass at least one Sample")
    for i, sample in enumerate(samples):
        if isinstance(sample, Sample):
            ids = partial(tokenise, tokenizer, chat_markup=sample.chat_markup)
            branches = [Branch(ids(text)) for text in sample.branches]
            background = tokenise_background(tokenizer, sample.background, sample.chat_markup)
            sample = TokenSample(background, branches, sample.visibility)
        if not isinstance(sample, TokenSample):
            raise InputError(f"sample {i} is {shown(sample)}; pass {CALL}, or a TokenSample of token ids")
        check_sample(sample, rows, f"sample {i}")
        out.append(sample)
    return out


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text, one after the other; joined, they are the text.

    A character may be split over several tokens (an emoji often is): it stands at the last of them, the others add "".
    """
    out: list[str] = []
    start = said = 0  # start..said is told already, and decoded again: what a token adds depends on the one before
    for end in range(1, len(ids) + 1):
        before, now = (_decoded(tokenizer, ids[start:stop]) for stop in (said, end))
        if now.endswith("\ufffd") and end < len(ids):  # a character whose bytes have not all come
            out.append("")
            continue
        out.append(now[len(before) :])
        start, said = said, end
    return out


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
