"""The decoder-only transformer over layouts: Qwen3 (https://arxiv.org/abs/2505.09388; `transformers.models.qwen3`), and
the families of `pd_jax.config` that differ from it in which weights they have.

Axes: B batch, T query, S key, N heads, K kv heads, H head_dim, D hidden, F mlp, V vocab, L layers, R LoRA rank.
Pure functions of plain dicts of arrays (`pd_jax.params`); the layers of a kind are stacked along L: training scans over
them, decoding unstacks them once (`pd_jax.decoding`).
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pd_jax.attention import Attention, make_attention
from pd_jax.columns import Coordinates, rope_tables, rotate
from pd_jax.config import Backend, LoraConfig, ModelConfig, Remat, RowVisibility
from pd_jax.cpu import contract
from pd_jax.lora import with_bias
from pd_jax.params import PROJECTIONS, Params

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    coordinates: Coordinates,
    *,
    visibility: RowVisibility = "columns",
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    constrain: Callable[[Array], Array] = lambda x: x,
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: Array | None = None,
    backend: Backend = "auto",
) -> Array:
    """Hidden states [B, T, D] in `dtype`, after the last norm, of laid-out rows `tokens` [B, T].

    `remat` says what the backward pass recomputes; `constrain` pins the hidden states [B, T, D] to a mesh.
    `adapters` is a LoRA tree beside `params` (`pd_jax.lora`), `lora` its settings; without `dropout_key` there is no
    dropout. `backend` is one of `config.Backend`.
    """
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    attend = make_attention(coordinates, visibility, backend)
    params = with_bias(params, adapters)
    dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_hidden_layers)

    def layer_step(x: Array, xs: tuple[Params, Params | None, Array | None]) -> tuple[Array, None]:
        layer, adapter, key = xs
        linear = partial(project, layer=layer, adapter=adapter, lora=lora, dropout_key=key)
        return constrain(block(config, layer, x, rope=rope, attend=attend, linear=linear)), None

    body = layer_step
    if remat != "none":
        body = jax.checkpoint(layer_step, policy=REMAT_POLICIES[remat], prevent_cse=False)  # scan prevents it already
    x = constrain(params["embed"][tokens].astype(dtype))
    xs = (params["layers"], adapters, dropout_keys)
    x, _ = jax.lax.scan(body, x, xs)
    return rms_norm(x, params["norm"], config.rms_norm_eps)


def logits(params: Params, hidden: Array) -> Array:
    """float32 [..., V] from hidden states [..., D]."""
    return jnp.einsum("...d,vd->...v", hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def head(params: Params) -> Array:
    """The output matrix [V, D]; the embedding itself when the two are tied."""
    return params.get("lm_head", params["embed"])


def block(
    config: ModelConfig,
    layer: Params,
    x: Array,
    *,
    rope: tuple[Array, Array],
    attend: Attention,
    linear: Callable[..., Array] | None = None,
) -> Array:
    """One decoder layer: x [B, T, D] -> [B, T, D].

    `attend` is self-attention, or attention over a cache. `linear(x, name=...)` applies a projection of the layer, by
    default `project`; training adds adapters, decoding keeps the kernels in another order.
    """
    norm = partial(rms_norm, eps=config.rms_norm_eps)
    linear = partial(project, layer=layer) if linear is None else linear
    q, k, v = heads(config, layer, norm(x, layer["attn_norm"]), linear)
    x = x + linear(attend(rotate(q, *rope), rotate(k, *rope), v, layer.get("sibling_bias")), name="o")
    h = norm(x, layer["mlp_norm"])
    return x + linear(jax.nn.silu(linear(h, name="gate")) * linear(h, name="up"), name="down")


def heads(
    config: ModelConfig, layer: Params, h: Array, linear: Callable[..., Array] | None = None
) -> tuple[Array, Array, Array]:
    """q [B, T, N, H], k and v [B, T, K, H] of hidden states h [B, T, D], before RoPE; `linear` as in `block`."""
    linear = partial(project, layer=layer) if linear is None else linear
    q, k, v = (linear(h, name=name) for name in ("q", "k", "v"))
    if "q_bias" in layer:
        q, k, v = (y + layer[f"{name}_bias"].astype(y.dtype) for y, name in ((q, "q"), (k, "k"), (v, "v")))
    if "q_norm" in layer:
        q, k = (rms_norm(y, layer[name], config.rms_norm_eps) for y, name in ((q, "q_norm"), (k, "k_norm")))
    return q, k, v


def project(
    x: Array,
    layer: Params,
    name: str,
    *,
    adapter: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: Array | None = None,
) -> Array:
    """x @ kernel, for the projection `name` of one layer, plus scale * dropout(x) @ a @ b where `adapter` has one."""
    weight = PROJECTIONS[name]
    y = contract(x, layer[name].astype(x.dtype), weight.summed, weight.kept)
    if adapter is None or lora is None or name not in adapter:
        return y
    a, b = (adapter[name][part].astype(x.dtype) for part in ("a", "b"))
    if dropout_key is not None and lora.dropout:
        # Projections of the same input share a draw, so that it is made, and kept for the backward pass, once.
        name = {"k": "q", "v": "q", "up": "gate"}.get(name, name)
        x = drop(x, jax.random.fold_in(dropout_key, zlib.crc32(name.encode())), lora.dropout)
    return y + lora.scale * contract(contract(x, a, weight.summed, "R"), b, "R", weight.kept)


def drop(x: Array, key: Array, rate: float) -> Array:
    """x [..., I] with a share `rate` of it set to 0 and the others scaled up.

    The rate is exact to 1/65,536: 16 random bits an element are half the work of 32.
    """
    bits = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(bits >= round(rate * 2**16), x / (1 - rate), 0).astype(x.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """float32 statistics, cast back, then the weight (the order matters in bfloat16)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)
