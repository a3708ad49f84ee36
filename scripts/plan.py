"""What a training run would need on a machine that is not there: memory, traffic and the least time of a step.

python scripts/plan.py --model Qwen/Qwen3-4B --topology v5e:4x4
"""

import os

from pd_jax.cli import parse, run
from pd_jax.flags import PlanFlags


def main() -> None:
    flags = parse(PlanFlags, description=__doc__)
    # The compilers are asked for by name; no device is looked for, and none has to be there.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from pathlib import Path

    from pd_jax.checkpoint import load_config
    from pd_jax.plan import model_config, plan_training, report, topology

    config = load_config(Path(flags.model)) if Path(flags.model).is_dir() else model_config(flags.model)
    devices = len(topology(flags.topology)[1])
    tokens = flags.batch_size * flags.gradient_accumulation_steps * flags.branch_count * flags.seq_length
    kind = f"LoRA r={flags.lora_r}" if flags.use_lora else "all weights"
    name = f"{flags.model}, {kind}, {tokens} tokens a step, {flags.topology}"
    print(report(name, plan_training(flags, config), tokens, devices))


if __name__ == "__main__":
    run(main)
