"""Weights on disk: model directories, Hugging Face's safetensors and PEFT's adapters, read and written."""

from pd_jax.files.checks import check_agreement as check_agreement, check_needed as check_needed
from pd_jax.files.config_json import (
    config_from_hf as config_from_hf,
    config_to_hf as config_to_hf,
    known_config as known_config,
)
from pd_jax.files.directories import (
    check_rows as check_rows,
    load_config as load_config,
    load_eos_ids as load_eos_ids,
    load_params as load_params,
    load_tokenizer as load_tokenizer,
)
from pd_jax.files.events import EventFile as EventFile
from pd_jax.files.export import export_model as export_model, import_model as import_model
from pd_jax.files.find import (
    ADAPTER_CONFIG as ADAPTER_CONFIG,
    ModelSource as ModelSource,
    find_model as find_model,
    find_source as find_source,
    fingerprint as fingerprint,
    read_adapter_config as read_adapter_config,
    read_config_json as read_config_json,
)
from pd_jax.files.gguf import import_gguf as import_gguf
from pd_jax.files.orbax import (
    digest as digest,
    read_checkpoint as read_checkpoint,
    root_cause as root_cause,
    write_checkpoint as write_checkpoint,
)
from pd_jax.files.peft import load_adapter as load_adapter, lora_flags as lora_flags, save_adapter as save_adapter
from pd_jax.files.runs import (
    Base as Base,
    check_base as check_base,
    check_data as check_data,
    check_output as check_output,
    claim as claim,
    keep_metrics as keep_metrics,
    write_run as write_run,
)
from pd_jax.files.safetensors import parse_size as parse_size, write_params as write_params
from pd_jax.files.saving import (
    prove_saving as prove_saving,
    save_model as save_model,
    staging as staging,
    write_metadata as write_metadata,
    write_untrained as write_untrained,
)
