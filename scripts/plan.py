"""What training and decoding would need on a machine that is not there: memory, traffic, the least time of a step.

python scripts/plan.py --model Qwen/Qwen3-4B --topology v5e:4x4
"""

import os

from pd_jax.cli import parse, run
from pd_jax.planning import PlanFlags


def main() -> None:
    flags = parse(PlanFlags, description=__doc__)
    # The compilers are asked for by name; no device is looked for, and none has to be there.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "none",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from pathlib import Path

    from pd_jax.files import known_config, load_config
    from pd_jax.planning import plan_decoding, plan_training, report

    config = load_config(Path(flags.model)) if Path(flags.model).is_dir() else known_config(flags.model)
    kind = f"LoRA r={flags.lora_r}" if flags.use_lora else "all weights"
    name = f"{flags.model} on {flags.topology}"
    plan = plan_training(flags, config)
    print(report(f"{name}, training {kind}, {plan.tokens} tokens a step", plan), flush=True)
    length = flags.branch_count * flags.seq_length
    plan = plan_decoding(flags, config)
    print(report(f"{name}, decoding {plan.tokens} branches behind a row of {length} tokens", plan))


if __name__ == "__main__":
    run(main)
