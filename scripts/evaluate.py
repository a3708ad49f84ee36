"""Compare ways of answering the same questions: transformers one by one, batched or in one prompt, and in columns.

    python scripts/evaluate.py --base-model Qwen/Qwen3-0.6B --ft-model ./parallel-decoder-squad
    python scripts/evaluate.py --from evaluation/results.json
"""  # fmt: skip

import os

from pd_jax.cli import parse, run
from pd_jax.evaluation import EvaluateFlags


def main() -> None:
    # torch and JAX share the accelerator: JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = parse(EvaluateFlags, description=__doc__)
    from pd_jax.evaluation import evaluate  # after parsing: --help does not wait

    evaluate(flags)


if __name__ == "__main__":
    run(main)
