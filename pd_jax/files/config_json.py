"""Hugging Face's `config.json` both ways: what is read, written and refused of every family; sizes of known models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pd_jax.config import FAMILIES, SECTION, SETTINGS, Family, Llama3Rope, ModelConfig, Yarn, default_pairs
from pd_jax.errors import InputError

# Fields of config.json that we honour in one value only; anything else would be silently another model.
PLAIN_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim")
SCALINGS: dict[str, type[Yarn] | type[Llama3Rope]] = {"yarn": Yarn, "llama3": Llama3Rope}  # by rope_type


def config_from_hf(hf: Mapping[str, Any], pair_indices: Sequence[int] | None = None) -> ModelConfig:
    """Read a `config.json` (transformers 4 or 5 style) of one of `FAMILIES`, with our section if it has one.

    `pair_indices` is the caller's choice; None takes what is stored, else `default_pairs`.
    Raises `InputError` with every unsupported or missing field named, or when `pair_indices` contradicts what the
    weights were trained with.
    """
    errors: list[str] = []
    name = hf.get("model_type")
    family = FAMILIES.get(name or "")
    if family is None:
        errors.append(f"model_type is {name!r}, only {', '.join(map(repr, FAMILIES))} are supported")
        family = FAMILIES["qwen3"]
    if family.architecture not in (hf.get("architectures") or [family.architecture]):
        errors.append(f"architectures is {hf['architectures']}, only {[family.architecture]} is supported")
    for field, plain in PLAIN_FIELDS.items():
        if hf.get(field, plain) != plain:
            errors.append(f"{field} is {hf[field]!r}, only {plain!r} is supported")
    # transformers gives a Mistral without this field a window of 4,096.
    if name == "mistral" and hf.get("sliding_window", 4096) is not None:
        errors.append(f"sliding_window is {hf.get('sliding_window', 'missing, i.e. 4096')}, only null is supported")
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        errors.append(f"layer_types has {sorted(layer_types - {'full_attention'})}, only full_attention is supported")
    shape: dict[str, Any] = {field: hf.get(field) for field in SHAPE}
    if shape["head_dim"] is None and name != "qwen3" and shape["hidden_size"] and shape["num_attention_heads"]:
        shape["head_dim"] = shape["hidden_size"] // shape["num_attention_heads"]
    # No default for these: transformers' own (head_dim 128, 32 kv heads) are no better a guess than ours.
    errors += [f"{field} is missing" for field, size in shape.items() if size is None]
    theta, scaling = _read_rope(hf, family, errors)
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
    chosen = stored if stored is not None else pair_indices
    return ModelConfig(
        **shape,
        family=str(name),
        rope_theta=theta,
        rms_norm_eps=hf.get("rms_norm_eps") or 1e-6,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings")),
        max_position_embeddings=hf.get("max_position_embeddings") or 32768,
        **scaling,
        pair_indices=default_pairs(shape["head_dim"]) if chosen is None else tuple(chosen),
        branch_stride=ours.get("branch_stride", 1.0),
        sibling_bias=ours.get("sibling_bias", False),
        visibility=ours.get("visibility"),
        align=ours.get("align"),
    )


def _read_rope(hf: Mapping[str, Any], family: Family, errors: list[str]) -> tuple[float, dict[str, Any]]:
    """theta, and the field of `ModelConfig` that says how RoPE is stretched, from `rope_parameters` (transformers 5)
    and `rope_theta` + `rope_scaling` (4)."""

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
    fields = dataclasses.fields(SCALINGS[kind]) if kind in SCALINGS else ()
    given: dict[str, Any] = {"original_max_position_embeddings": hf.get("max_position_embeddings") or 32768, **rope}
    unknown = sorted(rope.keys() - {field.name for field in fields})
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if kind not in family.rope_types:
        known = ", ".join(map(repr, family.rope_types))
        errors.append(f"rope_type is {kind!r}, only {known} are supported in {family.architecture}")
    elif unknown:
        errors.append(f"rope_parameters has {unknown}, which rope_type {kind!r} does not know here")
    elif missing:
        errors += [f"rope_parameters.{name} is missing ({kind} needs it)" for name in missing]
    elif fields:
        return theta, {kind: SCALINGS[kind](**given)}
    return theta, {}


def config_to_hf(config: ModelConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json for `config`: `original` kept field by field where there is one, and our section.

    Without `original`, both generations' rope and dtype fields are written, because transformers 4 reads a version 5
    file with the wrong theta and says nothing.
    """
    if original is not None:
        return {**original, SECTION: config.section()}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    for kind in SCALINGS:
        scaling = getattr(config, kind)
        rope |= {} if scaling is None else {"rope_type": kind, **dataclasses.asdict(scaling)}
    numbers = (*SHAPE, "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    return {
        "architectures": [config.has.architecture],
        "model_type": config.family,
        "attention_bias": False,  # of all four projections; Qwen2's own three biases have no field
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        **{name: getattr(config, name) for name in numbers},
        "rope_parameters": rope,
        "rope_scaling": None if len(rope) == 2 else {k: v for k, v in rope.items() if k != "rope_theta"},
        SECTION: config.section(),
    }


LLAMA31_ROPE, LLAMA32_ROPE = Llama3Rope(8.0, 1.0, 4.0, 8192), Llama3Rope(32.0, 1.0, 4.0, 8192)

# What the models of one name share, as fields of `ModelConfig`.
QWEN3: dict[str, Any] = {"vocab_size": 151936, "rope_theta": 1e6}
QWEN2 = QWEN3 | {"family": "qwen2"}
LLAMA3 = {"family": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
LLAMA3 |= {"max_position_embeddings": 131072}
SMOLLM2 = {"family": "llama", "vocab_size": 49152, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
SMOLLM2 |= {"max_position_embeddings": 8192}

# By hub id: layers, hidden, mlp, heads, kv heads, head_dim, tied; and the rest. From the models' config.json.
KNOWN: dict[str, tuple[tuple[int, int, int, int, int, int, bool], dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": ((28, 1024, 3072, 16, 8, 128, True), QWEN3),
    "Qwen/Qwen3-1.7B": ((28, 2048, 6144, 16, 8, 128, True), QWEN3),
    "Qwen/Qwen3-4B": ((36, 2560, 9728, 32, 8, 128, True), QWEN3),
    "Qwen/Qwen3-8B": ((36, 4096, 12288, 32, 8, 128, False), QWEN3),
    "Qwen/Qwen3-14B": ((40, 5120, 17408, 40, 8, 128, False), QWEN3),
    "Qwen/Qwen3-32B": ((64, 5120, 25600, 64, 8, 128, False), QWEN3),
    "Qwen/Qwen2.5-0.5B": ((24, 896, 4864, 14, 2, 64, True), QWEN2),
    "Qwen/Qwen2.5-1.5B": ((28, 1536, 8960, 12, 2, 128, True), QWEN2),
    "Qwen/Qwen2.5-3B": ((36, 2048, 11008, 16, 2, 128, True), QWEN2),
    "Qwen/Qwen2.5-7B": ((28, 3584, 18944, 28, 4, 128, False), QWEN2 | {"vocab_size": 152064}),
    "meta-llama/Llama-3.2-1B": ((16, 2048, 8192, 32, 8, 64, True), LLAMA3 | {"llama3": LLAMA32_ROPE}),
    "meta-llama/Llama-3.2-3B": ((28, 3072, 8192, 24, 8, 128, True), LLAMA3 | {"llama3": LLAMA32_ROPE}),
    "meta-llama/Llama-3.1-8B": ((32, 4096, 14336, 32, 8, 128, False), LLAMA3 | {"llama3": LLAMA31_ROPE}),
    "HuggingFaceTB/SmolLM2-135M": ((30, 576, 1536, 9, 3, 64, True), SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M": ((32, 960, 2560, 15, 5, 64, True), SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B": ((24, 2048, 8192, 32, 32, 64, True), SMOLLM2 | {"rope_theta": 1.3e5}),
}


def known_config(name: str) -> ModelConfig:
    """The configuration of a published model by its hub id; nothing is downloaded. Raises `InputError` for an unknown
    one."""
    if name not in KNOWN:
        raise InputError(f"model {name!r} is not known here; give a directory, or one of {', '.join(KNOWN)}")
    (layers, hidden, mlp, heads, kv_heads, head_dim, tied), rest = KNOWN[name]
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        pair_indices=default_pairs(head_dim),
        tie_word_embeddings=tied,
        **rest,
    )
