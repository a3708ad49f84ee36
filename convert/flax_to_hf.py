"""Export a pd_jax model directory as Hugging Face safetensors; a LoRA adapter is merged into its base first."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Flags:
    checkpoint: str | None = flag(None, "model or adapter directory that pd_jax (or PEFT) wrote; required")
    output: str | None = flag(None, "directory to write, which must not exist yet; required")
    max_shard_size: str = flag("5GB", "largest safetensors file, in B, KB, MB, GB or KiB, MiB, GiB")
    base_model: str | None = flag(None, "base of an adapter, if not the one that its adapter_config.json names")


def model_card(hf: dict[str, Any]) -> str:
    """README.md of an export with the config.json `hf`: what plain transformers will and will not reproduce."""
    from pd_jax.config import SECTION

    front = "---\nlibrary_name: pd_jax\ntags:\n- pd_jax\n- qwen3\n- parallel-decoding\n---\n\n"
    settings = hf.get(SECTION)
    if settings is None:
        return (
            f"{front}# Qwen3, converted by pd_jax\n\n"
            "These are plain Qwen3 weights. transformers and pd_jax both load this directory, and give the same\n"
            "logits for ordinary text when pd_jax is told `pair_indices=()`.\n"
        )
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in settings.items())
    if settings["pair_indices"] or settings["sibling_bias"]:
        verdict = (
            "**Plain transformers does not reproduce this model.** It loads the directory as an ordinary Qwen3 and\n"
            "says little or nothing, but turns every RoPE pair with the position; here some pairs turn with the\n"
            "number of the branch, and tokens of one column do not see one another. Logits differ even for text\n"
            "without branches, and generated text will be worse than it should be."
        )
        if settings["sibling_bias"]:
            verdict += "\nIt also drops the tensors `self_attn.sibling_bias`, which it does not know."
    else:
        verdict = (
            "Plain transformers reproduces the logits of ordinary text (one branch). Several branches need the\n"
            "columns as `position_ids` and the column mask as a 4D float mask; `generate()` knows neither."
        )
    return (
        f"{front}# A columnar Qwen3, exported by pd_jax\n\n"
        "The weights have the names and shapes of Qwen3, but they were trained to write several branches of one text\n"
        "side by side, one column at a time.\n\n"
        f"| setting (config.json, `{SECTION}`) | value |\n|---|---|\n{rows}\n\n"
        "## What transformers will and will not do\n\n"
        f"{verdict}\n\n"
        "Tokenizer, embeddings, norms and MLPs are those of Qwen3; weights can be inspected, merged and quantised.\n\n"
        "## Use\n\n"
        "```python\nfrom pd_jax import ParallelDecoder, Sample\n\n"
        'decoder = ParallelDecoder.from_pretrained("PATH_OF_THIS_DIRECTORY")  # reads the settings above\n'
        'result = decoder.generate([Sample(background="...", branches=["...", "..."])])\n```\n'
    )


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.checkpoint is None or flags.output is None:
        raise InputError("--checkpoint and --output are both needed, see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the model need not fit on an accelerator to be exported
    from rich.progress import Progress

    from pd_jax.config import SECTION
    from pd_jax.files import (
        ADAPTER_CONFIG,
        check_new,
        find_model,
        key_table,
        load_adapter,
        load_config,
        load_params,
        parse_size,
        read_adapter_config,
        read_config_json,
        staging,
        write_metadata,
        write_params,
    )
    from pd_jax.lora import merge_kernel

    output, shard_size = Path(flags.output), parse_size(flags.max_shard_size)
    check_new(output)
    checkpoint = source = find_model(flags.checkpoint)
    adapter = checkpoint if (checkpoint / ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        source = find_model(flags.base_model or read_adapter_config(adapter).get("base_model_name_or_path") or "")
    elif flags.base_model is not None:
        raise InputError(f"--base-model belongs to an adapter, and {checkpoint} has no {ADAPTER_CONFIG}; leave it out")
    hf = read_config_json(source)
    columnar = SECTION in hf or (adapter is not None and SECTION in read_adapter_config(adapter))
    config = load_config(source, pair_indices=None if columnar else (), adapter=adapter)
    hf = config.to_hf(hf) if columnar else hf
    adapters, lora = ({}, None) if adapter is None else load_adapter(adapter, config, source)
    params = load_params(source, config, None)
    for name, part in adapters.items():  # one kind at a time: two models would not fit where one does
        assert lora is not None
        params["layers"][name] = merge_kernel(params["layers"][name], part, name, lora)
    with staging(output) as stage:
        with Progress() as bar:
            task = bar.add_task("", total=len(key_table(config)))
            write_params(stage, params, config, shard_size, lambda name: bar.update(task, advance=1, description=name))
        write_metadata(stage, hf, source, params["embed"].dtype)
        (stage / "README.md").write_text(model_card(hf), encoding="utf-8")
    print(f"{checkpoint} -> {output}")


if __name__ == "__main__":
    run(main)
