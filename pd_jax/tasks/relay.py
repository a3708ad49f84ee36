"""relay: every branch holds a name and a secret, and is asked for the secret that belongs to a sibling's name.

Branch: [own name, own secret, ASK, a sibling's name] -> [that sibling's secret]; names and secrets are all different.

isolated   1/7 = 14.3 %: any of the 8 secrets but the own one.
prompts    100 %: names and secrets stand in the prompts, two columns before the answer and earlier.
columns    100 %, and the same mask as prompts: an answer is one token.
no signal  1/B, 25 % of 4 branches: a branch sees the names and the secrets as two heaps, and cannot tell which secret
           goes with which name. (One that knows its own but not who said what is right 1/(B - 1) of the time.)
"""

from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, END, NAME, SECRET, Task, last_is_right

NAMES, SECRETS = 4, 8


def sample_of(names: Sequence[int], secrets: Sequence[int], asked: Sequence[int]) -> TokenSample:
    """Of the names and secrets of the branches, and of which branch (from 0) every branch is asked about."""
    return TokenSample(
        [],
        [
            Branch([NAME + name, SECRET + secret, ASK, NAME + names[other]], [SECRET + secrets[other]], END)
            for name, secret, other in zip(names, secrets, asked, strict=True)
        ],
    )


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    own = np.arange(branches)
    asked = (own + rng.integers(1, branches, size=branches)) % branches
    return sample_of(rng.permutation(NAMES)[own].tolist(), rng.permutation(SECRETS)[own].tolist(), asked.tolist())


def optimum(branches: int, secrets: int = SECRETS) -> dict[str, float | None]:
    return {"isolated": 1 / (secrets - 1), "prompts": 1.0, "columns": 1.0, "no signal": 1 / branches}


TASK = Task(
    name="relay",
    vocabulary=SECRET + SECRETS,
    branches=4,
    counts=range(2, NAMES + 1),
    make=make,
    score=last_is_right,
    optimum=optimum,
)
