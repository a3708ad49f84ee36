"""number: identical prompts; branch i says the i-th number of the background. Only the branch axis tells who is who.

Background: [BOS, x_1, ... x_B], all different. Branch i: [ASK] -> [x_i].

isolated   100 % with branch pairs: a branch needs its own number and the background, nothing of its siblings.
prompts    100 % with branch pairs, for the same reason.
columns    100 % with branch pairs, for the same reason.
no signal  1/B, 25 % of 4 branches, whatever they see: branches with identical prompts are the same branch, so all say
           the same, and every x is right for one of them. With sibling_bias alone still 1/B.
"""

from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, BOS, DIGIT, END, Task, last_is_right

NUMBERS = 8


def sample_of(numbers: Sequence[int]) -> TokenSample:
    tokens = [DIGIT + number for number in numbers]
    return TokenSample([BOS, *tokens], [Branch([ASK], [token], END) for token in tokens])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.permutation(NUMBERS)[:branches].tolist())


def optimum(branches: int) -> dict[str, float | None]:
    return {"isolated": 1.0, "prompts": 1.0, "columns": 1.0, "no signal": 1 / branches}


TASK = Task(
    name="number",
    vocabulary=DIGIT + NUMBERS,
    branches=4,
    counts=range(1, NUMBERS + 1),
    make=make,
    score=last_is_right,
    optimum=optimum,
)
