"""YaRN as Qwen3's model card writes it: rope_scaling is added, nothing else changes, and long contexts are taken."""

import json

import jax
import pytest
import tiny

from pd_jax import Branch, ParallelDecoder, TokenSample
from pd_jax.config import Yarn
from pd_jax.files import config_to_hf, load_config
from pd_jax.params import init_params

CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 40960),
        ({"rope_scaling": CARD}, 131072),
        ({"rope_scaling": CARD | {"factor": 2.0}}, 65536),
        ({"rope_scaling": CARD, "max_position_embeddings": 262144}, 262144),  # stated, and longer
    ],
)
def test_how_long_contexts_may_be(tmp_path, changes, most):
    hf = config_to_hf(tiny.config()) | {"max_position_embeddings": 40960}
    del hf["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(hf | changes))
    config = load_config(tmp_path)
    assert config.most_columns == most
    again = config_to_hf(config, json.loads((tmp_path / "config.json").read_text()))
    assert {key: again[key] for key in hf | changes} == hf | changes  # an export keeps the card's own fields


@pytest.mark.slow
def test_they_are_decoded():
    config = tiny.config(max_position_embeddings=40, yarn=Yarn(factor=4.0, original_max_position_embeddings=32))
    decoder = ParallelDecoder(config, init_params(config, jax.random.key(0)), tiny.tokenizer(), (319,))
    [result] = decoder.generate([TokenSample([5] * 119, [Branch([6])])], max_new_tokens=8)
    assert result.prefill_tokens == 120
    with pytest.raises(ValueError, match=r"take 129 columns, the model has max_position_embeddings 128"):
        decoder.generate([TokenSample([5] * 120, [Branch([6])])], max_new_tokens=8)
