"""lookup, the control: every branch looks a key up in the background. Siblings are of no use, only in the way.

Background: 6 facts (key, v1, v2), keys different, values any of 16. Branch: [ASK, key] -> [v1, v2], keys different.

isolated   100 %: a branch needs its own prompt and the background, nothing of its siblings.
prompts    100 %, for the same reason.
columns    100 %, for the same reason.
no signal  v1 is always right. At v1 a branch sees the keys that were asked as one heap: where m asked keys share its
           v1, any of their m second values may be its own, and the most frequent one is the best guess. 91.6 % of 4
           branches; 100 % of one.
"""

import math
from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, END, NAME, SECRET, Task

FACTS, KEYS, VALUES = 6, 8, 16


def sample_of(facts: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> TokenSample:
    """Of the facts (key, v1, v2), and of which fact (from 0) every branch is asked about."""
    tokens = [[NAME + key, SECRET + v1, SECRET + v2] for key, v1, v2 in facts]
    background = [token for fact in tokens for token in fact]
    return TokenSample(background, [Branch([ASK, tokens[fact][0]], tokens[fact][1:], END) for fact in asked])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    keys = rng.permutation(KEYS)[:FACTS].tolist()
    facts = [(key, *rng.integers(VALUES, size=2).tolist()) for key in keys]
    return sample_of(facts, rng.permutation(FACTS)[:branches].tolist())


def score(sample: TokenSample, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Both values must be right."""
    return np.array([list(a) == list(b.answer) for b, a in zip(sample.branches, answers, strict=True)])


def _most_frequent(m: int, values: int) -> float:
    """The expected share of the most frequent one among m values, each drawn from `values`."""

    def at_most(t: int) -> float:
        """P(no value is there more than t times): m! / values^m times the z^m of (sum_(j <= t) z^j / j!)^values."""
        series = np.polynomial.polynomial.polypow([1 / math.factorial(j) for j in range(t + 1)], values)
        return float(series[m]) * math.factorial(m) / values**m

    return 1 - sum(at_most(t) for t in range(1, m)) / m


def optimum(branches: int, values: int = VALUES) -> dict[str, float | None]:
    siblings = branches - 1
    share = [math.comb(siblings, n) * (values - 1) ** (siblings - n) / values**siblings for n in range(branches)]
    heap = sum(p * _most_frequent(n + 1, values) for n, p in enumerate(share))
    return {"isolated": 1.0, "prompts": 1.0, "columns": 1.0, "no signal": heap}


TASK = Task(
    name="lookup",
    vocabulary=SECRET + VALUES,
    branches=4,
    counts=range(1, FACTS + 1),
    make=make,
    score=score,
    optimum=optimum,
)
