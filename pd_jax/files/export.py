"""Conversion both ways: a Hugging Face model as a pd_jax directory, and ours exported, adapters merged in."""

from pathlib import Path
from typing import Any

from pd_jax.config import FAMILIES, SECTION, ModelConfig
from pd_jax.files.config_json import config_to_hf
from pd_jax.files.directories import load_config, load_params, load_tokenizer
from pd_jax.files.find import PARAMS, find_model, find_source, read_adapter_config, read_config_json
from pd_jax.files.orbax import write_checkpoint
from pd_jax.files.peft import load_adapter
from pd_jax.files.runs import making
from pd_jax.files.safetensors import Progress, write_params
from pd_jax.files.saving import check_new, write_metadata
from pd_jax.lora import merge_weight


def import_model(model: str, output: Path, dtype: Any = None, progress: Progress | None = None) -> Path:
    """Write the Hugging Face model `model`, a directory or a hub id, as the pd_jax directory `output`.

    Returns the directory it was read from. dtype None keeps every tensor bit for bit. Raises `InputError` when
    `output` holds anything, or for what `load_config` and `load_params` refuse.
    """
    check_new(output)
    source = find_model(model)
    hf = read_config_json(source)
    config = load_config(source, pair_indices=None if SECTION in hf else ())
    _check_tokenizer(source, config)
    with making(output) as stage:
        params = load_params(source, config, dtype, progress=progress)
        write_checkpoint(stage / PARAMS, params)
        # A plain model stays plain: which pairs turn with the branch is chosen when it is trained.
        write_metadata(stage, hf, source, params["embed"].dtype)
    return source


def export_model(
    checkpoint: str,
    output: Path,
    base_model: str | None = None,
    *,
    max_shard_size: int,
    progress: Progress | None = None,
) -> Path:
    """Write a pd_jax model, or an adapter merged into its base, as Hugging Face's files.

    Returns the directory it was read from, an adapter's own. max_shard_size in bytes. Raises `InputError` as
    `import_model` does.
    """
    check_new(output)
    source, adapter = find_source(checkpoint, base_model)
    hf = read_config_json(source)
    columnar = SECTION in hf or (adapter is not None and SECTION in read_adapter_config(adapter))
    config = load_config(source, pair_indices=None if columnar else (), adapter=adapter)
    _check_tokenizer(source, config)
    hf = config_to_hf(config, hf) if columnar else hf
    adapters, lora = ({}, None) if adapter is None else load_adapter(adapter, config, source)
    params = load_params(source, config, None)
    for name, part in adapters.items():  # one kind at a time: two models would not fit where one does
        assert lora is not None
        params["layers"][name] = merge_weight(params["layers"][name], part, name, lora)
    with making(output) as stage:
        write_params(stage, params, config, max_shard_size=max_shard_size, progress=progress)
        write_metadata(stage, hf, source, params["embed"].dtype)
        (stage / "README.md").write_text(model_card(hf), encoding="utf-8")
    return adapter or source


def _check_tokenizer(source: Path, config: ModelConfig) -> None:
    """Weights may be converted without a tokenizer, but not with one that needs more rows than they have."""
    if (source / "tokenizer.json").is_file() or (source / "vocab.json").is_file():
        load_tokenizer(source, config.vocab_size)


def model_card(hf: dict[str, Any]) -> str:
    """README.md of an export with the config.json `hf`: what plain transformers will and will not reproduce."""
    kind = FAMILIES[hf["model_type"]].architecture.removesuffix("ForCausalLM")
    front = f"---\nlibrary_name: pd_jax\ntags:\n- pd_jax\n- {hf['model_type']}\n- parallel-decoding\n---\n\n"
    settings = hf.get(SECTION)
    if settings is None:
        return (
            f"{front}# {kind}, converted by pd_jax\n\n"
            f"These are plain {kind} weights. transformers and pd_jax both load this directory, and give the same\n"
            "logits for ordinary text when pd_jax is told `pair_indices=()`.\n"
        )
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in settings.items())
    if settings["pair_indices"] or settings["sibling_bias"]:
        verdict = (
            "**Plain transformers does not reproduce this model.** It loads the directory as an ordinary "
            f"{kind} and\n"
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
        f"{front}# A columnar {kind}, exported by pd_jax\n\n"
        f"The weights have the names and shapes of {kind}, but they were trained to write several branches of one\n"
        "text side by side, one column at a time.\n\n"
        f"| setting (config.json, `{SECTION}`) | value |\n|---|---|\n{rows}\n\n"
        "## What transformers will and will not do\n\n"
        f"{verdict}\n\n"
        f"Tokenizer, embeddings, norms and MLPs are those of {kind}; weights can be inspected, merged and "
        "quantised.\n\n"
        "## Use\n\n"
        "```python\nfrom pd_jax import ParallelDecoder, Sample\n\n"
        'decoder = ParallelDecoder.from_pretrained("PATH_OF_THIS_DIRECTORY")  # reads the settings above\n'
        'result = decoder.generate([Sample(background="...", branches=["...", "..."])])\n```\n'
    )
