"""The table of the weights: each weight once, with all that the rest of the project needs to know about it.

Shapes, initial values, counts, FLOPs, Hugging Face names, PartitionSpecs of training and of decoding, weight decay and
LoRA's targets are derived from `WEIGHTS`. Axes: L layers, V vocabulary, D hidden, N heads, K kv heads, H head_dim, F
mlp.

To add a weight: a line here, its use in `pd_jax.model`, and in `pd_jax.config` what decides whether a model has it.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from pd_jax.config import ModelConfig

Params = dict[str, Any]  # {"embed": [V, D], "norm": [D], "lm_head": [V, D] if untied, "layers": {name: [L, ...]}}

# The field of `ModelConfig` that gives an axis its size, and the axis of the mesh over which it is split.
SIZES = {
    "V": "vocab_size",
    "D": "hidden_size",
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
    "F": "intermediate_size",
}
SPLIT = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}

SIBLING_BIAS_START = 0.0  # of random weights: siblings are seen. From -8 the door stays shut: a scalar moves by about
# the sum of the learning rates. Weights that never saw columns begin lower (`pd_jax.training`).


@dataclass(frozen=True)
class Weight:
    """One kind of weight.

    name: its key in `Params`, under "layers" for one of every layer. axes: as it is stored, without L; with an arrow it
    is the kernel of a projection, "summed->kept", stored as [summed, kept]. hf: Hugging Face's name, for one of every
    layer what stands behind `model.layers.3.`. start: "normal" is drawn with std fan_in^-0.5 (with Qwen3's
    initializer_range of 0.02 a small model never leaves the plateau of a look-up task); a number fills the array.
    decays: takes part in weight decay. exists: whether a model has it.
    """

    name: str
    axes: str
    hf: str
    start: Literal["normal"] | float = "normal"
    decays: bool = True
    in_layers: bool = True
    exists: Callable[[ModelConfig], bool] = lambda config: True

    @property
    def letters(self) -> str:
        """The axes in the order in which they are stored."""
        return self.axes.replace("->", "")

    @property
    def summed(self) -> str:
        """The axes that a projection sums over; "" for what is no projection."""
        return self.axes.partition("->")[0] if "->" in self.axes else ""

    @property
    def kept(self) -> str:
        """The axes that come out of a projection."""
        return self.axes.partition("->")[2]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """As it is stored, without L."""
        return tuple(getattr(config, SIZES[letter]) for letter in self.letters)

    def fan_in(self, config: ModelConfig) -> int:
        return math.prod(getattr(config, SIZES[letter]) for letter in self.summed or "D")

    def spec(self) -> P:
        """How training splits it over the mesh; what has one axis only is whole on every device."""
        axes = [SPLIT.get(letter) for letter in self.letters] if len(self.letters) > 1 else []
        return P(*([None] if self.in_layers and axes else []), *axes)

    def decoding_spec(self) -> P:
        """How decoding splits it: without L, a projection's kernel as one matrix [out, in], and over `tensor` only."""

        def split(letters: str) -> str | None:
            return "tensor" if "tensor" in map(SPLIT.get, letters) else None

        if self.summed:
            return P(split(self.kept), split(self.summed))
        return P(*map(split, self.letters)) if len(self.letters) > 1 else P()


def _has_qkv_bias(config: ModelConfig) -> bool:
    return config.has.qkv_bias


def _has_qk_norm(config: ModelConfig) -> bool:
    return config.has.qk_norm


WEIGHTS = (
    Weight("embed", "VD", "model.embed_tokens.weight", in_layers=False),
    Weight("attn_norm", "D", "input_layernorm.weight", start=1.0, decays=False),
    Weight("q", "D->NH", "self_attn.q_proj.weight"),
    Weight("k", "D->KH", "self_attn.k_proj.weight"),
    Weight("v", "D->KH", "self_attn.v_proj.weight"),
    Weight("q_bias", "NH", "self_attn.q_proj.bias", start=0.0, decays=False, exists=_has_qkv_bias),
    Weight("k_bias", "KH", "self_attn.k_proj.bias", start=0.0, decays=False, exists=_has_qkv_bias),
    Weight("v_bias", "KH", "self_attn.v_proj.bias", start=0.0, decays=False, exists=_has_qkv_bias),
    Weight("q_norm", "H", "self_attn.q_norm.weight", start=1.0, decays=False, exists=_has_qk_norm),
    Weight("k_norm", "H", "self_attn.k_norm.weight", start=1.0, decays=False, exists=_has_qk_norm),
    Weight("o", "NH->D", "self_attn.o_proj.weight"),
    Weight("mlp_norm", "D", "post_attention_layernorm.weight", start=1.0, decays=False),
    Weight("gate", "D->F", "mlp.gate_proj.weight"),
    Weight("up", "D->F", "mlp.up_proj.weight"),
    Weight("down", "F->D", "mlp.down_proj.weight"),
    Weight(
        "sibling_bias",
        "N",
        "self_attn.sibling_bias",
        start=SIBLING_BIAS_START,
        decays=False,
        exists=lambda config: config.sibling_bias,
    ),
    Weight("norm", "D", "model.norm.weight", start=1.0, decays=False, in_layers=False),
    Weight("lm_head", "VD", "lm_head.weight", in_layers=False, exists=lambda config: not config.tie_word_embeddings),
)
BY_NAME = {weight.name: weight for weight in WEIGHTS}
PROJECTIONS = {weight.name: weight for weight in WEIGHTS if weight.summed}  # what an adapter can be added to


def weights_of(config: ModelConfig) -> list[Weight]:
    """The weights that a model of `config` has, in the order in which exports write them."""
    return [weight for weight in WEIGHTS if weight.exists(config)]


def tree_of(config: ModelConfig, make: Callable[[Weight], Any]) -> Params:
    """A tree like the parameters, of what `make` makes for each of them."""
    inside = {weight.name: make(weight) for weight in weights_of(config) if weight.in_layers}
    outside = {weight.name: make(weight) for weight in weights_of(config) if not weight.in_layers}
    return outside | {"layers": inside}


def param_shapes(config: ModelConfig) -> Params:
    """The tree of shapes, those of the layers with their leading L."""
    layers = config.num_hidden_layers
    return tree_of(config, lambda weight: (*([layers] if weight.in_layers else []), *weight.shape(config)))


def init_params(
    config: ModelConfig, key: Array, dtype: Any = jnp.float32, sibling_bias_start: float = SIBLING_BIAS_START
) -> Params:
    """Random weights, as the table says; sibling_bias, where there is one, begins at `sibling_bias_start`."""
    shapes = param_shapes(config)

    def init(weight: Weight) -> Array:
        shape = shapes["layers"][weight.name] if weight.in_layers else shapes[weight.name]
        if weight.start != "normal":
            return jnp.full(shape, sibling_bias_start if weight.name == "sibling_bias" else weight.start, dtype)
        own = jax.random.fold_in(key, zlib.crc32(weight.name.encode()))
        return (jax.random.normal(own, shape, jnp.float32) * weight.fan_in(config) ** -0.5).astype(dtype)

    return tree_of(config, init)


def parameter_count(config: ModelConfig) -> int:
    """How many numbers the model has."""
    layers = config.num_hidden_layers
    return sum(math.prod(weight.shape(config)) * (layers if weight.in_layers else 1) for weight in weights_of(config))


def training_flops(config: ModelConfig, length: int, frozen: bool = False) -> float:
    """FLOPs of a training step per token of a row of `length` tokens.

    2 per number of a matrix forward, 2 for the gradient of the activations, 2 for that of the matrix (none where it is
    `frozen`); attention as if causal over the row, which the column mask nearly is.
    """
    matrices = sum(math.prod(weight.shape(config)) for weight in PROJECTIONS.values()) * config.num_hidden_layers
    matrices += config.vocab_size * config.hidden_size  # the head, tied or not
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return (4 if frozen else 6) * matrices + 6 * attention


def decays(params: Params) -> Params:
    """A tree like `params`, or like adapters beside them, of bools: what takes part in weight decay."""

    def one(path: tuple, _: Any) -> bool:
        weight = BY_NAME.get(path[-1].key)  # the parts of an adapter are no weights of the table
        return weight is None or weight.decays

    return jax.tree_util.tree_map_with_path(one, params)
