"""Damaged input of every kind: a reader takes it or says in one line what is wrong, and raises nothing else.

    python tests/faults/test_d2_fuzz.py --count 100000

changes so many inputs, for each reader in turn, and prints what became of them. The suite runs the first 800.
"""  # fmt: skip

import argparse
import collections
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from adapters import random_adapters
from sources import make_source, tensors

from pd_jax.cli import parse
from pd_jax.config import LoraConfig
from pd_jax.data.fineweb import load_documents
from pd_jax.data.squad import load_squad
from pd_jax.errors import InputError
from pd_jax.files import (
    check_output,
    keep_metrics,
    load_adapter,
    load_config,
    load_eos_ids,
    load_params,
    save_adapter,
    write_run,
)
from pd_jax.training import FinetuneFlags

COUNT = 800  # of the fast suite
NASTY = (
    "null", "true", "-1", "0", "1e400", "NaN", "1.5", "10000000000000000000000", '""', '"x"', "[]", "{}", "[[1]]",
    '{"a": 1}', '"\\ud800"', '"../../x"', "[" * 2000, "'", ":", "&a *a", "!!python/object:os.system {}",
)  # fmt: skip
TOKEN = re.compile(rb'"[^"]*"|-?\d+(?:\.\d+)?|true|false|null|[\[\]{}:,]')


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: a value of the text becomes another, or bytes are flipped, cut, doubled or added."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(TOKEN.finditer(data))
        # Mostly values and keys: what is still JSON gets further than what is none.
        tokens = [token for token in found if token.group()[0] not in b"[]{}:,"] if rng.random() < 0.8 else found
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.randint(1, 30))
        kind = rng.random()
        if kind < 0.6 and tokens:
            token = rng.choice(tokens)
            new = rng.choice(tokens).group() if rng.random() < 0.3 else rng.choice(NASTY).encode()
            data = data[: token.start()] + new + data[token.end() :]
        elif kind < 0.7:
            data = data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:to][:1]) + data[at + 1 :]
        elif kind < 0.8:
            data = data[:at] + data[to:]
        elif kind < 0.9:
            data = data[:to] + data[at:to] + data[to:]
        else:
            data = data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]
    return data


def make_readers(folder: Path) -> dict[Path, object]:
    """Files that are all right, and what reads each of them."""
    model = make_source(folder / "model")
    tiny.tokenizer().save_pretrained(model)
    config, lora = load_config(model, ()), LoraConfig()
    save_adapter(folder / "adapter", random_adapters(config, lora), lora, config, base="base")
    shards = make_source(folder / "shards")
    names = list(tensors(shards))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    flags = json.loads(json.dumps(asdict(FinetuneFlags())))
    write_run(folder / "run", flags, {"name": "a", "fingerprint": "b"}, {"a": "b"}, finished=True)
    metrics, flat, text = folder / "metrics.jsonl", folder / "flat.jsonl", folder / "text.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in (1, 2, 3)))
    rows = [{"id": str(i), "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}} for i in range(3)]
    flat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3)))
    (folder / "flags.yaml").write_text("learning_rate: 1e-4\nmesh: [1, -1, 1]\nuse-lora: true\nseed: 3\nalign: left\n")

    def documents(path: Path) -> None:
        list(load_documents(str(path), streaming=True))

    return {
        tiny.squad(folder / "squad.json", 3): lambda path: load_squad(str(path)),
        flat: lambda path: load_squad(str(path)),
        text: documents,
        model / "config.json": lambda path: load_config(path.parent),
        model / "generation_config.json": lambda path: load_eos_ids(path.parent, tiny.tokenizer()),
        model / "model.safetensors": lambda path: load_params(path.parent, config),
        shards / "model.safetensors.index.json": lambda path: load_params(path.parent, config),
        folder / "adapter" / "adapter_config.json": lambda path: load_adapter(path.parent, config),
        folder / "adapter" / "adapter_model.safetensors": lambda path: load_adapter(path.parent, config),
        folder / "run" / "run.json": lambda path: check_output(path.parent, flags),
        metrics: lambda path: keep_metrics(path, 1),
        folder / "flags.yaml": lambda path: parse(FinetuneFlags, ["--config", str(path)]),
    }


def fuzz(folder: Path, count: int, seed: int = 0) -> dict[str, collections.Counter]:
    """What became of `count` inputs, by file. Raises what a reader raised beyond `InputError`, and keeps the input."""
    logging.disable(logging.WARNING)
    became: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    try:
        readers = list(make_readers(folder).items())
        whole = {path: path.read_bytes() for path, _ in readers}
        for path, read in readers:
            read(path)  # all right as they are
        for number in range(count):
            path, read = readers[number % len(readers)]
            rng = random.Random(f"{seed} {number}")
            header = 2_000 if path.suffix == ".safetensors" else len(whole[path])  # numbers may be any numbers
            path.write_bytes(mutate(whole[path][:header], rng) + whole[path][header:])
            try:
                read(path)
                outcome = "taken"
            except InputError as error:
                outcome = "refused" if str(error).strip() else "refused without a word"
            except BaseException as error:
                kept = shutil.copy(path, Path(tempfile.gettempdir()) / f"fuzz-{number}{path.suffix}")
                raise AssertionError(
                    f"{path.name}, input {number} of seed {seed}, kept as {kept}: {error!r}"
                ) from error
            finally:
                path.write_bytes(whole[path])
            became[path.name][outcome] += 1
    finally:
        logging.disable(logging.NOTSET)
    return became


def test_no_reader_raises_anything_but_one_line(tmp_path):
    became = fuzz(tmp_path, COUNT)
    assert len(became) == 12
    for name, counts in became.items():
        assert counts["refused"], name  # the changes do reach the reader


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        total = fuzz(Path(directory), asked.count, asked.seed)
    for file, counts in total.items():
        print(f"{file:30} {counts.total():6} inputs: {counts['refused']:6} refused, {counts['taken']:6} taken")
    print(f"{asked.count} inputs in {time.monotonic() - began:.0f} s; other exceptions: 0")
