"""vote: every branch holds a bit, and all say what the majority of the bits is.

Branch: [own bit, ASK] -> [the bit that most branches hold]; the number of branches is odd.

isolated   1/2 + C(B - 1, (B - 1) / 2) / 2^B, 68.75 % of 5 branches: the own bit, which decides when the others tie.
prompts    100 %: the bits stand in the prompts, two columns before the answer.
columns    100 %, and the same mask as prompts: an answer is one token.
no signal  100 %: counting does not ask which bit is whose.
"""

import math
from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, DIGIT, END, Task, last_is_right


def sample_of(bits: Sequence[int]) -> TokenSample:
    majority = int(2 * sum(bits) > len(bits))
    return TokenSample([], [Branch([DIGIT + bit, ASK], [DIGIT + majority], END) for bit in bits])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.integers(2, size=branches).tolist())


def optimum(branches: int) -> dict[str, float | None]:
    alone = 1 / 2 + math.comb(branches - 1, (branches - 1) // 2) / 2**branches
    return {"isolated": alone, "prompts": 1.0, "columns": 1.0, "no signal": 1.0}


TASK = Task(
    name="vote",
    vocabulary=DIGIT + 2,
    branches=5,
    counts=range(1, 16, 2),
    make=make,
    score=last_is_right,
    optimum=optimum,
)
