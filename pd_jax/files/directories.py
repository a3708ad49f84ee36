"""Model directories: config.json, tokenizer files and weights, as Hugging Face's safetensors or our orbax `params/`."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from pd_jax.config import SECTION, SETTINGS, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.safetensors import Progress, differences, raise_collected, read_params
from pd_jax.params import SIBLING_BIAS_START, Params, param_shapes

log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file it opens

PARAMS = "params"  # the orbax checkpoint inside a model directory
ADAPTER_CONFIG = "adapter_config.json"  # what makes a directory a LoRA adapter
TRAINED_AS = ("visibility", "align")  # an adapter's own win over its base's
BASE_FINGERPRINT = "base_fingerprint"  # in our section of it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
CONCURRENT_BYTES = 256 << 20  # orbax's buffers beside the model; without a limit it holds the model twice
CHUNK_BYTES = 64 << 20  # what is compressed at once


# --- finding, reading
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
    except (OSError, HFValidationError, ValueError) as error:
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


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` naming the file when it is absent or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}{advice}") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def read_config_json(directory: Path) -> dict[str, Any]:
    """A model directory's config.json."""
    return read_json(directory / "config.json", "; pass a Hugging Face model directory or a pd_jax checkpoint")


def load_config(directory: Path, pair_indices: Sequence[int] | None = None, adapter: Path | None = None) -> ModelConfig:
    """The model's configuration; `pair_indices` must agree with what is stored. Raises `InputError`.

    A plain Qwen3 has no column settings of its own: as the base of a LoRA `adapter` it takes those it was trained with,
    and any base takes the adapter's visibility and alignment. Settings of an older pd_jax store neither; they mean
    columns and left, and one line says so.
    """
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        raise InputError(f"{directory} is a LoRA adapter; pass its base as the model, and this as the adapter")
    hf = read_config_json(directory)
    settings = {} if adapter is None else read_adapter_config(adapter).get(SECTION, {})
    if settings and SECTION not in hf:
        hf[SECTION] = {key: value for key, value in settings.items() if key in SETTINGS}
    for key in TRAINED_AS if settings else ():
        hf[SECTION].pop(key, None)
        hf[SECTION] |= {key: settings[key]} if key in settings else {}
    if SECTION in hf and not hf[SECTION].keys() >= set(TRAINED_AS):
        _say_assumed(str(adapter if settings else directory))
    try:
        return ModelConfig.from_hf(hf, pair_indices)
    except ValueError as error:
        raise InputError(f"{directory}: {error}") from None


@cache
def _say_assumed(name: str) -> None:
    log.warning("%s does not say how it was trained; taken as visibility columns, align left", name)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """A LoRA directory's adapter_config.json."""
    return read_json(directory / ADAPTER_CONFIG, "; pass the directory of a LoRA adapter")


def load_tokenizer(directory: Path) -> Any:
    """The directory's fast tokenizer. Raises `InputError` when its files are missing."""
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise InputError(f"{directory} has no tokenizer (tokenizer.json); copy the base model's tokenizer files there")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise anything, from KeyError to a bare Exception
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise InputError(
            f"{directory}: its tokenizer cannot be read ({reason}); copy the base model's tokenizer files there again"
        ) from None


def load_eos_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            ids = read_json(path).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{directory} names no end-of-sequence token; add eos_token_id to generation_config.json")
    return (tokenizer.eos_token_id,)


def load_params(
    directory: Path,
    config: ModelConfig,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    progress: Progress | None = None,
    *,
    sibling_bias_start: float = SIBLING_BIAS_START,
) -> Params:
    """The weights, from `params/` or from safetensors, in `dtype` (None: as they are stored).

    `shardings` is a tree of shardings like `param_shapes(config)`; None puts everything on the default device. A
    `sibling_bias` that `config` asks for and the directory does not have begins at `sibling_bias_start`. Raises
    `InputError` with every tensor that is missing, unknown or of another shape.
    """
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, param_shapes(config), is_leaf=_is_shape)
    stored = read_config_json(directory).get(SECTION, {})
    if config.sibling_bias and not stored.get("sibling_bias", False):
        layers = dict(shardings["layers"])
        own = layers.pop("sibling_bias")
        plain = dataclasses.replace(config, sibling_bias=False)
        params = load_params(directory, plain, dtype, {**shardings, "layers": layers}, progress)
        start = np.full((config.num_hidden_layers, config.num_attention_heads), sibling_bias_start, np.float32)
        params["layers"]["sibling_bias"] = jax.device_put(start.astype(params["norm"].dtype), own)
        return params
    has_orbax, has_files = (directory / PARAMS).is_dir(), any(directory.glob("model*.safetensors*"))
    if has_orbax and has_files:
        raise InputError(f"{directory} has weights twice, {PARAMS}/ and model*.safetensors; remove the wrong ones")
    if has_orbax:
        return _load_orbax(directory / PARAMS, config, dtype, shardings)
    if has_files:
        return read_params(directory, config, dtype, shardings, progress)
    raise InputError(f"{directory} has no weights, neither {PARAMS}/ nor model*.safetensors; is it complete?")


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _context(tree: Any) -> ocp.Context:
    """Orbax with bounded buffers; its limits must lie above the largest array of `tree`."""
    context = ocp.Context()
    largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(CONCURRENT_BYTES, largest + 1)
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.use_compression = False  # weights hardly shrink, and it takes three times as long
    return context


def _load_orbax(path: Path, config: ModelConfig, dtype: Any, shardings: Any) -> Params:
    """The tree at `path`, checked against `config` before it is read."""
    path = path.absolute()  # orbax finds nothing at a relative one, and says nothing
    try:
        stored = ocp.metadata(str(path)).metadata
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint: {root_cause(error)}") from None
    have = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(stored)}
    want = {
        jax.tree_util.keystr(k): v
        for k, v in jax.tree_util.tree_leaves_with_path(param_shapes(config), is_leaf=_is_shape)
    }
    if not have:
        raise InputError(f"{path} is not a readable checkpoint: it holds no arrays; is it damaged?")
    errors = differences(have, want, "the config says")
    raise_collected(path, errors)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        stored,
        shardings,
    )
    try:
        with _context(target):
            return ocp.load(str(path), target)
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint: {root_cause(error)}") from None


def root_cause(error: BaseException) -> str:
    """Orbax wraps every failure in a page about handlers; the reason is at the bottom of the chain."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # ty: ignore[invalid-assignment]
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def fingerprint(directory: Path) -> str:
    """sha256 over the names and bytes of a model directory's settings, tokenizer and weights."""
    total = hashlib.sha256()
    files = [path for pattern in ("*.json", "*.safetensors", "params/**/*") for path in directory.glob(pattern)]
    for path in sorted(path for path in files if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(directory)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# --- writing
def _stage(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.partial"


@contextmanager
def staging(directory: Path, last: str = "config.json") -> Generator[Path]:
    """A temporary sibling of `directory` to write into; it takes its place when the block ends without an error.

    Where `directory` exists already, the new files replace those of the same name and the rest stays: the file `last`
    goes away first and comes last, so that what an interruption leaves behind never looks complete.
    """
    stage = _stage(directory)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        if not directory.exists():
            stage.rename(directory)
            return
        names = sorted((path.name for path in stage.iterdir()), key=last.__eq__)
        (directory / last).unlink(missing_ok=True)
        for name in names:
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(stage / name, directory / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_new(directory: Path) -> None:
    """Raise `InputError` when a conversion would write over something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty; remove it or choose another --output")


def write_metadata(directory: Path, hf: dict[str, Any], source: Path, dtype: Any) -> None:
    """`hf` as config.json for weights of `dtype`, and the tokenizer and generation files of `source`.

    A dtype field of `hf` that would be untrue is corrected: transformers loads weights in the dtype that it names.
    """
    hf = hf | dict.fromkeys([key for key in ("torch_dtype", "dtype") if key in hf], np.dtype(dtype).name)
    (directory / "config.json").write_text(json.dumps(hf, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def save_params(directory: Path, params: Params) -> None:
    """Write the orbax checkpoint `params/` of a model directory; every process must call it."""
    with _context(params):
        ocp.save(str((directory / PARAMS).absolute()), params)


def save_model(directory: Path, params: Params, config: ModelConfig, source: Path) -> None:
    """Write a complete model directory: `params/`, config.json, and `source`'s tokenizer and generation files.

    config.json is `source`'s, field by field, with our settings beside them. All or nothing, see `staging`. Every
    process must call it; process 0 writes the small files.
    """
    if jax.process_index() != 0:
        save_params(_stage(directory), params)
        return
    with staging(directory) as stage:
        save_params(stage, params)
        write_metadata(stage, config.to_hf(read_config_json(source)), source, params["embed"].dtype)


def write_untrained(directory: Path, config: ModelConfig, tokenizer: Any) -> None:
    """A model directory without weights, for --random-init: config.json, without our settings, and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    plain = {key: value for key, value in config.to_hf().items() if key != SECTION}
    for name, content in (("generation_config.json", special), ("config.json", plain | special | {"dtype": "float32"})):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
