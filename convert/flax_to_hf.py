"""Export a pd_jax model directory as Hugging Face safetensors; a LoRA adapter is merged into its base first."""

import os
from dataclasses import dataclass
from pathlib import Path

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Flags:
    checkpoint: str | None = flag(None, "model or adapter directory that pd_jax (or PEFT) wrote; required")
    output: str | None = flag(None, "directory to write, which must not exist yet; required")
    max_shard_size: str = flag("5GB", "largest safetensors file, in B, KB, MB, GB or KiB, MiB, GiB")
    base_model: str | None = flag(None, "base of an adapter, if not the one that its adapter_config.json names")


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.checkpoint is None or flags.output is None:
        raise InputError("--checkpoint and --output are both needed, see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the model need not fit on an accelerator to be exported
    from rich.progress import Progress

    from pd_jax.files import export_model, parse_size

    output, shard_size = Path(flags.output), parse_size(flags.max_shard_size)
    with Progress() as bar:
        task = bar.add_task("", total=None)
        source = export_model(
            flags.checkpoint,
            output,
            flags.base_model,
            max_shard_size=shard_size,
            progress=lambda name: bar.update(task, advance=1, description=name),
        )
    print(f"{source} -> {output}")


if __name__ == "__main__":
    run(main)
