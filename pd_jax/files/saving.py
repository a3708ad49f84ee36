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

from pd_jax.config import SECTION, Dtype, ModelConfig
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


STAGE, LOCK = ".partial", ".lock"  # inside a directory that is written: what is not complete, and who writes
MOVING = ".moving"  # inside STAGE: the names of what has begun to move out of it, the last one last
PROBE, RUN_STAGE = ".probe", ".run.json.partial"  # a proof that it can be written, and a run.json that is not complete


def left_in(directory: Path) -> list[Path]:
    """What `directory` holds, beside what a process that was killed may have left there: also files that it had moved
    already, until the last one is there."""
    moving = directory / STAGE / MOVING
    moved = moving.read_text(encoding="utf-8").splitlines() if moving.is_file() else []
    if moved and (directory / moved[-1]).exists():
        moved = []
    return [path for path in directory.iterdir() if path.name not in (STAGE, LOCK, PROBE, RUN_STAGE, *moved)]


@contextmanager
def staging(directory: Path, last: str = "config.json") -> Generator[Path]:
    """A temporary directory inside `directory` to write into; what it holds is moved out when the block ends without an
    error. Inside, because what lies beside may be another file system, or may not be writable.

    New files replace those of the same name and the rest stays: the file `last` goes away first and comes last, so that
    what an interruption leaves behind never looks complete.
    """
    new, stage, moving = not directory.exists(), directory / STAGE, False
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir()
        yield stage
        names = sorted((path.name for path in stage.iterdir()), key=last.__eq__)
        (stage / MOVING).write_text("\n".join(names), encoding="utf-8")
        moving = True
        (directory / last).unlink(missing_ok=True)
        for name in names:
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(stage / name, directory / name)
        moving = False
    finally:
        if not moving:  # else it says what has moved, as after a kill
            shutil.rmtree(stage, ignore_errors=True)
        if new and not any(directory.iterdir()):
            directory.rmdir()


def prove_saving(directory: Path, needed: int) -> None:
    """Raise `InputError` unless `needed` bytes can be saved in `directory`, beside or in the place of what is there:
    a small file takes the way of the model, and is read back. Only process 0 looks."""
    if jax.process_index() != 0:
        return
    probe = directory / PROBE
    try:
        with staging(directory, last=probe.name) as stage:
            (stage / probe.name).write_bytes(b"pd_jax")
        same = probe.read_bytes() == b"pd_jax"
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output-dir {directory} cannot be written ({error}); choose another") from None
    if not same:
        raise InputError(f"--output-dir {directory} does not give back what was written to it; choose another")
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if free + there < needed:
        raise InputError(
            f"--output-dir {directory} has {free / 2**30:.2f} GiB free, and the model and its checkpoints take "
            f"{(needed - there) / 2**30:.2f} GiB; make room, lower --keep or choose another"
        )


def check_new(directory: Path) -> None:
    """Raise `InputError` when a conversion would write over something."""
    if directory.exists() and (not directory.is_dir() or left_in(directory)):
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
        write_checkpoint(directory / STAGE / PARAMS, params)
        return
    with staging(directory) as stage:
        write_checkpoint(stage / PARAMS, params)
        write_metadata(stage, config_to_hf(config, read_config_json(source)), source, params["embed"].dtype)


def write_untrained(directory: Path, config: ModelConfig, tokenizer: Any) -> None:
    """A model directory without weights, for --random-init: config.json, without our settings, and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_plain_config(directory, config, special, "float32")


def write_plain_config(directory: Path, config: ModelConfig, special: dict[str, Any], dtype: Dtype) -> None:
    """config.json without our settings, for weights of `dtype`, and generation_config.json; both name the `special`
    token ids."""
    plain = {key: value for key, value in config_to_hf(config).items() if key != SECTION}
    write_json(directory / "generation_config.json", special)
    write_json(directory / "config.json", plain | special | {"dtype": dtype})
