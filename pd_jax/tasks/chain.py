"""chain: a running sum, handed from branch to branch, of numbers that stand in the prompts.

Branch i: [rank i, a_i] -> [WAIT x 2(i - 1), x_i], with x_i = x_(i-1) + a_i mod 5, x_0 = 0 and a_i of 0..4.

isolated   (1 + (B - 1) / 5) / B, 40 % of 4 branches: the first branch's sum is its own number; every other one hangs on
           a number that it does not see, so that all five sums are equally likely.
prompts    100 %: all numbers are in the prompts, so that every branch can add them up itself.
columns    100 %: x_(i-1) stands two columns before x_i.
no signal  low: the rank in a branch's own prompt cannot be told from its siblings'.
"""

from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import DIGIT, END, RANK, WAIT, Task, last_is_right

BASE = 5


def sample_of(numbers: Sequence[int]) -> TokenSample:
    sums = (np.cumsum(numbers) % BASE).tolist()
    return TokenSample(
        [],
        [
            Branch([RANK + i, DIGIT + a], [*[WAIT] * (2 * i), DIGIT + x], END)
            for i, (a, x) in enumerate(zip(numbers, sums, strict=True))
        ],
    )


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.integers(BASE, size=branches).tolist())


def optimum(branches: int) -> dict[str, float | None]:
    alone = (1 + (branches - 1) / BASE) / branches
    return {"isolated": alone, "prompts": 1.0, "columns": 1.0, "no signal": None}


TASK = Task(
    name="chain",
    vocabulary=DIGIT + BASE,
    branches=4,
    counts=range(1, 9),
    make=make,
    score=last_is_right,
    optimum=optimum,
)
