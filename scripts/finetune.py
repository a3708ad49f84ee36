"""Finetuning on questions grouped by context: the context is shared, every question is a branch."""

from pd_jax.cli import parse, run
from pd_jax.training import FinetuneFlags


def main() -> None:
    flags = parse(FinetuneFlags, description=__doc__)
    from pd_jax.training import finetune  # after parsing: --help does not wait for jax

    finetune(flags)


if __name__ == "__main__":
    run(main)
