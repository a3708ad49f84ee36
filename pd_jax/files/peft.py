"""LoRA adapters in PEFT's files (adapter_config.json and adapter_model.safetensors), read and written."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pd_jax.config import SECTION, LoraConfig, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.checks import differences, raise_collected
from pd_jax.files.find import ADAPTER_CONFIG, fingerprint, read_adapter_config
from pd_jax.files.safetensors import Pending, read_header, write_safetensors
from pd_jax.files.saving import staging
from pd_jax.lora import adapter_shapes
from pd_jax.params import PROJECTIONS, Params

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FINGERPRINT = "base_fingerprint"  # in our section of adapter_config.json
UNNAMED_FAMILY = "qwen3"  # of adapters that do not say theirs: once there was no other

# What PEFT can do and we cannot: the field of adapter_config.json and the values under which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
}


def _tensor_name(layer: int, name: str, part: str) -> str:
    module = PROJECTIONS[name].hf.removesuffix(".weight")
    return f"base_model.model.model.layers.{layer}.{module}.lora_{part.upper()}.weight"


def _hf_shape(name: str, part: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of PEFT's lora_A [R, in] or lora_B [out, R] for one layer's part of ours."""
    return (shape[-1], math.prod(shape[:-1])) if part == "a" else (math.prod(shape[1:]), shape[0])


def base_settings(config: ModelConfig) -> dict[str, Any]:
    """What is stored with an adapter. A base must agree on all but visibility and alignment, which are its own."""
    family = {} if config.family == UNNAMED_FAMILY else {"family": config.family}
    return {**config.section(), **family, "rope_theta": config.rope_theta}


def save_adapter(
    directory: Path,
    adapters: Params,
    lora: LoraConfig,
    config: ModelConfig,
    *,
    base: str,
    base_print: str | None = None,
) -> None:
    """Write `adapters` as PEFT does, with our settings under the key `pd_jax`; all or nothing.

    `base` is the model that they belong to, a directory or a hub id, and `base_print` its `fingerprint`.
    """
    tensors: dict[str, Pending] = {}
    for name, parts in adapters.items():
        for part, array in parts.items():
            stacked = np.asarray(array, np.float32)
            shape = _hf_shape(name, part, stacked.shape[1:])
            for layer, matrix in enumerate(stacked):
                hf = matrix.reshape(shape[::-1]).T
                tensors[_tensor_name(layer, name, part)] = Pending(hf.dtype, shape, lambda hf=hf: hf)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        SECTION: base_settings(config) | ({} if base_print is None else {BASE_FINGERPRINT: base_print}),
    }
    with staging(directory, last=ADAPTER_CONFIG) as stage:
        write_safetensors(stage / ADAPTER_WEIGHTS, tensors)
        (stage / ADAPTER_CONFIG).write_text(json.dumps(peft, indent=2) + "\n", encoding="utf-8")


def load_adapter(directory: Path, config: ModelConfig, base: Path | None = None) -> tuple[Params, LoraConfig]:
    """The adapters of a PEFT directory (ours or PEFT's own) for a base of `config`, float32, and their settings.

    Raises `InputError` when the adapter was trained on a base with other settings or, where `base` is given, other
    files than those of that directory; when it uses what only PEFT has; and with every tensor that is missing, unknown
    or of another shape.
    """
    peft = read_adapter_config(directory)
    stored, here = dict(peft.get(SECTION, {})), base_settings(config) | {"family": config.family}
    wanted = stored.pop(BASE_FINGERPRINT, None)
    if stored:
        stored.setdefault("family", UNNAMED_FAMILY)
    if base is not None and wanted is not None and fingerprint(base) != wanted:
        raise InputError(
            f"{directory} was trained on {peft.get('base_model_name_or_path')} with fingerprint {wanted[:12]}, and "
            f"{base} has {fingerprint(base)[:12]}; use the base it was trained on"
        )
    errors = [
        f"{key} is {value!r} in the adapter and {here.get(key)!r} in the base; use the base it was trained on"
        for key, value in stored.items()
        if key not in ("visibility", "align") and here.get(key) != value
    ]
    errors += [
        f"{field} is {peft[field]!r}, which only PEFT can do; merge the adapter with PEFT first"
        for field, values in NEUTRAL.items()
        if field in peft and peft[field] not in values
    ]
    errors += [f"{field} is missing" for field in ("r", "lora_alpha") if field not in peft]
    raise_collected(directory / ADAPTER_CONFIG, errors)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{directory} has no {ADAPTER_WEIGHTS}; is the adapter complete?")
    tensors = read_header(directory / ADAPTER_WEIGHTS)
    # target_modules may be a list, a regular expression or "all-linear": the tensors say what it came to.
    targets = tuple(f"{name}_proj" for name in PROJECTIONS if _tensor_name(0, name, "a") in tensors)
    if not targets:
        raise InputError(f"{directory / ADAPTER_WEIGHTS} adapts no projection of a layer: {sorted(tensors)[:3]}")
    lora = LoraConfig(
        r=peft["r"],
        alpha=peft["lora_alpha"],
        dropout=peft.get("lora_dropout", 0.0),
        target_modules=targets,
        rslora=peft.get("use_rslora", False),
    )
    shapes = adapter_shapes(config, lora)
    expected = {
        _tensor_name(layer, name, part): _hf_shape(name, part, shape[1:])
        for name, parts in shapes.items()
        for part, shape in parts.items()
        for layer in range(config.num_hidden_layers)
    }
    raise_collected(directory / ADAPTER_WEIGHTS, differences(tensors, expected, "r and the base say"))

    def stack(name: str, part: str, shape: tuple[int, ...]) -> Array:
        layers = [tensors[_tensor_name(layer, name, part)].read().T for layer in range(shape[0])]
        return jnp.asarray(np.stack(layers).reshape(shape).astype(np.float32))

    adapters = {name: {part: stack(name, part, s) for part, s in parts.items()} for name, parts in shapes.items()}
    return adapters, lora
