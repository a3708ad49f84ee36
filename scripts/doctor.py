"""Does it work on this machine, and how fast? Nothing is downloaded; exit code 1 when anything is wrong.

    python scripts/doctor.py
    python scripts/doctor.py --quick             # fewer and smaller checks
    python scripts/doctor.py --output report.json
"""  # fmt: skip

import os

from pd_jax.benchmarks import DoctorFlags, examine
from pd_jax.cli import parse, run


def main() -> None:
    flags = parse(DoctorFlags, description=__doc__)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # the reference
    if not examine(flags):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
