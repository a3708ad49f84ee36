"""End-of-sequence ids: files that name none are passed over, anything but known ids is one line that names the file."""

import json

import pytest
import tiny

from pd_jax.files import load_eos_ids


@pytest.fixture
def place(tmp_path):
    def write(generation, config=None):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ([319, 318], None, (319, 318)),
        (318, 5, (318,)),
        (0, 5, (0,)),
        ([], 318, (318,)),
        (None, [318], (318,)),
        ([], [], (319,)),
        (None, None, (319,)),
    ],
)
def test_the_next_source_is_asked(place, generation, config, ids):
    assert load_eos_ids(place(generation, config), tiny.tokenizer()) == ids


@pytest.mark.parametrize(
    "wrong", [320, -1, [319, 99999], [[319]], ["<|im_end|>"], "319", True, [None], 1.5, {"a": 319}], ids=repr
)
def test_what_is_no_id_is_refused(place, wrong):
    for stated, name in (((wrong,), "generation_config"), (([], wrong), "config")):
        with pytest.raises(ValueError, match=rf"/{name}\.json: eos_token_id is .* is no id of the tokenizer's 320 tok"):
            load_eos_ids(place(*stated), tiny.tokenizer())
