"""Fewer columns for the same work: a job that is split over branches against the same job in one branch."""

from dataclasses import dataclass, replace
from typing import Any

from pd_jax.benchmarks.ablation import Cell, Recipe, run_cell
from pd_jax.benchmarks.models import shape_of, tokens_only
from pd_jax.benchmarks.timing import Contender, fastest
from pd_jax.cli import flag
from pd_jax.layout import unanswered
from pd_jax.tasks import Task, odd

VOCABULARY = 4096  # of the model that is timed
STEPS = 1500  # of training, at most


@dataclass(frozen=True)
class ColumnsFlags:
    chunks: tuple[int, ...] = flag((4, 8, 16), "chunks of 4 bits that a job has, and branches that share it", minimum=2)
    train: tuple[int, ...] = flag((4,), "for which of them small models are trained, minutes each; 0: for none")
    threads: int = flag(1, "on a CPU: 1 counts the process's own time, more the clock's", minimum=1)
    repeat: int = flag(5, "calls of which the fastest counts", minimum=1)


def time_columns(flags: ColumnsFlags) -> None:
    """Columns, decoded accuracy of small models that have learned the job, and the time of a model of random weights
    that is large enough for its weights to be what a column reads."""
    import jax
    from rich.console import Console
    from rich.table import Table

    from pd_jax.decoding import ParallelDecoder
    from pd_jax.params import init_params

    config = replace(shape_of("29m"), vocab_size=VOCABULARY, pair_indices=(4, 8, 12))
    params = init_params(config, jax.random.key(0, impl="rbg"))
    decoder = ParallelDecoder(config, params, tokens_only(VOCABULARY), ())  # no token ends a branch
    jobs = {n: (replace(odd.TASK, branches=n), odd.serial(n)) for n in flags.chunks}
    contenders: dict[Any, Contender] = {}
    columns: dict[Any, int] = {}
    for n, tasks in jobs.items():
        for task in tasks:
            (sample,) = task.samples(0, 1)
            key, columns[n, task.name] = (n, task.name), len(sample.branches[0].answer)
            prompts, new = unanswered(sample), columns[key]
            contenders[key] = Contender(
                lambda prompts=prompts, new=new: decoder.generate([prompts], max_new_tokens=new), compiles=True
            )
    timings = fastest(contenders, flags.repeat, cpu_time=flags.threads == 1)
    table = Table(title="odd: the parities of chunks of 4 bits, and how many are odd; 27M model, random weights")
    for name in ("bits", "job", "columns", "ms", "times as fast", "learned: decoded, %", "at step"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for n, (split, alone) in jobs.items():
        for task, job in ((alone, "1 branch"), (split, f"{n} branches")):
            seconds, serial = timings[n, task.name].seconds, timings[n, alone.name].seconds
            cells = [
                str(odd.BITS * n),
                job,
                str(columns[n, task.name]),
                f"{1e3 * seconds:.1f}",
                f"{serial / seconds:.2f}",
            ]
            table.add_row(*cells, *(_learned(task) if n in flags.train else ("", "")))
    Console(width=110).print(table)


def _learned(task: Task) -> tuple[str, str]:
    """Decoded accuracy of a small model, and the step at which it was at the optimum."""
    recipe = Recipe(steps=STEPS, batch=32 if task.branches <= 4 else 16)
    (run,) = run_cell(Cell("odd", "pairs1", "columns"), [0], recipe, task)
    return f"{100 * run['accuracy']['columns']:.1f}", str(run["steps"]) if run["solved"] else f"not in {run['steps']}"
