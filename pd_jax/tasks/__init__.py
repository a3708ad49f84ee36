"""Tasks of a few integers in which looking at siblings has a price that can be proven: the best score is known.

`TASKS[name].samples(seed, count)` makes samples, `layout.unanswered` takes their answers away for decoding, and
`TASKS[name].score(sample, answers)` judges what was decoded. Every task is one file.
"""

from pd_jax.tasks import chain, distinct, drawn, lookup, neighbour, number, odd, relay, vote
from pd_jax.tasks.task import END, PAD, VOCABULARY, Task

__all__ = ["END", "PAD", "TASKS", "VOCABULARY", "Task"]

TASKS: dict[str, Task] = {
    "drawn": drawn.TASK,
    "chain": chain.TASK,
    "odd": odd.TASK,
    "relay": relay.TASK,
    "neighbour": neighbour.TASK,
    "number": number.TASK,
    "distinct": distinct.TASK,
    "distinctsame": distinct.SAME,
    "vote": vote.TASK,
    "lookup": lookup.TASK,
}
