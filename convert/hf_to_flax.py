"""Convert a Hugging Face model into a pd_jax model directory: orbax `params/`, config.json and tokenizer files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Flags:
    model: str | None = flag(None, "Hugging Face directory or hub id of a Qwen3, Qwen2, Llama or Mistral; required")
    output: str | None = flag(None, "directory to write, which must not exist yet; required")
    dtype: Literal["stored", "float32", "bfloat16"] = flag(
        "stored", "dtype of the converted weights; stored keeps every tensor bit for bit"
    )


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.model is None or flags.output is None:
        raise InputError("--model and --output are both needed, see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the model need not fit on an accelerator to be converted
    from rich.progress import Progress

    from pd_jax.files import import_model

    output, dtype = Path(flags.output), None if flags.dtype == "stored" else flags.dtype
    with Progress() as bar:
        task = bar.add_task("", total=None)
        source = import_model(flags.model, output, dtype, lambda name: bar.update(task, advance=1, description=name))
    print(f"{source} -> {output}")


if __name__ == "__main__":
    run(main)
