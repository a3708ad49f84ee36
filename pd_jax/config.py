"""The model's configuration: its family and shape, and the column settings beside them.

The column settings (which RoPE pairs turn with the branch, the branch stride, sibling_bias) decide what the weights
mean, so they live in the model's `config.json`, under the key `pd_jax`, and travel with every checkpoint
(`pd_jax.files` reads and writes it).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from pd_jax.errors import InputError, check_whole

Visibility = Literal["columns", "isolated", "prompts"]
VISIBILITIES: tuple[Visibility, ...] = ("columns", "isolated", "prompts")
MIX = "mix"  # every sample has a visibility of its own
RowVisibility = Literal["columns", "isolated", "prompts", "mix"]  # of whole rows
ROW_VISIBILITIES: tuple[RowVisibility, ...] = (*VISIBILITIES, "mix")
Align = Literal["left", "right", "ragged"]

Remat = Literal["none", "dots", "full"]  # what the backward pass recomputes: nothing, all but products, every layer
Backend = Literal["auto", "dense", "chunked", "splash", "tokamax", "cudnn"]  # of attention
Dtype = Literal["float32", "bfloat16"]  # of weights, activations and cache

DEFAULT_PAIR_INDICES = (8, 16, 24)  # for heads of 128, as all Qwen3 have
SECTION = "pd_jax"  # the key of our settings inside config.json

SETTINGS = {"pair_indices", "branch_stride", "sibling_bias", "visibility", "align"}


class Family(NamedTuple):
    """What one architecture of Hugging Face has beside the decoder that all of them share."""

    architecture: str
    qkv_bias: bool = False  # on the projections of q, k and v
    qk_norm: bool = False  # RMSNorm of q and k over head_dim, before RoPE
    rope_types: tuple[str, ...] = ("default", "yarn")


FAMILIES = {  # by the model_type of config.json
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family("LlamaForCausalLM", rope_types=("default", "yarn", "llama3")),
    "mistral": Family("MistralForCausalLM"),
}


def default_pairs(head_dim: int) -> tuple[int, ...]:
    """`DEFAULT_PAIR_INDICES` at the same frequencies of heads of another size. Raises `InputError` where there is no
    such pair."""
    if head_dim % 16:
        raise InputError(
            f"the default pair_indices {list(DEFAULT_PAIR_INDICES)} are for head_dim 128 and have no equals at "
            f"head_dim {head_dim}; pass --pair-indices with values in 1..{head_dim // 2}, or none of them"
        )
    return tuple(pair * head_dim // 128 for pair in DEFAULT_PAIR_INDICES)


def check_choice(name: str, value: str, kind: Any) -> None:
    """Raise `InputError` when `value` is none of those of the Literal `kind`."""
    if value not in get_args(kind):
        raise InputError(f"{name} {value!r} is not one of {', '.join(get_args(kind))}")


@dataclass(frozen=True)
class Yarn:
    """YaRN (https://huggingface.co/papers/2309.00071) as `transformers.modeling_rope_utils` computes it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretched RoPE as `transformers.modeling_rope_utils` computes it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The model's family and shape (field names as in `transformers.Qwen3Config`), and the column settings.

    Raises `InputError` when the numbers do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    family: str = "qwen3"  # a key of `FAMILIES`
    yarn: Yarn | None = None
    llama3: Llama3Rope | None = None
    pair_indices: tuple[int, ...] = DEFAULT_PAIR_INDICES
    branch_stride: float = 1.0
    sibling_bias: bool = False
    visibility: RowVisibility | None = None  # as trained; decoding takes it (columns for mix) if nothing else is asked
    align: Align | None = None  # likewise; both None: never trained in columns

    def __post_init__(self) -> None:
        check_choice("visibility", self.visibility or "columns", RowVisibility)
        check_choice("align", self.align or "left", Align)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; RoPE turns pairs of dimensions")
        object.__setattr__(self, "pair_indices", tuple(check_whole(p, "pair_indices") for p in self.pair_indices))
        half = self.head_dim // 2
        wrong = [p for p in self.pair_indices if not 1 <= p <= half]
        if wrong:
            raise InputError(
                f"pair_indices {list(self.pair_indices)}: {wrong} outside 1..{half} (head_dim {self.head_dim} has "
                f"{half} RoPE pairs); pass --pair-indices with values in 1..{half}"
            )
        if len(set(self.pair_indices)) != len(self.pair_indices):
            raise InputError(f"pair_indices {list(self.pair_indices)} names a pair twice; list each pair once")

    @property
    def has(self) -> Family:
        """What the model's family has."""
        return FAMILIES[self.family]

    @property
    def most_columns(self) -> int:
        """max_position_embeddings, or what YaRN makes of it: Qwen3's model card says to add rope_scaling only."""
        stretched = 0 if self.yarn is None else int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def decoded_as(self) -> tuple[Visibility, Align]:
        """Visibility and alignment of decoding when nothing else is asked for: those of the training."""
        visibility: Visibility = "columns" if self.visibility is None or self.visibility == MIX else self.visibility
        return visibility, self.align or "left"

    def trained_otherwise(self, visibility: RowVisibility, align: Align) -> bool:
        """Whether the weights were trained in another visibility (a mix holds all of them) or alignment."""
        return self.visibility not in (None, MIX, visibility) or self.align not in (None, align)

    def section(self) -> dict[str, Any]:
        """The column settings as they are stored under the key `pd_jax` of config.json."""
        return {
            "pair_indices": list(self.pair_indices),
            "branch_stride": self.branch_stride,
            "sibling_bias": self.sibling_bias,
            **({} if self.visibility is None else {"visibility": self.visibility}),
            **({} if self.align is None else {"align": self.align}),
        }


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Which projections get a low-rank adapter, and how it is scaled; the names are PEFT's."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = LORA_TARGETS
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"lora r is {self.r}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora dropout is {self.dropout}; it must be in [0, 1)")
        unknown = [name for name in self.target_modules if name not in LORA_TARGETS]
        if unknown or not self.target_modules:
            raise InputError(
                f"lora target modules {list(self.target_modules)}: {unknown or 'none'} not among "
                f"{', '.join(LORA_TARGETS)}; choose from those"
            )

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)
