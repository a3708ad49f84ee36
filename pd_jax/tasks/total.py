"""total: map and join; every branch counts a letter in its own part of a text, then the trunk says the total.

Branch: [4 letters, EQ] -> [how many of the first one, two, three, four are A]. Join: [ASK] -> [how many of all are A].

isolated   100 %: branches count on their own, and the trunk sees all of them.
prompts    100 %.
columns    100 %.
no signal  low: the own letters cannot be told from the siblings'.

Of `HIDDEN` the join is a branch like the others, which sees none of them: max_k P(Bin(4 B, 1/3) = k), 19.8 % of 4
parts. It is no task of the ablation, whose samples end with their first fork.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from pd_jax.layout import Branch, TokenSample, members
from pd_jax.tasks.task import ASK, DIGIT, END, EQ, RANK, Task

LETTERS = 4  # of a part
ALPHABET = 3  # RANK + 0 is A
BRANCHES = 4  # at most: the total is one of 17 digits


def sample_of(parts: Sequence[Sequence[int]]) -> TokenSample:
    """Of the letters of every branch, 0 for A."""
    counts = np.cumsum(np.asarray(parts) == 0, axis=1)
    branches = [
        Branch([*(RANK + letter for letter in own), EQ], (DIGIT + count).tolist(), END)
        for own, count in zip(parts, counts, strict=True)
    ]
    return TokenSample([], branches, later=[Branch([ASK], [DIGIT + int(counts[:, -1].sum())], END)])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.integers(ALPHABET, size=(branches, LETTERS)).tolist())


def make_hidden(rng: np.random.Generator, branches: int) -> TokenSample:
    sample = make(rng, branches)
    return replace(sample, branches=[*sample.branches, *sample.later], later=())


def score(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Bool [1]: the total, which is the last answer."""
    last = members(sample.turns[-1])[-1]
    return np.array([list(answers[-1]) == list(last.answer)])


def optimum(branches: int) -> dict[str, float | None]:
    return {"isolated": 1.0, "prompts": 1.0, "columns": 1.0, "no signal": None}


def optimum_hidden(branches: int) -> dict[str, float | None]:
    letters = LETTERS * branches
    chances = [
        math.comb(letters, k) * Fraction(1, ALPHABET) ** k * Fraction(ALPHABET - 1, ALPHABET) ** (letters - k)
        for k in range(letters + 1)
    ]
    return {"isolated": float(max(chances)), "prompts": 1.0, "columns": None, "no signal": None}


TASK = Task(
    name="total",
    vocabulary=DIGIT + LETTERS * BRANCHES + 1,
    branches=BRANCHES,
    counts=range(1, BRANCHES + 1),
    make=make,
    score=score,
    optimum=optimum,
)
HIDDEN = replace(TASK, name="total, hidden", make=make_hidden, optimum=optimum_hidden)
