"""Finding a model: a directory or a hub id, an adapter and the base that it belongs to, and what identifies them."""

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from pd_jax.config import SECTION
from pd_jax.errors import InputError
from pd_jax.files.checks import COUNT, COUNTS, FLAG, NUMBER, OBJECT, TEXT, TEXTS, check_fields, read_json

log = logging.getLogger(__name__)

PARAMS = "params"  # the orbax checkpoint inside a model directory
ADAPTER_CONFIG = "adapter_config.json"  # what makes a directory a LoRA adapter
BASE_FINGERPRINT = "base_fingerprint"  # in our section of adapter_config.json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # weights in one file, and in shards
DECIDING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
)

# What the keys that we read may hold.
MODEL_KEYS = {
    "model_type": TEXT,
    "architectures": TEXTS,
    "layer_types": TEXTS,
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), COUNT),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"), COUNT),
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "tie_word_embeddings": FLAG,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    SECTION: OBJECT,
}
LLAMA3 = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS = {
    **dict.fromkeys(("rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor", *LLAMA3), NUMBER),
    "original_max_position_embeddings": COUNT,
    "rope_type": TEXT,
    "type": TEXT,
    "truncate": FLAG,
}
OUR_KEYS = {"pair_indices": COUNTS, "branch_stride": NUMBER, "sibling_bias": FLAG, "visibility": TEXT, "align": TEXT}
ADAPTER_KEYS = {
    "base_model_name_or_path": TEXT,
    "r": COUNT,
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "use_rslora": FLAG,
    SECTION: OBJECT,
}


def find_model(path_or_hub_id: str, local_files_only: bool = False) -> Path:
    """A directory as it is, or the local snapshot of a hub id (downloaded unless `local_files_only`).

    Raises `InputError` when there is neither.
    """
    directory = Path(path_or_hub_id).expanduser()
    if directory.is_dir():
        return directory
    name = str(path_or_hub_id)
    if directory.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is not a directory; pass a model directory or a hub id like Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE", f"{PARAMS}/*"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name} is no directory here and could not be had from the hub ({type(error).__name__}: {reason}); "
            "pass a local model directory, or download it first"
        ) from None


class ModelSource(NamedTuple):
    """Where weights are: a model directory and, perhaps, an adapter that belongs to it."""

    model: Path
    adapter: Path | None = None


def find_source(
    name: str, base_model: str | None = None, local_files_only: bool = False, *, flag: str = "--base-model"
) -> ModelSource:
    """The source that `name` stands for: a model, or a LoRA adapter with its base. Directories or hub ids.

    An adapter's base is `base_model`, else what its adapter_config.json names. Raises `InputError` when there is no
    base to be found, or one is given and `name` is no adapter; `flag` is what the user gives the base with.
    """
    directory = find_model(name, local_files_only)
    if not (directory / ADAPTER_CONFIG).is_file():
        if base_model is not None:
            raise InputError(f"{flag} {base_model} is given, but {name} is no LoRA adapter; leave it out")
        return ModelSource(directory)
    base = base_model or read_adapter_config(directory).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{name} does not name the model that it adapts; pass it as {flag}")
    return ModelSource(find_model(base, local_files_only), directory)


def read_config_json(directory: Path) -> dict[str, Any]:
    """A model directory's config.json, its keys checked."""
    path = directory / "config.json"
    hf = read_json(path, "; pass a Hugging Face model directory or a pd_jax checkpoint", MODEL_KEYS)
    for name, kinds in (("rope_parameters", ROPE_KEYS), ("rope_scaling", ROPE_KEYS), (SECTION, OUR_KEYS)):
        _check_part(path, hf, name, kinds)
    return hf


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """A LoRA directory's adapter_config.json, its keys checked."""
    path = directory / ADAPTER_CONFIG
    peft = read_json(path, "; pass the directory of a LoRA adapter", ADAPTER_KEYS)
    _check_part(path, peft, SECTION, OUR_KEYS | {"rope_theta": NUMBER, BASE_FINGERPRINT: TEXT})
    return peft


def _check_part(path: Path, content: dict[str, Any], name: str, kinds: dict) -> None:
    """Check the object `name` in `content`; null is as good as absent, in it and for it."""
    if name in content:
        part = content[name] or {}
        check_fields(f"{path}: {name}", part, kinds)
        if name == SECTION:
            content[name] = {key: value for key, value in part.items() if value is not None}
            if not content[name]:
                del content[name]


def weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the safetensors files that hold a model's weights, and the index that lists them, if there is one.

    As in transformers, model.safetensors comes first, then an index of shards. Raises `InputError` for a bad index.
    """
    index, single = directory / INDEX, (directory / SINGLE).is_file()
    if not index.is_file():
        return [SINGLE] if single else sorted(path.name for path in directory.glob("model*.safetensors")), None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to file names; download it again")
    if single:
        log.warning("%s has %s and %s; the former is taken, as transformers does", directory, SINGLE, INDEX)
        return [SINGLE], None
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", "..") or not name.isprintable()]
    if outside:
        raise InputError(f"{index}: weight_map names {outside[0]!r}, which is no file of its directory")
    return names, weight_map


def fingerprint(directory: Path) -> str:
    """sha256 over the names and bytes of what decides a model or an adapter: settings, tokenizer and weights. Whatever
    else lies beside them does not count."""
    names, weight_map = weight_files(directory)
    names = [*names, *DECIDING, *([] if weight_map is None else [INDEX])]
    files = [directory / name for name in names] + [*(directory / PARAMS).rglob("*")]
    total = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(directory)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
