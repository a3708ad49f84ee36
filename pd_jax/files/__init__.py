"""Weights on disk: model directories, Hugging Face's safetensors and PEFT's adapters, read and written."""

from pd_jax.files.directories import (
    ADAPTER_CONFIG,
    ModelSource,
    check_new,
    find_model,
    find_source,
    fingerprint,
    load_config,
    load_eos_ids,
    load_params,
    load_tokenizer,
    read_adapter_config,
    root_cause,
    save_model,
    save_params,
    staging,
    write_metadata,
    write_untrained,
)
from pd_jax.files.peft import load_adapter, save_adapter
from pd_jax.files.safetensors import key_table, parse_size, write_params

__all__ = [
    "ADAPTER_CONFIG",
    "ModelSource",
    "check_new",
    "find_model",
    "find_source",
    "fingerprint",
    "key_table",
    "load_adapter",
    "load_config",
    "load_eos_ids",
    "load_params",
    "load_tokenizer",
    "parse_size",
    "read_adapter_config",
    "root_cause",
    "save_adapter",
    "save_model",
    "save_params",
    "staging",
    "write_metadata",
    "write_params",
    "write_untrained",
]
