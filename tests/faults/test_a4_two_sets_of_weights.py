"""model.safetensors beside an index of shards: what transformers takes is taken, and said."""

import jax
import numpy as np
import pytest
import tiny

from pd_jax.files import load_params, write_params
from pd_jax.params import init_params

CONFIG = tiny.config()


def both(directory, shards=True):
    """Seed 0 in model.safetensors, seed 1 in shards with an index."""
    tiny.model_directory(directory)
    write_params(directory, init_params(CONFIG, jax.random.key(1)), CONFIG, max_shard_size=60_000)
    write_params(directory, init_params(CONFIG, jax.random.key(0)), CONFIG)
    if not shards:
        for path in directory.glob("model-*.safetensors"):
            path.unlink()
    return directory


@pytest.mark.parametrize("shards", [True, False])
def test_the_whole_file_is_taken(tmp_path, caplog, shards):
    directory = both(tmp_path / "model", shards)
    got = load_params(directory, CONFIG)["embed"]
    np.testing.assert_array_equal(got, init_params(CONFIG, jax.random.key(0))["embed"])
    assert "has model.safetensors and model.safetensors.index.json; the former is taken" in caplog.text


@pytest.mark.slow
def test_so_does_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(both(tmp_path / "model"))
    want = init_params(CONFIG, jax.random.key(0))["embed"]
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), want)


def test_an_index_names_no_file_outside(tmp_path):
    directory = both(tmp_path / "model")
    (directory / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match=r"weight_map names '\.\./model-00001.*', which is no file of its directory"):
        load_params(directory, CONFIG)
