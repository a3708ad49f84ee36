"""What looking at siblings is worth: small models on tasks whose best score is known, decoded, in every scheme.

    python scripts/ablate.py --quick       # 12 runs, a few minutes
    python scripts/ablate.py               # the whole grid; runs again where it was stopped
"""  # fmt: skip

from pd_jax.benchmarks import AblateFlags, ablate
from pd_jax.cli import parse, run

if __name__ == "__main__":
    run(lambda: ablate(parse(AblateFlags, description=__doc__)))
