"""Killed, or the disk full, at every single change to a file: nothing half-done looks whole, and the same again works.

One row is one fault in one writer, tried at its first change to the disk, its second, and so on to its last.
"""

import json
import re
from pathlib import Path

import jax
import pytest
import tiny
from adapters import random_adapters
from injected import Killed, at_change
from sources import make_source

from pd_jax.config import LoraConfig
from pd_jax.data.squad import Context, Question
from pd_jax.errors import InputError
from pd_jax.evaluation.baselines import Decoded
from pd_jax.evaluation.rows import read_predictions, run_row
from pd_jax.evaluation.ways import WAYS, Conditions
from pd_jax.files import (
    check_output,
    claim,
    export_model,
    import_model,
    keep_metrics,
    prove_saving,
    save_adapter,
    save_model,
    write_run,
)
from pd_jax.jobs import open_answers
from pd_jax.machines import write_whole
from pd_jax.params import init_params

CONFIG = tiny.config(num_hidden_layers=1)
PARAMS = init_params(CONFIG, jax.random.key(0))
CONTEXTS = [Context("t", f"c{i}", (Question(f"q{i}", "?", ("a",)),)) for i in range(4)]


def contents(directory: Path) -> dict[str, bytes]:
    """By name; without what is measured."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: re.sub(rb'"peak_bytes": \d+', b"", data) for name, data in files.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("models") / "hf", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def plain_checkpoints(monkeypatch):
    """Orbax writes in threads of its own, which cannot be stopped at a place of our choice."""

    def write(path, params):
        for number, leaf in enumerate(jax.tree.leaves(params)[:2]):
            (path / str(number)).mkdir(parents=True)
            (path / str(number) / "array").write_bytes(bytes(leaf))

    monkeypatch.setattr("pd_jax.files.saving.write_checkpoint", write)
    monkeypatch.setattr("pd_jax.files.export.write_checkpoint", write)


# Writers: what they do in a directory, again and again until it is done -----------------------------------------------


def convert(out, model):
    import_model(str(model), out)


def export(out, model):
    export_model(str(model), out, max_shard_size=20_000)


def save(out, model):
    """As a training run does at its end: beside its own files, in the place of an older model."""
    if not (out / "run.json").exists():
        out.mkdir(exist_ok=True)
        write_whole(out / "run.json", "{}")
    save_model(out, PARAMS, CONFIG, model)


def adapter(out, model):
    lora = LoraConfig(r=2)
    save_adapter(out, random_adapters(CONFIG, lora), lora, CONFIG, base="base")


def begin(out, model):
    """What a training run does before its first step."""
    with claim(out):
        if check_output(out, {"a": 1}):
            prove_saving(out, 1)
            write_run(out, {"a": 1}, None, {}, finished=False)


def metrics(out, model):
    if not (out / "metrics.jsonl").exists():
        write_whole(out / "metrics.jsonl", "".join(f'{{"step": {i}}}\n' for i in range(1, 5)))
    keep_metrics(out / "metrics.jsonl", 2)


def answers(out, model):
    with open_answers(out / "answers.jsonl", {"about": 1}) as (file, done):
        for line in {1, 2, 3} - done:
            file.write(json.dumps({"line": line, "id": str(line)}).encode() + b"\n")
            file.flush()


def predictions(out, model):
    path, settings = out / "predictions.jsonl", {"row": "columns"}
    read_predictions(path, settings)
    run_row(
        WAYS["columns"],
        lambda: lambda batch, limit, _: Decoded([[[5]] for _ in batch], [[True] for _ in batch], 1, 1, 1),
        CONTEXTS,
        tiny.tokenizer(),
        conditions=Conditions(
            max_new_tokens=1, batch_size=2, repeats=0, dtype="float32", align=None, pair_indices=None
        ),
        settings=settings,
        path=path,
        advance=lambda n: None,
    )


WRITERS = {
    "convert": (convert, "config.json"),
    "export": (export, "config.json"),
    "save": (save, "config.json"),
    "adapter": (adapter, "adapter_config.json"),
    "begin": (begin, "run.json"),
    "metrics": (metrics, ""),
    "answers": (answers, "answers.jsonl"),
    "predictions": (predictions, ""),
}


def cut_short(fault, number, out, write, model) -> bool:
    """Whether the `number`-th change to the disk was met by `fault`."""
    try:
        with at_change(number, fault, out.parent):
            write(out, model)
    except (Killed, OSError, InputError):
        pass
    else:
        return False
    return True


@pytest.mark.parametrize("fault", ["killed", "full"])
@pytest.mark.parametrize("writer", WRITERS)
def test_at_every_change(tmp_path, model, writer, fault):
    write, last = WRITERS[writer]
    write(tmp_path / "whole", model)
    whole, number = contents(tmp_path / "whole"), 1
    while cut_short(fault, number, out := tmp_path / str(number), write, model):
        left = contents(out) if out.exists() else {}
        if last in left:
            assert left.items() >= whole.items()  # what looks complete is
        if fault == "full":
            assert not [name for name in left if ".partial" in name and writer != "answers"]
        if last not in left or writer not in ("answers", "convert", "export"):  # these make nothing twice
            write(out, model)
        assert contents(out).items() >= whole.items()
        assert last in left or contents(out) == whole
        number += 1
    assert contents(out) == whole
    assert number > 3  # changes there were
    print(f"{writer}, {fault}: {number - 1} places")


OLD, NEW = "old\n" * 1000, "new\n" * 3000


@pytest.mark.parametrize("fault", ["killed", "full"])
def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path, fault):
    seen = set()
    for number in range(1, 9):
        path = tmp_path / str(number) / "x"
        write_whole(path, OLD)
        try:
            with at_change(number, fault, tmp_path):
                write_whole(path, NEW)
        except (Killed, OSError):
            assert path.read_text() == OLD
            seen.add("old")
        else:
            assert path.read_text() == NEW
            seen.add("new")
    assert seen == {"old", "new"}
