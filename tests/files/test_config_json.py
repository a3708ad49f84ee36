"""config.json of both generations; whatever would be silently another model is refused by name."""

import pytest

from pd_jax.config import SECTION, ModelConfig, Yarn, default_pairs
from pd_jax.files import config_from_hf, config_to_hf, known_config

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


# Fields that matter of other families' files on the hub.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip


@pytest.mark.parametrize(("hf", "name"), [(QWEN2, "Qwen/Qwen2.5-0.5B"), (LLAMA, "meta-llama/Llama-3.2-1B")])
def test_other_families_are_read_as_published(hf, name):
    """Without a head_dim it is hidden_size / heads; a window that is not in use does not matter."""
    assert config_from_hf(hf) == known_config(name)


def test_mistral_without_a_window():
    config = config_from_hf(MISTRAL)
    assert (config.family, config.head_dim, config.tie_word_embeddings) == ("mistral", 128, False)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has \['sliding_attention'\]"),
        (QWEN2, {"architectures": ["Qwen3ForCausalLM"]}, r"only \['Qwen2ForCausalLM'\] is supported"),
        (QWEN2, {"rope_scaling": LLAMA["rope_scaling"]}, "rope_type is 'llama3', only 'default', 'yarn' are supported"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing .llama3 needs"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"hidden_size": None, "head_dim": None}, "hidden_size is missing; head_dim is missing"),
        (MISTRAL, {"sliding_window": 4096}, "sliding_window is 4096, only null is supported"),
        (MISTRAL, {"model_type": "mixtral"}, "model_type is 'mixtral', only 'qwen3', 'qwen2', 'llama', 'mistral' are"),
    ],
)
def test_what_other_families_do_not_support_is_named(hf, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf | change)


def test_a_mistral_that_says_nothing_has_a_window():
    with pytest.raises(ValueError, match=r"sliding_window is missing, i\.e\. 4096, only null is supported"):
        config_from_hf({key: value for key, value in MISTRAL.items() if key != "sliding_window"})


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


def test_default_pairs_keep_their_frequencies_at_other_head_sizes():
    assert [default_pairs(size) for size in (128, 64, 32)] == [(8, 16, 24), (4, 8, 12), (2, 4, 6)]
    with pytest.raises(ValueError, match=r"head_dim 128 and have no equals at head_dim 24; pass --pair-indices"):
        default_pairs(24)
