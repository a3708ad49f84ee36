"""Columnar pretraining on web documents: segments become branches that unfold side by side."""

from pd_jax.cli import parse, run
from pd_jax.training import PretrainFlags


def main() -> None:
    flags = parse(PretrainFlags, description=__doc__)
    from pd_jax.training import pretrain  # after parsing: --help does not wait for jax

    pretrain(flags)


if __name__ == "__main__":
    run(main)
