"""GGUF, llama.cpp's format, read by transformers: dequantised weights, tokenizer, end tokens as a model directory."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pd_jax.columns import inverse_frequencies
from pd_jax.config import Dtype, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.checks import differences, finite, raise_collected
from pd_jax.files.config_json import LLAMA31_ROPE, LLAMA32_ROPE, config_from_hf
from pd_jax.files.directories import check_rows
from pd_jax.files.names import key_table
from pd_jax.files.runs import making
from pd_jax.files.safetensors import Pending, write_safetensors
from pd_jax.files.saving import check_new, write_plain_config

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's stretched RoPE divides every frequency by
END_TOKENS = ("eos", "eot", "eom")


class Converted(NamedTuple):
    """What came out of a GGUF file."""

    tensors: str  # "Q4_1 x 210, F32 x 61 -> float32"
    eos: list[int]  # what ends an answer


def import_gguf(file: Path, output: Path, dtype: Dtype = "float32") -> Converted:
    """Write the model in the GGUF `file` as the Hugging Face directory `output`, its weights dequantised to `dtype`.

    The weights equal those of `transformers.AutoModelForCausalLM.from_pretrained(..., gguf_file=, dtype=)` bit for bit.
    Raises `InputError` when `output` holds anything, and for a file that is damaged, incomplete or of another family.
    """
    check_new(output)
    reader = _read(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(file, reader, metadata)
    _check_tensors(file, reader, config)
    special = _special_ids(file, metadata)
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(file.absolute().parent), "gguf_file": file.name}
    with making(output) as stage:
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**where)
            model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
        except Exception as error:
            raise InputError(f"{file}: transformers cannot read it ({_reason(error)})") from None
        check_rows(tokenizer, config.vocab_size, str(file))
        _split_digits(tokenizer, metadata)
        tokenizer.save_pretrained(stage)
        weights = model.state_dict()
        pending = {name: _pending(file, name, weights[name]) for name in key_table(config)}
        write_safetensors(stage / "model.safetensors", pending)
        write_plain_config(stage, config, special, dtype)
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common()
    return Converted(f"{', '.join(f'{kind} x {count}' for kind, count in counts)} -> {dtype}", special["eos_token_id"])


def _pending(file: Path, name: str, tensor: Any) -> Pending:
    """A tensor of torch's as what is to be written. numpy has no bfloat16 of its own: that goes by its bits. Raises
    `InputError` for NaN and infinity."""
    import torch

    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    if not finite(array):
        raise InputError(f"{file}: {name} holds NaN or infinity; it is damaged, or overflows in another dtype")
    return Pending(array.dtype, array.shape, lambda: array)


def _read(file: Path) -> Any:
    """The file's header and its tensors, mapped. Raises `InputError` for what is no whole GGUF file."""
    try:
        import accelerate  # noqa: F401, transformers wants it
        import gguf
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed, which reads GGUF files; pip install 'pd_jax[hf]'") from None
    if not file.is_file():
        raise InputError(f"{file} is no file; pass a GGUF file")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # whatever the bytes lead to, from ValueError to UnicodeDecodeError and MemoryError
        raise InputError(f"{file} is truncated, damaged or no GGUF file ({_reason(error)}); get it again") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _special_ids(file: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The ids that generation_config.json names; what ends a turn or a message ends an answer too."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in (*END_TOKENS, "bos", "padding")}
    eos = dict.fromkeys(ids[name] for name in END_TOKENS if ids[name] is not None)
    if not eos:
        raise InputError(f"{file} names no end-of-sequence token (tokenizer.ggml.eos_token_id); add it with llama.cpp")
    named = {"bos_token_id": ids["bos"], "eos_token_id": list(eos), "pad_token_id": ids["padding"]}
    return {name: value for name, value in named.items() if value is not None}


def _config(file: Path, reader: Any, metadata: dict[str, Any]) -> ModelConfig:
    """What transformers makes of the metadata, and Llama 3's RoPE, which it leaves out."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(file.absolute().parent, gguf_file=file.name).to_dict()
    except Exception as error:
        raise InputError(f"{file}: transformers cannot read it ({_reason(error)})") from None
    found.pop("quantization_config", None)
    if found["model_type"] == "mistral":
        found["sliding_window"] = None  # llama.cpp has none; a file that says otherwise is refused below
    lost = [name for name in metadata if name.endswith((".rope.scaling.type", ".attention.sliding_window"))]
    lost = [f"{name} is {metadata[name]!r}" for name in lost if metadata[name] not in ("none", 0)]
    if lost:
        raise InputError(f"{file}: {'; '.join(lost)}, which transformers does not take from GGUF; convert the original")
    try:
        config = config_from_hf(found, ())
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    return config if factors is None else _with_llama3_rope(file, found, config, np.asarray(factors))


def _with_llama3_rope(file: Path, found: dict[str, Any], config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """`config` with the RoPE that the file's factors come from: of Llama 3.1 or 3.2. Raises `InputError` for others."""
    plain, _ = inverse_frequencies(config)
    for rope in (LLAMA31_ROPE, LLAMA32_ROPE):
        stretched = dataclasses.replace(config, llama3=rope)
        if factors.shape == plain.shape and np.allclose(plain / inverse_frequencies(stretched)[0], factors, rtol=1e-3):
            return stretched
    raise InputError(f"{file}: {ROPE_FACTORS} stretches RoPE as neither Llama 3.1 nor 3.2 does; convert the original")


def _check_tensors(file: Path, reader: Any, config: ModelConfig) -> None:
    """Raise `InputError` for tensors that are missing or unknown (transformers would skip both), of another shape, or
    of a type that cannot be dequantised."""
    import gguf

    family = {"mistral": "llama"}.get(config.family, config.family)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    expected = {}
    for name, entry in key_table(config).items():
        stem, _, suffix = name.rpartition(".")
        expected[f"{names.get_name(stem)}.{suffix}"] = entry.hf_shape
    found = {
        tensor.name: SimpleNamespace(shape=tuple(int(size) for size in reversed(tensor.shape)))
        for tensor in reader.tensors
        if tensor.name != ROPE_FACTORS
    }
    errors = differences(found, expected, "its metadata says")
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            errors.append(f"{tensor.tensor_type.name} (of {tensor.name}) cannot be dequantised here")
    raise_collected(file, errors)


def _split_digits(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """SmolLM's tokenizer takes digits one by one, which transformers leaves out when it reads a GGUF file."""
    from tokenizers import pre_tokenizers

    if metadata.get("tokenizer.ggml.pre") == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
