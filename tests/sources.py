"""Tiny Hugging Face model directories, and the converters run as their commands are."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pd_jax.files import config_from_hf, write_params
from pd_jax.params import init_params

ROOT = Path(__file__).parents[1]

# Field by field what the hub's Qwen3-0.6B says (transformers 4 style), at a tiny size.
HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 64,
}


def make_source(directory, dtype=jnp.float32, seed=0, **changes):
    """A complete tiny Hugging Face directory with random weights."""
    directory.mkdir(parents=True)
    hf = HF_CONFIG | changes
    (directory / "config.json").write_text(json.dumps(hf, indent=2))
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 2],   "pad_token_id": 1}')
    vocab = {f"w{i}": i for i in range(60)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w1").save_pretrained(directory)
    config = config_from_hf(hf, ())
    write_params(directory, init_params(config, jax.random.key(seed), dtype), config)
    return directory


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "convert" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def convert(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    load_script(name).main()


def tensors(directory):
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}
