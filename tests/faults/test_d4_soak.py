"""A long life in one process: resident memory and the number of compiled programs level off.

    python tests/faults/test_d4_soak.py --calls 2000 --minutes 30

makes so many decoding calls with changing shapes, then trains for so long, with checkpoints and validations, and prints
both figures as it goes. The suite runs a short one.
"""  # fmt: skip

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ

import jax
import numpy as np
import pytest
import runs
import tiny

from pd_jax import Branch, ParallelDecoder, TokenSample
from pd_jax.params import init_params
from pd_jax.training.stages import pretrain

CONFIG = tiny.config(tie_word_embeddings=False)
KNOWN = len(tiny.tokenizer())
SLACK = 0.05  # of the resident memory: what it may still grow by in the second half


class Point(NamedTuple):
    """What was there after some calls or seconds."""

    at: float
    mib: float  # resident
    programs: int  # compiled so far


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def count_programs() -> Callable[[], int]:
    """How many programs have been compiled since this call."""
    names: list[str] = []

    def note(name: str, seconds: float, **_: str | int) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: len(names)


def decode(calls: int, largest: int, say: Callable[[str], object] = print) -> list[Point]:
    """`calls` calls of up to `largest` samples of up to as many branches, of many lengths, sampled and greedy."""
    decoder = ParallelDecoder(CONFIG, init_params(CONFIG, jax.random.key(0)), tiny.tokenizer(), (KNOWN,))
    rng, programs, points = np.random.default_rng(0), count_programs(), []
    for call in range(1, calls + 1):

        def ids(most: int) -> list[int]:
            return rng.integers(0, KNOWN, rng.integers(1, most + 1)).tolist()

        branches = int(rng.integers(1, largest + 1))
        samples = [
            TokenSample(ids(16 * largest), [Branch(ids(4)) for _ in range(branches)])
            for _ in range(rng.integers(1, largest + 1))
        ]
        decoder.generate(samples, max_new_tokens=int(rng.integers(1, 12)), seed=call)
        points.append(Point(call, resident_mib(), programs()))
        if call % max(1, calls // 10) == 0:
            say(f"{call} calls: {points[-1].mib:.0f} MiB resident, {points[-1].programs} programs compiled")
    return points


def train(folder: Path, seconds: float, say: Callable[[str], object] = print) -> list[Point]:
    """A training run that is stopped so long after its first checkpoint, looked at 20 times."""
    programs, points, over = count_programs(), [], threading.Event()

    def watch() -> None:
        while not (folder / "run" / "checkpoints" / "150").is_dir() and not over.wait(0.1):
            pass  # it starts
        began = time.monotonic()
        while not over.wait(seconds / 20):
            points.append(Point(time.monotonic() - began, resident_mib(), programs()))
            say(f"{points[-1].at:.0f} s: {points[-1].mib:.0f} MiB resident, {points[-1].programs} programs compiled")
            if points[-1].at > seconds and not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    flags = runs.pretrain_flags(
        folder / "run", max_steps=10**7, save_steps=150, eval_dataset_name=runs.inputs()["web"], eval_steps=150,
        logging_steps=50, keep=1,
    )  # fmt: skip
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        pretrain(flags)
    finally:
        over.set()
        watcher.join()
    return points


def check(points: list[Point]) -> None:
    """In the second half memory hardly grows, and hardly anything is compiled in the last quarter."""
    half, quarter, end = points[len(points) // 2], points[-len(points) // 4], points[-1]
    assert end.mib <= half.mib * (1 + SLACK), f"from {half.mib:.0f} to {end.mib:.0f} MiB in the second half"
    assert end.programs - quarter.programs <= end.programs // 20, "programs are still compiled"


@pytest.mark.slow
def test_decoding():
    check(decode(100, 2))


@pytest.mark.slow
def test_training(tmp_path, one_device):
    check(train(tmp_path, 60))


def test_what_grows_is_seen():
    level = [Point(i, 100 + 10 / (1 + i), min(i, 20)) for i in range(100)]
    check(level)
    for grows in ([p._replace(mib=100 + p.at) for p in level], [p._replace(programs=int(p.at)) for p in level]):
        with pytest.raises(AssertionError, match=r"second half|still compiled"):
            check(grows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=30)
    asked = parser.parse_args()
    if asked.calls:
        check(decode(asked.calls, 2 if asked.calls < 500 else 4))
    if asked.minutes:
        with tempfile.TemporaryDirectory() as place:
            check(train(Path(place), 60 * asked.minutes))
    print("both level off")
