"""Models of random weights to time, and the same weights in transformers."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any


def shape_of(model: str) -> Any:
    """A `ModelConfig` that transformers can compute too: a Qwen3's by its hub id, or "29m"."""
    from pd_jax.config import ModelConfig
    from pd_jax.files import known_config

    if model != "29m":
        return replace(known_config(model), pair_indices=())
    return ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rope_theta=1e6,
        tie_word_embeddings=True,
        pair_indices=(),
    )


def in_transformers(config: Any, params: Any, dtype: str, device: str) -> Any:
    """The same weights as a transformers model."""
    import transformers

    from pd_jax.files import config_to_hf, write_params

    with tempfile.TemporaryDirectory() as directory:
        write_params(Path(directory), params, config)
        Path(directory, "config.json").write_text(json.dumps(config_to_hf(config)))
        transformers.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)


def tokens_only(vocabulary: int) -> Any:
    """A tokenizer of as many words as the model has rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")))


def equal_branches(tokens: int, branches: int, batch: int) -> Any:
    """Coordinates of rows of `branches` equally long branches without a background; the last may be shorter."""
    from pd_jax.columns import Coordinates
    from pd_jax.layout import Branch, TokenSample, build_layout

    lengths = [tokens // branches + (b < tokens % branches) for b in range(branches)]
    sample = TokenSample([], [Branch([0] * length) for length in lengths if length])
    return Coordinates.of(build_layout([[sample]] * batch, objective="all"))
