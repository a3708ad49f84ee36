"""neighbour: every branch says the secret of the branch before it. Only the branch axis tells which one that is.

Branch i: [own secret, ASK] -> [the secret of branch i-1], NONE for the first; secrets are all different.

isolated   1/B, 25 % of 4 branches: branch pairs tell how far away a token's branch is, and a branch that sees its own
           tokens only does not know which one it is. NONE is right for the first.
prompts    100 %: secrets stand in the prompts, two columns before the answer.
columns    100 %, and the same mask as prompts: an answer is one token.
no signal  1/B, 25 % of 4 branches: all say the same, and every answer is right for one branch. With sibling_bias alone
           still 1/B: a branch knows its own secret, and has no order in which to put the siblings'.
"""

from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import ASK, END, NONE, SECRET, Task, last_is_right

SECRETS = 8


def sample_of(secrets: Sequence[int]) -> TokenSample:
    tokens = [SECRET + secret for secret in secrets]
    before = [NONE, *tokens[:-1]]
    return TokenSample([], [Branch([own, ASK], [other], END) for own, other in zip(tokens, before, strict=True)])


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.permutation(SECRETS)[:branches].tolist())


def optimum(branches: int) -> dict[str, float | None]:
    return {"isolated": 1 / branches, "prompts": 1.0, "columns": 1.0, "no signal": 1 / branches}


TASK = Task(
    name="neighbour",
    vocabulary=SECRET + SECRETS,
    branches=4,
    counts=range(1, SECRETS + 1),
    make=make,
    score=last_is_right,
    optimum=optimum,
)
