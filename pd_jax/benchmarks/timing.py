"""Taking turns: every contender is called in turn in one process, and the fastest call of each counts."""

import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pd_jax.machines import PeakMemory


class Contender(NamedTuple):
    """One of those that are timed."""

    call: Callable[[], Any]  # returns when its result is there, perhaps with the `Moment` of its first token
    memory: float | None = None  # MB that it needs beside its inputs, if known
    like: tuple[Any, float] | None = None  # who did part of this work before, and how many times its seconds are due
    compiles: bool = False  # the first call says nothing about those after it


class Moment(NamedTuple):
    """A point in time."""

    clock: float  # seconds of the clock, or of this process's CPU
    python: float  # seconds of the main thread's CPU

    @classmethod
    def now(cls, cpu_time: bool) -> "Moment":
        return cls((time.process_time if cpu_time else time.perf_counter)(), time.thread_time())


class Timing(NamedTuple):
    """The least of all calls of a contender, but for the memory."""

    seconds: float  # of a whole call
    first: float  # seconds until the first token
    rest: float  # seconds after it
    python: float  # seconds of the main thread's CPU after it
    megabytes: float | None  # the most that a call took beyond what was held before it; None: not known


@contextmanager
def unless_out_of_memory(name: Any) -> Generator[None]:
    """What does not fit into memory is said, and ends nothing but itself."""
    try:
        yield
    except RuntimeError as error:  # torch's and XLA's are both its kinds
        if not any(words in str(error) for words in ("out of memory", "RESOURCE_EXHAUSTED")):
            raise
        print(f"skipped: {name}: {str(error).strip().splitlines()[0][:160]}", flush=True)


def fastest(
    contenders: dict[Any, Contender], repeat: int, cpu_time: bool, patience: float = math.inf
) -> dict[Any, Timing]:
    """The fastest of `repeat` calls of each, one call of each at a time: a busy spell hits all alike.

    `cpu_time`: the time of this process counts, not that of the clock; on one core other processes then cost little.
    A call that would take a contender beyond `patience` seconds in all is not made; the first counts only where there
    is no other. What compiles is always called twice, and compiling costs no patience. What runs out of memory is said
    and called no more.
    """
    best: dict[Any, Timing] = {}
    spent: dict[Any, float] = {}
    lost: set[Any] = set()
    for turn in range(repeat + 1):
        for name, contender in contenders.items():
            like, times = (name, 1.0) if turn else contender.like or (None, 0.0)
            expected = 0.0
            if like is not None:
                expected = best[like].seconds * times if like in best else math.inf  # one that was skipped
            compiled_before = turn == 1 and contender.compiles and name in best
            if name in lost or (spent.get(name, 0.0) + expected > patience and not compiled_before):
                continue
            first = end = None
            with unless_out_of_memory(name), PeakMemory() as memory:
                start = Moment.now(cpu_time)
                first = contender.call()
                end = Moment.now(cpu_time)
            if end is None:
                lost.add(name)
                continue
            first = first if isinstance(first, Moment) else start
            timing = Timing(
                end.clock - start.clock,
                first.clock - start.clock,
                end.clock - first.clock,
                end.python - first.python,
                None if memory.beyond is None else memory.beyond / 1e6,
            )
            if turn or not contender.compiles:
                spent[name] = spent.get(name, 0.0) + timing.seconds
            old = best.get(name)
            if old is not None and turn > 1:
                most = max((m for m in (old.megabytes, timing.megabytes) if m is not None), default=None)
                timing = Timing(*map(min, timing[:4], old[:4]), most)
            best[name] = timing
    return best


def table(title: str, contenders: dict[str, Contender], timings: dict[str, Timing], reference: str) -> None:
    """Print what was timed, beside how many times as fast as `reference` it is."""
    print(f"\n{title}\n{'':28}{'ms':>10}{'x ' + reference:>22}{'MB':>10}")
    for name, contender in contenders.items():
        if name not in timings or reference not in timings:
            continue
        memory = "" if contender.memory is None else f"{contender.memory:.0f}"
        seconds = timings[name].seconds
        ratio = timings[reference].seconds / seconds  # throughput: above 1 is faster than the reference
        print(f"{name:28}{1000 * seconds:10.1f}{ratio:22.2f}{memory:>10}", flush=True)


def compiled(function: Callable, *arrays: Any) -> Contender:
    """A function of jax arrays, compiled for these."""
    import jax

    program = jax.jit(function).lower(*arrays).compile()
    analysis: Any = program.memory_analysis()
    memory = analysis.temp_size_in_bytes / 1e6
    return Contender(lambda: jax.block_until_ready(program(*arrays)), memory)


def keep_to(cores: int) -> None:
    """Keep this process on so many cores, before a library counts those it has."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["OMP_NUM_THREADS"] = str(cores)


def import_torch(threads: int = 1) -> Any:
    """torch on so many threads, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch
