"""config.json of both generations; whatever would be silently another model is refused by name."""

import pytest

from pd_jax.config import SECTION, ModelConfig, Yarn
from pd_jax.files import config_from_hf, config_to_hf

# Qwen3-4B-Instruct-2507 as the hub has it (transformers 4 style).
HUB = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The same, loaded and saved by transformers 5.
RESAVED = {key: value for key, value in HUB.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
RESAVED |= {
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 36,
    "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"},
    "transformers_version": "5.23.0",
}


def test_both_generations():
    config = config_from_hf(HUB)
    assert config == config_from_hf(RESAVED)
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (5e6, 128, 8)
    assert (config.yarn, config.tie_word_embeddings, config.pair_indices) == (None, True, (8, 16, 24))


@pytest.mark.parametrize(
    "where",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
        {
            "rope_parameters": {
                "rope_theta": 5e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                "attention_factor": None,
            }
        },
    ],
)  # fmt: skip
def test_yarn_in_all_its_spellings(where):
    assert config_from_hf(HUB | where).yarn == Yarn(factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize("yarn", [None, Yarn(factor=4.0, original_max_position_embeddings=32768)])
def test_our_own_file_is_read_back(yarn):
    config = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=1e6, yarn=yarn, pair_indices=(3, 5), branch_stride=2.0,
        sibling_bias=True,
    )  # fmt: skip
    assert config_from_hf(config_to_hf(config)) == config


def test_original_fields_stay_as_they_are():
    config = config_from_hf(HUB, (3, 5))
    assert config_to_hf(config, HUB) == HUB | {
        SECTION: {"pair_indices": [3, 5], "branch_stride": 1.0, "sibling_bias": False}
    }
    assert config_from_hf(config_to_hf(config, HUB)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has \['sliding_attention'\]"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, r"differ, \[10000.0, 5000000.0\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_parameters has \['factor'\]"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_parameters.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, r"rope_parameters has \['mscale'\]"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters .* and rope_scaling .* differ",
        ),
        ({SECTION: {"pair_indices": [8], "spiral": 1}}, r"unknown key \['spiral'\]"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(HUB | change)


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu'.*attention_bias is True.*vocab_size is missing"):
        config_from_hf(
            {k: v for k, v in HUB.items() if k != "vocab_size"} | {"attention_bias": True, "hidden_act": "gelu"}
        )
