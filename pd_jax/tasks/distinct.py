"""distinct: one after the other, every branch draws an item of four that nobody has said before.

Branch i: [rank i, ASK] -> [WAIT x 2(i - 1), a free draw of the items that are left]. Of distinctsame every prompt is
[ASK], behind a background [BOS]: from there branch pairs tell which branch it is. A sample is right as a whole, when
all items differ.

isolated   4! / ((4 - B)! 4^B), 9.4 % of 4 branches: to a branch that hears nothing all four items are left.
prompts    the same: the draws are in no prompt.
columns    100 %: the item before the own one stands two columns away; distinctsame needs branch pairs, for whose turn
           it is.
no signal  1 / B!, 4.2 % of 4 branches: nobody knows whose turn it is. With n branches left, the one whose turn it is
           speaks 1/n of the time. distinctsame with sibling_bias alone: still 1 / B!.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, BOS, DIGIT, END, RANK, WAIT, Task, last_tokens

ITEMS = 4


def sample_of(items: Sequence[int], same: bool) -> TokenSample:
    """Of the branches' items; `same` leaves the ranks out of the prompts."""
    answers = [[*[WAIT] * (2 * i), DIGIT + item] for i, item in enumerate(items)]
    prompts = [[ASK] if same else [RANK + i, ASK] for i in range(len(items))]
    return TokenSample([BOS] if same else [], [Branch(*texts, END) for texts in zip(prompts, answers, strict=True)])


def make(rng: np.random.Generator, branches: int, same: bool) -> TokenSample:
    return sample_of(rng.permutation(ITEMS)[:branches].tolist(), same)


def score(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Bool [1]."""
    items = last_tokens(sample, answers) - DIGIT
    return np.array([bool(((items >= 0) & (items < ITEMS)).all()) and len(set(items.tolist())) == len(items)])


def optimum(branches: int) -> dict[str, float | None]:
    alone = math.perm(ITEMS, branches) / ITEMS**branches
    return {"isolated": alone, "prompts": alone, "columns": 1.0, "no signal": 1 / math.factorial(branches)}


def _task(name: str, same: bool) -> Task:
    return Task(
        name=name,
        vocabulary=DIGIT + ITEMS,
        branches=4,
        counts=range(1, ITEMS + 1),
        make=partial(make, same=same),
        score=score,
        optimum=optimum,
        free=lambda branch, token: token == 2 * (branch - 1),
    )


TASK, SAME = _task("distinct", False), _task("distinctsame", True)
