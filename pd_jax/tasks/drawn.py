"""drawn: a running sum, handed from branch to branch, of what every branch has drawn itself.

Branch i: [rank i, ASK] -> [a free draw a_i of 0..4, WAIT x (2i - 1), x_i], with x_i = x_(i-1) + a_i mod 5 and x_0 = 0.

isolated   (1 + (B - 1) / 5) / B, 40 % of 4 branches: the first branch's sum is its own draw; every other one hangs on a
           draw that it does not see, so that all five sums are equally likely.
prompts    the same: the draws are in no prompt.
columns    100 %: x_(i-1) stands two columns before x_i.
no signal  low: the rank in a branch's own prompt cannot be told from its siblings'.
"""

from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, DIGIT, END, RANK, WAIT, Task, last_tokens

BASE = 5


def sample_of(draws: Sequence[int]) -> TokenSample:
    sums = (np.cumsum(draws) % BASE).tolist()
    answers = [[DIGIT + a, *[WAIT] * (2 * i + 1), DIGIT + x] for i, (a, x) in enumerate(zip(draws, sums, strict=True))]
    return TokenSample([], [Branch([RANK + i, ASK], answer, END) for i, answer in enumerate(answers)])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.integers(BASE, size=branches).tolist())


def score(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Sums of the draws that were decoded, not of the sample's; where one is no draw, no sum from there on is right."""
    draws = np.array([answer[0] - DIGIT if len(answer) else -1 for answer in answers])
    drawn = np.logical_and.accumulate((draws >= 0) & (draws < BASE))
    return drawn & (last_tokens(sample, answers) == DIGIT + np.cumsum(draws) % BASE)


def optimum(branches: int) -> dict[str, float | None]:
    alone = (1 + (branches - 1) / BASE) / branches
    return {"isolated": alone, "prompts": alone, "columns": 1.0, "no signal": None}


TASK = Task(
    name="drawn",
    vocabulary=DIGIT + BASE,
    branches=4,
    counts=range(1, 9),
    make=make,
    score=score,
    optimum=optimum,
    free=lambda branch, token: token == 0,
)
