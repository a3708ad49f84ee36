"""Small training runs, in this process or in others."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import tiny

from pd_jax.training import FinetuneFlags, PretrainFlags, TrainFlags

ROOT = Path(__file__).parents[1]


@cache
def inputs() -> dict[str, str]:
    """A base without weights and data for both stages."""
    folder = Path(mkdtemp(prefix="pd_jax-"))
    return {
        "base": str(tiny.model_directory(folder / "base")),
        "web": str(tiny.documents(folder / "web.jsonl")),
        "squad": str(tiny.squad(folder / "squad.json")),
    }


def pretrain_flags(output: Path, **changes) -> PretrainFlags:
    """12 steps on one row of 2 x 8 tokens, on one device."""
    flags = PretrainFlags(
        model_name=inputs()["base"],
        random_init=True,
        dataset_name=inputs()["web"],
        output_dir=str(output),
        branch_count=2,
        seq_length=8,
        max_steps=12,
        logging_steps=1,
        mesh=(1, 1, 1),
    )
    return dataclasses.replace(flags, **changes)


def finetune_flags(output: Path, **changes) -> FinetuneFlags:
    flags = FinetuneFlags(
        model_name=inputs()["base"],
        dataset_name=inputs()["squad"],
        eval_dataset_name=inputs()["squad"],
        output_dir=str(output),
        max_length=128,
        logging_steps=1,
        mesh=(1, 1, 1),
    )
    return dataclasses.replace(flags, **changes)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(output)]


def launch(flags: TrainFlags, devices: int = 1, **settings) -> subprocess.Popen:
    """The script of `flags` in a process of its own."""
    script = "pretrain" if isinstance(flags, PretrainFlags) else "finetune"
    argv = [sys.executable, f"scripts/{script}.py"]
    for name, value in dataclasses.asdict(flags).items():
        if value != getattr(type(flags)(), name):
            option = f"--{name.replace('_', '-')}"
            argv += [option] if value is True else [option, *map(str, value if isinstance(value, tuple) else [value])]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)
