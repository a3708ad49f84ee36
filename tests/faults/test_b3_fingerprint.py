"""The fingerprint of a base: what decides the model counts, and nothing else that lies beside it."""

import jax
import pytest
import tiny

from pd_jax.files import fingerprint, save_model, write_params
from pd_jax.params import init_params

CONFIG = tiny.config()


@pytest.fixture(params=["safetensors", "shards", "orbax"])
def base(request, tmp_path):
    directory, params = tiny.model_directory(tmp_path / "base"), init_params(CONFIG, jax.random.key(0))
    if request.param == "orbax":
        save_model(tmp_path / "saved", params, CONFIG, directory)
        return tmp_path / "saved"
    write_params(directory, params, CONFIG, max_shard_size=60_000 if request.param == "shards" else 10**9)
    return directory


def test_what_lies_beside_does_not_count(base):
    before = fingerprint(base)
    for name in ("results.json", "run.json", "metrics.jsonl", "trainer_state.json", "optimizer.safetensors", "x.txt"):
        (base / name).write_text("{}")
    (base / "evaluation").mkdir()
    (base / "evaluation" / "config.json").write_text("{}")
    assert fingerprint(base) == before


def test_what_decides_counts(base):
    weights = [p for p in base.rglob("*") if p.suffix == ".safetensors" or ("params" in p.parts and p.is_file())]
    assert weights
    settings = [base / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    seen = {fingerprint(base)}
    for path in [*weights, *settings]:
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(fingerprint(base))
    assert len(seen) == 1 + len(weights) + len(settings)
