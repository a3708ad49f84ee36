"""PEFT's files both ways, merging and exporting, what belongs together.

Logits are compared: a wrong key only warns in PEFT.
"""

import json
from functools import cache

import jax
import numpy as np
import pytest
from adapters import CHOICES, LAYOUT, close, ours, random_adapters
from safetensors.numpy import load_file, save_file
from sources import FAMILY_FIELDS, convert, make_source, tensors

from pd_jax.config import SECTION, LoraConfig
from pd_jax.files import load_adapter, load_config, load_params, save_adapter, save_model
from pd_jax.params import init_params

OTHERS = ("qwen2", "llama", "mistral")


@pytest.fixture(scope="module")
def make_base(tmp_path_factory):
    """A directory of a family, made once."""
    return cache(lambda family: make_source(tmp_path_factory.mktemp("lora") / "hf", **FAMILY_FIELDS[family]))


@pytest.fixture(scope="module")
def base(make_base):
    return make_base("qwen3")


# Every choice with Qwen3; adapters on projections with biases at once, the rest when there is time.
FAMILY_CHOICES = [
    *(pytest.param("qwen3", *choice, id=str(choice)) for choice in CHOICES),
    pytest.param("qwen2", *CHOICES[0], id="qwen2"),
    *(
        pytest.param(family, *choice, id=f"{family}-{number}", marks=pytest.mark.slow)
        for family in OTHERS
        for number, choice in enumerate(CHOICES)
        if (family, number) != ("qwen2", 0)
    ),
]


# --- PEFT's files
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(("family", "targets", "rslora"), FAMILY_CHOICES)
def test_ours_in_peft(make_base, tmp_path, family, targets, rslora):
    base = make_base(family)
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    config = load_config(base, ())
    params, lora = load_params(base, config), LoraConfig(r=4, alpha=6, target_modules=targets, rslora=rslora)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "adapter", adapters, lora, config, base=str(base))
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        want = model(torch.tensor(LAYOUT.tokens).long()).logits.numpy()
    close(ours(params, config, adapters=adapters, lora=lora), want)
    back, settings = load_adapter(tmp_path / "adapter", config)
    assert settings == LoraConfig(r=4, alpha=6, target_modules=settings.target_modules, rslora=rslora)
    assert set(settings.target_modules) == set(targets)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, adapters)))


@pytest.mark.parametrize(
    ("family", "targets", "rslora"),
    [
        *FAMILY_CHOICES[:3],
        ("qwen3", "all-linear", True),
        ("qwen3", r".*self_attn\.[qk]_proj", False),
        *(pytest.param(family, "all-linear", False, marks=pytest.mark.slow) for family in OTHERS),
    ],
)
def test_peft_in_ours(make_base, tmp_path, family, targets, rslora):
    base = make_base(family)
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = model(torch.tensor(LAYOUT.tokens).long()).logits.numpy()
    config = load_config(base, ())
    params = load_params(base, config)
    adapters, lora = load_adapter(tmp_path / "adapter", config)
    assert (lora.r, lora.alpha, lora.dropout, lora.rslora) == (4, 6, 0.1, rslora)
    close(ours(params, config, adapters=adapters, lora=lora), want)
    assert np.abs(want - ours(params, config)).max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_merge_and_export_equals_peft(make_base, tmp_path, monkeypatch, family):
    """Our adapter, merged and exported by flax_to_hf, against PEFT's own merge of it; the settings come along."""
    base = make_base(family)
    peft, transformers = map(pytest.importorskip, ("peft", "transformers"))
    config = load_config(base, (3, 5))
    lora = LoraConfig(r=4, alpha=6)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, base=str(base))
    convert("flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert load_config(tmp_path / "merged") == config
    with pytest.warns(UserWarning, match="pd_jax"):
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        )
    want = model.merge_and_unload().state_dict()
    got = tensors(tmp_path / "merged")
    assert got.keys() == want.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for name, tensor in got.items():
        close(tensor, want[name].numpy(), 1e-6)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded).__name__.lower() == f"{family}forcausallm"
    assert all(np.array_equal(loaded.state_dict()[name].numpy(), tensor) for name, tensor in got.items())


def test_adapter_over_a_pd_jax_checkpoint(base, tmp_path, monkeypatch):
    config = load_config(base, (3, 5))
    params, lora = init_params(config, jax.random.key(5)), LoraConfig(r=2, target_modules=("q_proj",))
    save_model(tmp_path / "ours", params, config, base)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "adapter", adapters, lora, config, base="somewhere/else")
    convert(
        "flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "adapter", "--base-model", tmp_path / "ours",
        "--output", tmp_path / "merged",
    )  # fmt: skip
    merged = load_params(tmp_path / "merged", config)
    close(ours(merged, config), ours(params, config, adapters=adapters, lora=lora))


# --- what belongs together
def test_base_without_settings_takes_the_adapters(base, tmp_path):
    config, lora = load_config(base, (3, 5)), LoraConfig(r=2)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, base=str(base))
    assert load_config(base, adapter=tmp_path / "adapter") == config
    with pytest.raises(ValueError, match=r"pair_indices \[1\] was asked for, but .* \[3, 5\]"):
        load_config(base, (1,), adapter=tmp_path / "adapter")


def test_base_that_contradicts_is_refused_with_both_values(base, tmp_path):
    config, lora = load_config(base, (3, 5)), LoraConfig(r=2)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, base=str(base))
    other = load_config(base, (2, 4))
    save_model(tmp_path / "ours", load_params(base, other), other, base)
    stored = load_config(tmp_path / "ours", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pair_indices is \[3, 5\] in the adapter and \[2, 4\] in the base"):
        load_adapter(tmp_path / "adapter", stored)
    qwen2 = make_source(tmp_path / "qwen2", **FAMILY_FIELDS["qwen2"] | {"rope_theta": 1000000})
    with pytest.raises(ValueError, match="family is 'qwen3' in the adapter and 'qwen2' in the base"):
        load_adapter(tmp_path / "adapter", load_config(qwen2, (3, 5)))
    theta = make_source(tmp_path / "theta", rope_theta=5000000)
    with pytest.raises(ValueError, match=r"rope_theta is 1000000.0 in the adapter and 5000000.0 in the base"):
        load_adapter(tmp_path / "adapter", load_config(theta, (3, 5)))


def test_what_only_peft_can_do_is_refused_by_name(base, tmp_path):
    config, lora = load_config(base, ()), LoraConfig(r=2)
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, base=str(base))
    path = tmp_path / "a" / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"use_dora": True, "rank_pattern": {"q_proj": 8}}))
    with pytest.raises(ValueError, match=r"use_dora is True.*rank_pattern is \{'q_proj': 8\}"):
        load_adapter(tmp_path / "a", config)
    path.write_text(json.dumps(plain | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        load_adapter(tmp_path / "a", config)
    path.write_text(json.dumps({key: value for key, value in plain.items() if key not in ("r", "lora_alpha")}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: r is missing; lora_alpha is missing"):
        load_adapter(tmp_path / "a", config)


def test_incomplete_adapters_are_refused_with_every_tensor_named(base, tmp_path):
    config, lora = load_config(base, ()), LoraConfig(r=2, target_modules=("q_proj",))
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, base=str(base))
    path = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(path)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    del stored[prefix.format(1, "B")]
    stored[prefix.format(0, "A")] = np.zeros((3, 32), np.float32)
    stored["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 32), np.float32)
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight is missing") as caught:
        load_adapter(tmp_path / "a", config)
    assert "lm_head.lora_A.weight is unknown" in str(caught.value)
    assert "has shape [3, 32], r and the base say [2, 32]" in str(caught.value)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_adapter(base, config)


def test_stored_settings_are_readable_by_people(base, tmp_path):
    config, lora = load_config(base, (3, 5)), LoraConfig(r=2)
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, base="Qwen/Qwen3-0.6B")
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert stored[SECTION] == {"pair_indices": [3, 5], "branch_stride": 1.0, "sibling_bias": False, "rope_theta": 1e6}
