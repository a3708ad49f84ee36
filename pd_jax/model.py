"""Qwen3 (https://arxiv.org/abs/2505.09388; `transformers.models.qwen3`) over column layouts.

Axes: B batch, T query, S key, N heads, K kv heads, H head_dim, D hidden, F mlp, V vocab, L layers, R LoRA rank.
Kernels are stored as einsum operands, the layers of a kind stacked along L: training scans over them, decoding unstacks
them once (`pd_jax.decode`). The nnx module holds the arrays; what is computed is in pure functions of plain dicts.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from pd_jax.attention import Attention, make_attention, target
from pd_jax.columns import Coordinates, rope_tables, rotate
from pd_jax.config import LoraConfig, ModelConfig, Visibility

Params = dict[str, Any]  # {"embed": [V, D], "norm": [D], "lm_head": [V, D] if untied, "layers": {name: [L, ...]}}
PROJECTIONS = {"q": "dnh", "k": "dnh", "v": "dnh", "o": "nhd", "gate": "df", "up": "df", "down": "fd"}


Remat = Literal["none", "dots", "full"]
REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every kind of layer weight, without the leading L."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    n, k = config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "q": (d, n, h),
        "k": (d, k, h),
        "v": (d, k, h),
        "q_norm": (h,),
        "k_norm": (h,),
        "o": (n, h, d),
        "mlp_norm": (d,),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }
    return shapes | ({"sibling_bias": (n,)} if config.sibling_bias else {})


def param_shapes(config: ModelConfig) -> Params:
    """The whole tree of shapes, the layers stacked."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Params = {"embed": table, "norm": (config.hidden_size,)}
    shapes["layers"] = {name: (config.num_hidden_layers, *s) for name, s in layer_shapes(config).items()}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head": table}


SIBLING_BIAS_START = -8.0  # the model begins as the isolated one and learns how far to look


def init_params(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random weights: norms 1, everything else normal with std fan_in^-0.5.

    With Qwen3's initializer_range (0.02) a small model never leaves the plateau of a look-up task.
    """

    def init(path: tuple, shape: tuple[int, ...]) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        if name == "sibling_bias":
            return jnp.full(shape, SIBLING_BIAS_START, dtype)
        fan_in = config.hidden_size
        if name == "o":
            fan_in = config.num_attention_heads * config.head_dim
        elif name == "down":
            fan_in = config.intermediate_size
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (jax.random.normal(own, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return jax.tree_util.tree_map_with_path(init, param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """float32 statistics, cast back, then the weight (the order matters in bfloat16)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)


def contraction(name: str) -> tuple[str, str]:
    """The letters of the projection `name` that are summed over, and those that come out."""
    layout = PROJECTIONS[name]
    return (layout[:2], layout[2:]) if name == "o" else (layout[:1], layout[1:])


def outer(x: Array, y: Array) -> Array:
    """x [T, I] and y [T, O] -> the sum over the tokens of their outer products, [I, O], in float32.

    On a CPU the transpose is put into memory, and that of the result is kept out of the product: XLA:CPU multiplies
    along the first axes of both at 2/3 of the speed.
    """
    still = jax.lax.optimization_barrier if target()[0] == "cpu" else lambda array: array
    return still(jnp.einsum("it,to->io", still(x.T), y, preferred_element_type=jnp.float32))


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    """[..., I] x [I, O] -> [..., O]; the kernel's gradient is `outer`."""
    return x @ kernel


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    d_kernel = outer(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return dy @ kernel.T, d_kernel.astype(kernel.dtype)


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def _contract(x: Array, kernel: Array, name: str) -> Array:
    """x @ kernel, for the projection `name`."""
    summed, kept = contraction(name)
    if target()[0] != "cpu":  # a TPU's tiles would be moved to reshape the kernel
        return jnp.einsum(f"...{summed},{PROJECTIONS[name]}->...{kept}", x, kernel)
    inputs = math.prod(kernel.shape[: len(summed)])
    y = _matmul(x.reshape(*x.shape[: x.ndim - len(summed)], inputs), kernel.reshape(inputs, -1))
    return y.reshape(*y.shape[:-1], *kernel.shape[len(summed) :])


def project(
    x: Array,
    layer: Params,
    name: str,
    adapter: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: Array | None = None,
) -> Array:
    """x @ kernel, for the projection `name` of one layer, plus scale * dropout(x) @ a @ b where `adapter` has one."""
    summed, kept = contraction(name)
    y = _contract(x, layer[name].astype(x.dtype), name)
    if adapter is None or lora is None or name not in adapter:
        return y
    a, b = (adapter[name][part].astype(x.dtype) for part in ("a", "b"))
    if dropout_key is not None and lora.dropout:
        keep = jax.random.bernoulli(
            jax.random.fold_in(dropout_key, zlib.crc32(name.encode())), 1 - lora.dropout, x.shape
        )
        x = jnp.where(keep, x / (1 - lora.dropout), 0).astype(x.dtype)
    low = jnp.einsum(f"...{summed},{summed}r->...r", x, a)
    return y + lora.scale * jnp.einsum(f"...r,r{kept}->...{kept}", low, b)


def block(
    config: ModelConfig,
    layer: Params,
    x: Array,
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
    h = norm(x, layer["attn_norm"])
    q = rotate(norm(linear(h, name="q"), layer["q_norm"]), *rope)  # [B, T, N, H]
    k = rotate(norm(linear(h, name="k"), layer["k_norm"]), *rope)  # [B, T, K, H]
    v = linear(h, name="v")
    x = x + linear(attend(q, k, v, layer.get("sibling_bias")), name="o")
    h = norm(x, layer["mlp_norm"])
    return x + linear(jax.nn.silu(linear(h, name="gate")) * linear(h, name="up"), name="down")


def head(params: Params) -> Array:
    """The output matrix [V, D]; the embedding itself when the two are tied."""
    return params.get("lm_head", params["embed"])


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    coordinates: Coordinates,
    visibility: Visibility = "columns",
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    constrain: Callable[[Array], Array] = lambda x: x,
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Hidden states [B, T, D] in `dtype`, after the last norm, of laid-out rows `tokens` [B, T].

    `remat` says what the backward pass recomputes; `constrain` pins the hidden states [B, T, D] to a mesh.
    `adapters` is a LoRA tree beside `params` (`pd_jax.lora`), `lora` its settings; without `dropout_key` there is no
    dropout. `backend` is one of `attention.BACKENDS`.
    """
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    attend = make_attention(coordinates, visibility, backend)

    dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_hidden_layers)

    def layer_step(x: Array, xs: tuple[Params, Params | None, Array | None]) -> tuple[Array, None]:
        layer, adapter, key = xs
        linear = partial(project, layer=layer, adapter=adapter, lora=lora, dropout_key=key)
        return constrain(block(config, layer, x, rope, attend, linear)), None

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


class Qwen3(nnx.Module):
    """The arrays of a Qwen3 as an nnx module: `embed`, `layers.*`, `norm` and, when untied, `lm_head`.

    `model(tokens, coordinates)` gives float32 logits [B, T, V]. Training and decoding take `model.params()` and run
    pure functions under plain `jax.jit`: nnx inside the step costs up to 90 ms of Python a call.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        params = init_params(config, rngs.params())
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.Dict({name: nnx.Param(value) for name, value in params["layers"].items()})
        self.norm = nnx.Param(params["norm"])
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(params["lm_head"])

    def params(self) -> Params:
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, tokens: Array, coordinates: Coordinates, visibility: Visibility = "columns") -> Array:
        params = self.params()
        return logits(params, forward(params, self.config, tokens, coordinates, visibility, params["embed"].dtype))
