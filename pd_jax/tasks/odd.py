"""odd: map and reduce; every branch finds the parity of its own bits, then all say how many parities are odd.

Branch: [4 bits, EQ] -> [the parity of the first bit, of the first two, ... of all four, EQ, how many branches are odd].

isolated   max_k P(Bin(B - 1, 1/2) = k), 37.5 % of 4 branches: the own parity is known, the siblings' are fair coins.
prompts    100 %: all bits are in the prompts (and it is hard to learn: every branch does all of the work itself).
columns    100 %: the siblings' parities stand two columns before the count.
no signal  low: the own bits cannot be told from the siblings', and so neither can the parities that lead to the count.
"""

import math
from collections.abc import Sequence

import numpy as np

from pd_jax.layout import Branch, TokenSample
from pd_jax.tasks.task import DIGIT, END, EQ, Task, last_is_right

BITS = 4
BRANCHES = 16  # at most: as many as there are digits for the count


def sample_of(bits: Sequence[Sequence[int]]) -> TokenSample:
    """Of the bits of every branch; any number of them."""
    parities = np.cumsum(bits, axis=1) % 2
    count = int(parities[:, -1].sum())
    return TokenSample(
        [],
        [
            Branch([*(DIGIT + bit for bit in own), EQ], [*(DIGIT + parity).tolist(), EQ, DIGIT + count], END)
            for own, parity in zip(bits, parities, strict=True)
        ],
    )


def make(rng: np.random.Generator, branches: int) -> TokenSample:
    return sample_of(rng.integers(2, size=(branches, BITS)).tolist())


def optimum(branches: int) -> dict[str, float | None]:
    siblings = branches - 1
    return {
        "isolated": math.comb(siblings, siblings // 2) / 2**siblings,
        "prompts": 1.0,
        "columns": 1.0,
        "no signal": None,
    }


TASK = Task(
    name="odd",
    vocabulary=DIGIT + BRANCHES + 1,
    branches=4,
    counts=range(1, BRANCHES + 1),
    make=make,
    score=last_is_right,
    optimum=optimum,
)


def serial(chunks: int) -> Task:
    """The same job of so many chunks of bits in one branch: all bits, then all parities one after the other, EQ and the
    count. Nothing is hidden from it in any visibility; it takes `chunks` times the columns, nearly."""

    def make_serial(rng: np.random.Generator, branches: int) -> TokenSample:
        parts = make(rng, chunks).branches
        parities = [token for part in parts for token in part.answer[:BITS]]
        prompt = [*(token for part in parts for token in part.prompt[:BITS]), EQ]
        return TokenSample([], [Branch(prompt, [*parities, *parts[0].answer[BITS:]], END)])

    return Task(
        name=f"odd in one branch, {chunks} chunks",
        vocabulary=DIGIT + BRANCHES + 1,
        branches=1,
        counts=range(1, 2),
        make=make_serial,
        score=last_is_right,
        optimum=lambda branches: dict.fromkeys(("isolated", "prompts", "columns", "no signal"), 1.0),
    )
