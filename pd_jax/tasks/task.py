"""What a task is: samples of integers by seed, a score of decoded answers, and the best that any model can reach.

A branch's word in column c reaches a sibling's choice of a token in column c+2 at the earliest, because that token is
chosen at its branch's token in column c+1, which sees the columns before its own. So where an answer needs what a
sibling says or was asked, WAIT, EQ or ASK stands in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pd_jax.errors import InputError
from pd_jax.layout import TokenSample

# The token ids of all tasks. RANK and those below it are each the first of a run of ids.
PAD, BOS, ASK, WAIT, EQ, END, NONE = range(7)
RANK = 7  # + 0..7: the first branch, the second, ...
DIGIT = 15  # + 0..16
NAME = 32  # + 0..7
SECRET = 40  # + 0..15
VOCABULARY = 56  # no task has more ids


def never(branch: int, token: int) -> bool:
    """`Task.free` of a task in which everything is decoded greedily."""
    return False


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task; `TASKS` of `pd_jax.tasks` has them all.

    score: of a sample and its decoded answers (without END), bool [B]; [1] where only the whole can be right.
    optimum: of a number of branches, the highest mean score by what a branch sees: "isolated", "prompts" and "columns"
    with branch pairs, and "no signal", columns without pairs and bias (None: low, and no closed form). What is free is
    drawn as in the training data; a model that always drew the same would know more.
    free: of a branch (from 1) and a token of its answer (from 0), whether that token is drawn at temperature 1; all
    other tokens are decoded greedily.
    """

    name: str
    vocabulary: int  # ids are 0..vocabulary-1
    branches: int  # as many as a sample has unless asked otherwise
    counts: range  # as many as it can have
    make: Callable[[np.random.Generator, int], TokenSample]  # a sample of so many branches, with the right answers
    score: Callable[[TokenSample, Sequence[Sequence[int]]], np.ndarray]
    optimum: Callable[[int], dict[str, float | None]]
    free: Callable[[int, int], bool] = never

    def samples(
        self, seed: int | Sequence[int], count: int, branches: Sequence[int] | None = None
    ) -> list[TokenSample]:
        """`count` samples that depend on the seed alone, for example on (run, step).

        Every sample draws its number of branches from `branches` (default: always the usual number).
        """
        choices = [self.branches] if branches is None else list(branches)
        if not choices or not set(choices) <= set(self.counts):
            raise InputError(f"branches is {choices}; {self.name} takes numbers from {list(self.counts)}")
        rng = np.random.default_rng(seed)
        return [self.make(rng, choices[rng.integers(len(choices))]) for _ in range(count)]


def last_tokens(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """The last token of every answer, int [B]; -1 where an answer is longer or shorter than the right one."""
    pairs = zip(sample.branches, answers, strict=True)
    return np.array([answer[-1] if len(answer) == len(branch.answer) else -1 for branch, answer in pairs])


def last_is_right(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """The score of most tasks: the last token is judged, what comes before it leads there."""
    return last_tokens(sample, answers) == [branch.answer[-1] for branch in sample.branches]
