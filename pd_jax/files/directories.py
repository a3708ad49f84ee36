"""Reading a model directory: its configuration, its tokenizer, what ends an answer, and its weights."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pd_jax.config import SECTION, SETTINGS, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.checks import read_json
from pd_jax.files.config_json import config_from_hf
from pd_jax.files.find import ADAPTER_CONFIG, PARAMS, read_adapter_config, read_config_json
from pd_jax.files.orbax import read_checkpoint
from pd_jax.files.safetensors import Progress, default_device, read_params
from pd_jax.params import SIBLING_BIAS_START, Params

log = logging.getLogger(__name__)

TRAINED_AS = ("visibility", "align")  # an adapter's own win over its base's


def load_config(directory: Path, pair_indices: Sequence[int] | None = None, adapter: Path | None = None) -> ModelConfig:
    """The model's configuration; `pair_indices` must agree with what is stored. Raises `InputError`.

    A plain model has no column settings of its own: as the base of a LoRA `adapter` it takes those it was trained with,
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
        return config_from_hf(hf, pair_indices)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


@cache
def _say_assumed(name: str) -> None:
    log.warning("%s does not say how it was trained; taken as visibility columns, align left", name)


def load_tokenizer(directory: Path, rows: int | None = None) -> Any:
    """The directory's fast tokenizer, for a model with so many rows of embeddings, if given.

    Raises `InputError` when its files are missing or damaged, and when it has tokens beyond the rows.
    """
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise InputError(f"{directory} has no tokenizer (tokenizer.json); copy the base model's tokenizer files there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise anything, from KeyError to a bare Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{directory}: its tokenizer cannot be read ({reason}); copy the base model's tokenizer files there again"
        ) from None
    if rows is not None:
        check_rows(tokenizer, rows, str(directory))
    return tokenizer


def check_rows(tokenizer: Any, rows: int, name: str = "the model") -> set[int]:
    """The ids of `tokenizer`'s tokens. Raises `InputError` when there are tokens for which a model with so many rows of
    embeddings has none."""
    known = set(tokenizer.get_vocab().values())
    tokens = 1 + max(known, default=-1)
    if tokens > rows:
        raise InputError(
            f"{name}: the tokenizer has {tokens} tokens and the model {rows} rows of embeddings; use the tokenizer "
            "that belongs to the model"
        )
    return known


def load_eos_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's. A file that
    names none (null, an empty list) is passed over.

    Raises `InputError` when there are none, and naming the file for anything but ids that `tokenizer` knows.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        stated = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        known = set(tokenizer.get_vocab().values()) if ids else set()
        wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i not in known]
        if wrong:
            raise InputError(
                f"{path}: eos_token_id is {json.dumps(stated)[:80]}, and {json.dumps(wrong[0])[:40]} is no id of the "
                f"tokenizer's {len(known)} tokens; give the ids of its end-of-sequence tokens"
            )
        if ids:
            return tuple(ids)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{directory} names no end-of-sequence token; add eos_token_id to generation_config.json")
    return (tokenizer.eos_token_id,)


def load_params(
    directory: Path,
    config: ModelConfig,
    dtype: Any = jnp.float32,
    *,
    shardings: Any = None,
    progress: Progress | None = None,
    sibling_bias_start: float = SIBLING_BIAS_START,
) -> Params:
    """The weights, from `params/` or from safetensors, in `dtype` (None: as they are stored).

    `shardings` is a tree of shardings like `param_shapes(config)`; None puts everything on the default device. A
    `sibling_bias` that `config` asks for and the directory does not have begins at `sibling_bias_start`. Raises
    `InputError` with every tensor that is missing, unknown or of another shape.
    """
    if shardings is None:
        shardings = default_device(config)
    stored = read_config_json(directory).get(SECTION, {})
    if config.sibling_bias and not stored.get("sibling_bias", False):
        layers = dict(shardings["layers"])
        own = layers.pop("sibling_bias")
        plain = dataclasses.replace(config, sibling_bias=False)
        params = load_params(directory, plain, dtype, shardings={**shardings, "layers": layers}, progress=progress)
        start = np.full((config.num_hidden_layers, config.num_attention_heads), sibling_bias_start, np.float32)
        params["layers"]["sibling_bias"] = jax.device_put(start.astype(params["norm"].dtype), own)
        return params
    has_orbax, has_files = (directory / PARAMS).is_dir(), any(directory.glob("model*.safetensors*"))
    if has_orbax and has_files:
        raise InputError(f"{directory} has weights twice, {PARAMS}/ and model*.safetensors; remove the wrong ones")
    if has_orbax:
        return read_checkpoint(directory / PARAMS, config, dtype, shardings)
    if has_files:
        return read_params(directory, config, dtype, shardings=shardings, progress=progress)
    raise InputError(f"{directory} has no weights, neither {PARAMS}/ nor model*.safetensors; is it complete?")
