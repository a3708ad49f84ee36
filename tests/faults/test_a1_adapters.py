"""adapter_config.json: what is not read must change nothing, or is refused by its name."""

import json
import re

import jax
import pytest
import tiny
from adapters import random_adapters

from pd_jax.config import LoraConfig
from pd_jax.files import load_adapter, save_adapter

CONFIG = tiny.config()


@pytest.fixture
def adapter(tmp_path):
    lora = LoraConfig(r=4)
    save_adapter(tmp_path, random_adapters(CONFIG, lora), lora, CONFIG, base="base")

    def change(**fields):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq")),
        *(("init_lora_weights", kind) for kind in ("lora_ga", "mica", "something new", 1.5)),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"x": 1}),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {"x": 1}),
        ("megatron_config", {"x": 1}),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("revision", "experiment"),
        ("a_field_of_tomorrow", True),
    ],
    ids=str,
)
def test_what_peft_alone_can_do_is_refused(adapter, field, value):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {field} is {value!r}, which only PEFT")):
        load_adapter(adapter(**{field: value}), CONFIG)


def test_what_changes_nothing_is_read(adapter):
    loaded, _ = load_adapter(adapter(), CONFIG)
    for fields in (
        *({"init_lora_weights": kind} for kind in (True, False, None, "gaussian", "orthogonal", "eva")),
        {"a_field_of_tomorrow": False, "another": None, "third": [], "fourth": {}},
        {"layers_pattern": "layers", "exclude_modules": ["x"], "revision": "main", "eva_config": {"rho": 2.0}},
    ):
        again, _ = load_adapter(adapter(**fields), CONFIG)
        jax.tree.map(lambda a, b: pytest.approx(a) == b, loaded, again)


def test_whatever_peft_writes_by_default_is_read(adapter):
    peft = pytest.importorskip("peft")
    usual = {
        key: str(value.value) if key == "peft_type" else value for key, value in peft.LoraConfig().to_dict().items()
    }
    ours = {key: value for key, value in usual.items() if key not in ("r", "lora_alpha", "target_modules")}
    assert load_adapter(adapter(**ours), CONFIG)[1].r == 4
