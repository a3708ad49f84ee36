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
from pd_jax.files.find import ADAPTER_CONFIG, BASE_FINGERPRINT, fingerprint, read_adapter_config
from pd_jax.files.safetensors import Pending, read_header, write_safetensors
from pd_jax.files.saving import staging
from pd_jax.lora import adapter_shapes
from pd_jax.params import BY_NAME, PROJECTIONS, Params

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BIAS_WEIGHTS = "sibling_bias.safetensors"  # beside them: PEFT would not know what it is
UNNAMED_FAMILY = "qwen3"  # of adapters that do not say theirs: once there was no other

# Fields of adapter_config.json that are read, or decide nothing once the adapter is trained: its tensors say which
# modules and layers they are for.
READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", SECTION),
    *("target_modules", "exclude_modules", "layers_pattern", "inference_mode", "auto_mapping", "peft_version"),
    *("eva_config", "qalora_group_size", "runtime_config"),
}
# The values under which the others change nothing, where they are not the usual ones.
NOTHING: tuple[Any, ...] = (None, False, [], {})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "revision": (None, "main"),
    "bias": ("none",),
    "megatron_core": (None, "megatron.core"),
    # The others (pissa, olora, corda, loftq, lora_ga ...) begin by changing the base.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def _changes_nothing(field: str, value: Any) -> bool:
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(field, NOTHING))


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
    """Write `adapters` as PEFT does, with our settings under the key `pd_jax` and a trained sibling_bias in a file of
    its own beside them; all or nothing.

    `base` is the model that they belong to, a directory or a hub id, and `base_print` its `fingerprint`.
    """
    tensors: dict[str, Pending] = {}
    adapters = dict(adapters)
    bias = adapters.pop("sibling_bias", None)
    biases = {} if bias is None else _bias_tensors(np.asarray(bias, np.float32))
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
        if biases:
            write_safetensors(stage / BIAS_WEIGHTS, biases)
        (stage / ADAPTER_CONFIG).write_text(json.dumps(peft, indent=2) + "\n", encoding="utf-8")


def _bias_name(layer: int) -> str:
    return f"model.layers.{layer}.{BY_NAME['sibling_bias'].hf}"


def _bias_tensors(bias: np.ndarray) -> dict[str, Pending]:
    """[L, N] as one tensor a layer."""
    return {_bias_name(i): Pending(row.dtype, row.shape, lambda row=row: row) for i, row in enumerate(bias)}


def lora_flags(lora: LoraConfig) -> dict[str, Any]:
    """The settings of an adapter by the names of the flags that would contradict them."""
    return {
        "lora_r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": lora.target_modules,
    }


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
        for field in peft
        if field not in READ and not _changes_nothing(field, peft[field])
    ]
    errors += [f"{field} is missing" for field in ("r", "lora_alpha") if peft.get(field) is None]
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
        dropout=peft.get("lora_dropout") or 0.0,
        target_modules=targets,
        rslora=bool(peft.get("use_rslora")),
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
        layers = [tensors[_tensor_name(layer, name, part)].checked().T for layer in range(shape[0])]
        return jnp.asarray(np.stack(layers).reshape(shape).astype(np.float32))

    adapters: Params = {
        name: {part: stack(name, part, s) for part, s in parts.items()} for name, parts in shapes.items()
    }
    if (directory / BIAS_WEIGHTS).is_file():
        own = {_bias_name(layer): (config.num_attention_heads,) for layer in range(config.num_hidden_layers)}
        rows = read_header(directory / BIAS_WEIGHTS)
        raise_collected(directory / BIAS_WEIGHTS, differences(rows, own, "the base says"))
        adapters["sibling_bias"] = jnp.asarray(np.stack([rows[name].checked() for name in own]).astype(np.float32))
    return adapters, lora
