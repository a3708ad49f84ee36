"""Time this project on this machine: every contender in one process, taking turns, reported as ratios.

    python scripts/benchmark.py attention                      # backends against plain causal attention, and torch
    python scripts/benchmark.py attention --tokens 4096 --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128
    python scripts/benchmark.py decode                         # columns against transformers, one by one and batched
    python scripts/benchmark.py train                          # training steps against transformers and torch
    python scripts/benchmark.py columns                        # a job split over branches against one branch
    python scripts/benchmark.py sessions                       # a text read once for many forks against every time
    python scripts/benchmark.py train --model Qwen/Qwen3-4B --use-lora --seq-length 256 --batch-size 4 --remat full
    python scripts/benchmark.py decode --model Qwen/Qwen3-0.6B --threads 2 --background 128 1024 --output decode.json
"""  # fmt: skip

import os
import sys
from collections.abc import Callable
from typing import Any

from pd_jax.benchmarks import (
    AttentionFlags,
    ColumnsFlags,
    DecodeFlags,
    SessionsFlags,
    TrainFlags,
    keep_to,
    time_attention,
    time_columns,
    time_decoding,
    time_sessions,
    time_training,
)
from pd_jax.cli import parse, run
from pd_jax.errors import InputError

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "attention": (AttentionFlags, time_attention),
    "columns": (ColumnsFlags, time_columns),
    "decode": (DecodeFlags, time_decoding),
    "sessions": (SessionsFlags, time_sessions),
    "train": (TrainFlags, time_training),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)} (each has --help)")
        return
    if name not in COMMANDS:
        raise InputError(f"command {name!r} is not one of {', '.join(COMMANDS)}")
    # torch and JAX share the accelerator: JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags, command = COMMANDS[name]
    parsed = parse(flags, sys.argv[2:], description=__doc__)
    keep_to(getattr(parsed, "threads", 1))
    command(parsed)


if __name__ == "__main__":
    run(main)
