"""Convert a GGUF file (llama.cpp) into a Hugging Face directory: dequantised weights, config.json and tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path

from pd_jax.cli import flag, parse, run
from pd_jax.config import Dtype
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Flags:
    gguf: str | None = flag(None, "GGUF file; required")
    output: str | None = flag(None, "directory to write, which must not exist yet; required")
    dtype: Dtype = flag("float32", "dtype of the dequantised weights")


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.gguf is None or flags.output is None:
        raise InputError("--gguf and --output are both needed, see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed
    from pd_jax.files import import_gguf

    converted = import_gguf(Path(flags.gguf), Path(flags.output), flags.dtype)
    print(f"{converted.tensors}; an answer ends with any of {', '.join(map(str, converted.eos))}")
    print(f"{flags.gguf} -> {flags.output}")


if __name__ == "__main__":
    run(main)
