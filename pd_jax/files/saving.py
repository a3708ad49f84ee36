"""Writing a model directory: all of it or nothing, so that what an interruption leaves never looks complete."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pd_jax.config import SECTION, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.config_json import config_to_hf
from pd_jax.files.find import PARAMS, read_config_json
from pd_jax.files.orbax import write_checkpoint
from pd_jax.params import Params

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")


def _stage(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.partial"


@contextmanager
def staging(directory: Path, last: str = "config.json") -> Generator[Path]:
    """A temporary sibling of `directory` to write into; it takes its place when the block ends without an error.

    Where `directory` exists already, the new files replace those of the same name and the rest stays: the file `last`
    goes away first and comes last, so that what an interruption leaves behind never looks complete.
    """
    stage = _stage(directory)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        if not directory.exists():
            stage.rename(directory)
            return
        names = sorted((path.name for path in stage.iterdir()), key=last.__eq__)
        (directory / last).unlink(missing_ok=True)
        for name in names:
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(stage / name, directory / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_new(directory: Path) -> None:
    """Raise `InputError` when a conversion would write over something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty; remove it or choose another --output")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` for people to read: indented, and in its own letters."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_metadata(directory: Path, hf: dict[str, Any], source: Path, dtype: Any) -> None:
    """`hf` as config.json for weights of `dtype`, and the tokenizer and generation files of `source`.

    A dtype field of `hf` that would be untrue is corrected: transformers loads weights in the dtype that it names.
    """
    hf = hf | dict.fromkeys([key for key in ("torch_dtype", "dtype") if key in hf], np.dtype(dtype).name)
    write_json(directory / "config.json", hf)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def save_model(directory: Path, params: Params, config: ModelConfig, source: Path) -> None:
    """Write a complete model directory: `params/`, config.json, and `source`'s tokenizer and generation files.

    config.json is `source`'s, field by field, with our settings beside them. All or nothing, see `staging`. Every
    process must call it; process 0 writes the small files.
    """
    if jax.process_index() != 0:
        write_checkpoint(_stage(directory) / PARAMS, params)
        return
    with staging(directory) as stage:
        write_checkpoint(stage / PARAMS, params)
        write_metadata(stage, config_to_hf(config, read_config_json(source)), source, params["embed"].dtype)


def write_untrained(directory: Path, config: ModelConfig, tokenizer: Any) -> None:
    """A model directory without weights, for --random-init: config.json, without our settings, and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    plain = {key: value for key, value in config_to_hf(config).items() if key != SECTION}
    for name, content in (("generation_config.json", special), ("config.json", plain | special | {"dtype": "float32"})):
        write_json(directory / name, content)
