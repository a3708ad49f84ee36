"""The model's configuration: Hugging Face `config.json` both ways, and the column settings beside it.

The column settings (which RoPE pairs turn with the branch, the branch stride, sibling_bias) decide what the weights
mean, so they live in the same `config.json`, under the key `pd_jax`, and travel with every checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pd_jax.errors import InputError, check_whole

Visibility = Literal["columns", "isolated", "prompts"]
VISIBILITIES: tuple[Visibility, ...] = ("columns", "isolated", "prompts")
MIX = "mix"  # every sample has a visibility of its own
RowVisibility = Literal["columns", "isolated", "prompts", "mix"]  # of whole rows
ROW_VISIBILITIES: tuple[RowVisibility, ...] = (*VISIBILITIES, "mix")
Align = Literal["left", "right", "ragged"]
ALIGNMENTS: tuple[Align, ...] = ("left", "right", "ragged")

Remat = Literal["none", "dots", "full"]  # what the backward pass recomputes: nothing, all but products, every layer
Backend = Literal["auto", "dense", "chunked", "splash", "tokamax", "cudnn"]  # of attention
BACKENDS: tuple[Backend, ...] = ("auto", "dense", "chunked", "splash", "tokamax", "cudnn")
Dtype = Literal["float32", "bfloat16"]  # of weights, activations and cache
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

DEFAULT_PAIR_INDICES = (8, 16, 24)
SECTION = "pd_jax"  # the key of our settings inside config.json

SETTINGS = {"pair_indices", "branch_stride", "sibling_bias", "visibility", "align"}

# Fields of config.json that we honour in one value only; anything else would be silently another model.
PLAIN_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `InputError` when `value` is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name} {value!r} is not one of {', '.join(choices)}")


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
class ModelConfig:
    """Qwen3's shape (field names as in `transformers.Qwen3Config`) and the column settings.

    Raises `InputError` when the numbers do not fit together; see `from_hf` for what is refused.
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
    yarn: Yarn | None = None
    pair_indices: tuple[int, ...] = DEFAULT_PAIR_INDICES
    branch_stride: float = 1.0
    sibling_bias: bool = False
    visibility: RowVisibility | None = None  # as trained; decoding takes it (columns for mix) if nothing else is asked
    align: Align | None = None  # likewise; both None: never trained in columns

    def __post_init__(self) -> None:
        check_choice("visibility", self.visibility or "columns", ROW_VISIBILITIES)
        check_choice("align", self.align or "left", ALIGNMENTS)
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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], pair_indices: Sequence[int] | None = None) -> "ModelConfig":
        """Read a Qwen3 `config.json` (transformers 4 or 5 style), with our section if it has one.

        `pair_indices` is the caller's choice; None takes what is stored, else `DEFAULT_PAIR_INDICES`.
        Raises `InputError` with every unsupported or missing field named, or when `pair_indices` contradicts what the
        weights were trained with.
        """
        errors: list[str] = []
        if hf.get("model_type") != "qwen3":
            errors.append(f"model_type is {hf.get('model_type')!r}, only 'qwen3' is supported")
        if "Qwen3ForCausalLM" not in (hf.get("architectures") or ["Qwen3ForCausalLM"]):
            errors.append(f"architectures is {hf['architectures']}, only ['Qwen3ForCausalLM'] is supported")
        for field, plain in PLAIN_FIELDS.items():
            if hf.get(field, plain) != plain:
                errors.append(f"{field} is {hf[field]!r}, only {plain!r} is supported")
        layer_types = set(hf.get("layer_types") or ["full_attention"])
        if layer_types != {"full_attention"}:
            errors.append(
                f"layer_types has {sorted(layer_types - {'full_attention'})}, only full_attention is supported"
            )
        # No default for these: transformers' own (head_dim 128, 32 kv heads) are no better a guess than ours.
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        required += ["num_key_value_heads", "head_dim"]
        errors += [f"{field} is missing" for field in required if hf.get(field) is None]
        theta, yarn = _read_rope(hf, errors)
        if errors:
            raise InputError("config.json: " + "; ".join(errors))
        ours = hf.get(SECTION, {})
        unknown = sorted(set(ours) - SETTINGS)
        if unknown:
            raise InputError(f"config.json: unknown key {unknown} in {SECTION!r}; was it written by a newer pd_jax?")
        stored = tuple(ours["pair_indices"]) if "pair_indices" in ours else None
        if stored is not None and pair_indices is not None and tuple(pair_indices) != stored:
            raise InputError(
                f"pair_indices {list(pair_indices)} was asked for, but the weights were trained with {list(stored)}; "
                "leave pair_indices out"
            )
        chosen = stored if stored is not None else DEFAULT_PAIR_INDICES if pair_indices is None else tuple(pair_indices)
        return cls(
            **{field: hf[field] for field in required},
            rope_theta=theta,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            max_position_embeddings=hf.get("max_position_embeddings") or 32768,
            yarn=yarn,
            pair_indices=chosen,
            branch_stride=ours.get("branch_stride", 1.0),
            sibling_bias=ours.get("sibling_bias", False),
            visibility=ours.get("visibility"),
            align=ours.get("align"),
        )

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

    def to_hf(self, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """config.json for these settings: `original` kept field by field where there is one, and our section.

        Without `original`, both generations' rope and dtype fields are written, because transformers 4 reads a
        version 5 file with the wrong theta and says nothing.
        """
        if original is not None:
            return {**original, SECTION: self.section()}
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.yarn is not None:
            rope |= {"rope_type": "yarn", **dataclasses.asdict(self.yarn)}
        ours = {"yarn", *SETTINGS}
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ours},
            "rope_parameters": rope,
            "rope_scaling": None if self.yarn is None else {k: v for k, v in rope.items() if k != "rope_theta"},
            SECTION: self.section(),
        }


# layers, hidden, mlp, heads, kv heads, tied: from the models' config.json; head_dim 128, vocabulary 151,936, theta 1e6.
QWEN3 = {
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 16, 8, True),
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16, 8, True),
    "Qwen/Qwen3-4B": (36, 2560, 9728, 32, 8, True),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, False),
    "Qwen/Qwen3-14B": (40, 5120, 17408, 40, 8, False),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64, 8, False),
}


def known_config(name: str) -> ModelConfig:
    """The configuration of a Qwen3 by its hub id; nothing is downloaded. Raises `InputError` for an unknown one."""
    if name not in QWEN3:
        raise InputError(f"model {name!r} is not known here; give a directory, or one of {', '.join(QWEN3)}")
    layers, hidden, mlp, heads, kv_heads, tied = QWEN3[name]
    return ModelConfig(151936, hidden, mlp, layers, heads, kv_heads, 128, 1e6, tie_word_embeddings=tied)


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


def _read_rope(hf: Mapping[str, Any], errors: list[str]) -> tuple[float, Yarn | None]:
    """theta and YaRN from `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4)."""

    def stated(name: str) -> dict[str, Any]:
        rope = {key: value for key, value in (hf.get(name) or {}).items() if value is not None}
        kind = rope.pop("type", "default")
        return rope and {"rope_type": kind, **rope}

    new, old = stated("rope_parameters"), stated("rope_scaling")
    thetas = {float(v) for v in (new.pop("rope_theta", None), old.pop("rope_theta", None), hf.get("rope_theta")) if v}
    if not thetas:
        errors.append("rope_theta is missing (neither rope_theta nor rope_parameters.rope_theta is there)")
    if len(thetas) > 1:
        errors.append(f"rope_theta and rope_parameters.rope_theta differ, {sorted(thetas)}; keep the right one")
    if new and old and new != old:
        errors.append(
            f"rope_parameters {new} and rope_scaling {old} differ; keep one (YaRN belongs into rope_parameters)"
        )
    theta, rope = min(thetas, default=0.0), dict(new or old)
    kind = rope.pop("rope_type", "default")
    known = {f.name for f in dataclasses.fields(Yarn)} if kind == "yarn" else set()
    if kind not in ("default", "yarn"):
        errors.append(f"rope_type is {kind!r}, only 'default' and 'yarn' are supported")
    elif rope.keys() - known:
        errors.append(f"rope_parameters has {sorted(rope.keys() - known)}, which rope_type {kind!r} does not know here")
    elif kind == "yarn" and "factor" not in rope:
        errors.append("rope_parameters.factor is missing (yarn needs it)")
    elif kind == "yarn":
        longest: Any = hf.get("max_position_embeddings") or 32768
        return theta, Yarn(**{"original_max_position_embeddings": longest} | rope)
    return theta, None
