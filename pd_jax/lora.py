"""LoRA (https://arxiv.org/abs/2106.09685): adapters as a tree beside the weights, and merged into them.

The tree is `{"q": {"a": [L, D, R], "b": [L, R, N, H]}, ...}`, float32, one entry for each adapted projection of
`pd_jax.params`. A sibling_bias is so small that it is trained whole: `"sibling_bias": [L, N]` beside them replaces the
base's. Training differentiates this tree only; `forward(..., adapters=, lora=)` adds it to the model.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.params import PROJECTIONS, Params


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> Params:
    """`{"q": {"a": shape, "b": shape}, ...}`, with the leading L."""
    shapes: Params = {}
    for module in lora.target_modules:
        name = module.removesuffix("_proj")
        kernel, inputs = PROJECTIONS[name].shape(config), len(PROJECTIONS[name].summed)
        shapes[name] = {
            "a": (config.num_hidden_layers, *kernel[:inputs], lora.r),
            "b": (config.num_hidden_layers, lora.r, *kernel[inputs:]),
        }
    return shapes


def init_adapters(config: ModelConfig, lora: LoraConfig, key: Array) -> Params:
    """Fresh adapters that change nothing: `a` uniform in +-fan_in^-0.5 (PEFT's default), `b` zero; float32."""

    def init(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Params:
        bound = math.prod(shapes["a"][1:-1]) ** -0.5
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return {
            "a": jax.random.uniform(own, shapes["a"], jnp.float32, -bound, bound),
            "b": jnp.zeros(shapes["b"], jnp.float32),
        }

    return {name: init(name, shapes) for name, shapes in adapter_shapes(config, lora).items()}


def with_bias(params: Params, adapters: Params | None) -> Params:
    """`params` with the sibling_bias of `adapters`, where these have one."""
    if adapters is None or "sibling_bias" not in adapters:
        return params
    return {**params, "layers": {**params["layers"], "sibling_bias": adapters["sibling_bias"]}}


def merge_weight(kernel: Array, adapter: Any, name: str, lora: LoraConfig) -> Array:
    """The stacked weight `name` with its adapter added in float32, or replaced by it, in the weight's dtype."""
    if name == "sibling_bias":
        return adapter.astype(kernel.dtype)
    summed, kept = PROJECTIONS[name].summed, PROJECTIONS[name].kept
    delta = jnp.einsum(f"L{summed}R,LR{kept}->L{summed}{kept}", adapter["a"], adapter["b"])
    return (kernel.astype(jnp.float32) + lora.scale * delta).astype(kernel.dtype)


def merge(params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """`params` with `adapters` added to their kernels; what is not adapted is shared, not copied."""
    merged = {name: merge_weight(params["layers"][name], part, name, lora) for name, part in adapters.items()}
    return {**params, "layers": {**params["layers"], **merged}}
