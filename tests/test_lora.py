"""LoRA: the adapter tree, merging, and PEFT's files both ways. Logits are compared: a wrong key only warns in PEFT."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sources import convert, make_source, tensors

from pd_jax.columns import Coordinates
from pd_jax.config import LORA_TARGETS, SECTION, LoraConfig
from pd_jax.files import load_adapter, load_config, load_params, save_adapter, save_model
from pd_jax.layout import Branch, TokenSample, build_layout
from pd_jax.lora import adapter_shapes, init_adapters, merge
from pd_jax.model import forward, logits
from pd_jax.params import init_params

LAYOUT = build_layout([[TokenSample(list(range(3, 9)), [Branch(list(range(10, 20)))])]])
CHOICES = [(LORA_TARGETS, False), (("q_proj", "v_proj"), True), (("o_proj", "down_proj"), False)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("lora") / "hf")


def random_adapters(config, lora):
    """Adapters as after training: neither part is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.2 * rng.standard_normal(shape, np.float32)),
        adapter_shapes(config, lora),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@partial(jax.jit, static_argnames=("config", "lora"))
def ours(params, config, adapters=None, lora=None):
    coordinates, tokens = Coordinates.of(LAYOUT), jnp.asarray(LAYOUT.tokens)
    return logits(params, forward(params, config, tokens, coordinates, adapters=adapters, lora=lora))


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


# --- the tree
@pytest.mark.parametrize(("targets", "rslora"), CHOICES, ids=str)
def test_merged_model_equals_model_with_adapters(base, targets, rslora):
    config = load_config(base, (3, 5))
    params = load_params(base, config)
    lora = LoraConfig(r=4, alpha=6, target_modules=targets, rslora=rslora)
    adapters = random_adapters(config, lora)
    beside = ours(params, config, adapters=adapters, lora=lora)
    close(beside, ours(merge(params, adapters, lora), config))
    assert np.abs(beside - ours(params, config)).max() > 1e-2


def test_fresh_adapters_change_nothing_and_only_they_get_gradients(base):
    config = load_config(base, (3, 5))
    params, lora = load_params(base, config), LoraConfig(r=4)
    adapters = init_adapters(config, lora, jax.random.key(0))
    np.testing.assert_array_equal(ours(params, config, adapters=adapters, lora=lora), ours(params, config))

    def loss(tree):
        hidden = forward(params, config, jnp.asarray(LAYOUT.tokens), Coordinates.of(LAYOUT), adapters=tree, lora=lora)
        return (hidden**2 * jnp.arange(hidden.shape[-1])).sum()

    gradients = jax.grad(loss)(adapters)
    assert all(np.abs(parts["b"]).max() > 0 for parts in gradients.values())
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_scales():
    assert LoraConfig(r=16, alpha=32).scale == 2
    assert LoraConfig(r=16, alpha=32, rslora=True).scale == 8


def test_dropout_needs_a_key_and_follows_it(base):
    config = load_config(base, ())
    params, lora = load_params(base, config), LoraConfig(r=4, dropout=0.5, target_modules=("down_proj",))
    adapters = random_adapters(config, lora)
    still = ours(params, config, adapters=adapters, lora=lora)
    np.testing.assert_array_equal(still, ours(params, config, adapters=adapters, lora=lora))
    draw = jax.jit(
        lambda key: forward(
            params, config, jnp.asarray(LAYOUT.tokens), Coordinates.of(LAYOUT), adapters=adapters, lora=lora,
            dropout_key=key,
        )
    )  # fmt: skip
    one, same, other = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2


def test_dropout_of_one_projection_is_unbiased():
    from pd_jax.model import project

    lora = LoraConfig(r=2, alpha=2, dropout=0.25)
    layer = {"down": jnp.zeros((8, 6))}
    adapter = {"down": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 6))}}
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: project(jnp.ones((1, 8)), layer, "down", adapter=adapter, lora=lora, dropout_key=key))(
        keys
    )
    # Each draw is 2 * sum of 8 Bernoulli(0.75) / 0.75: mean 16, deviation 3.27, of the mean of 4000 draws 0.052.
    assert abs(float(draws.mean()) - 16) < 5 * 0.052
    assert abs(float(draws.std()) - 3.27) < 0.2


def test_settings_out_of_range():
    for settings, message in (
        ({"r": 0}, "lora r is 0"),
        ({"dropout": 1.0}, "lora dropout is 1.0"),
        ({"target_modules": ("q_proj", "qkv")}, r"\['qkv'\] not among q_proj"),
        ({"target_modules": ()}, "none not among"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**settings)


# --- PEFT's files
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(("targets", "rslora"), CHOICES, ids=str)
def test_ours_in_peft(base, tmp_path, targets, rslora):
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    config = load_config(base, ())
    params, lora = load_params(base, config), LoraConfig(r=4, alpha=6, target_modules=targets, rslora=rslora)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "adapter", adapters, lora, config, str(base))
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
    ("targets", "rslora"), [*CHOICES, ("all-linear", True), (r".*self_attn\.[qk]_proj", False)], ids=str
)
def test_peft_in_ours(base, tmp_path, targets, rslora):
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


def test_merge_and_export_equals_peft(base, tmp_path, monkeypatch):
    """Our adapter, merged and exported by flax_to_hf, against PEFT's own merge of it; the settings come along."""
    peft, transformers = map(pytest.importorskip, ("peft", "transformers"))
    config = load_config(base, (3, 5))
    lora = LoraConfig(r=4, alpha=6)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, str(base))
    convert("flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert load_config(tmp_path / "merged") == config
    with pytest.warns(UserWarning, match="pd_jax"):
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        )
    want = model.merge_and_unload().state_dict()
    got = tensors(tmp_path / "merged")
    assert got.keys() == want.keys() - {"lm_head.weight"}
    for name, tensor in got.items():
        close(tensor, want[name].numpy(), 1e-6)


def test_adapter_over_a_pd_jax_checkpoint(base, tmp_path, monkeypatch):
    config = load_config(base, (3, 5))
    params, lora = init_params(config, jax.random.key(5)), LoraConfig(r=2, target_modules=("q_proj",))
    save_model(tmp_path / "ours", params, config, base)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "adapter", adapters, lora, config, "somewhere/else")
    convert(
        "flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "adapter", "--base-model", tmp_path / "ours",
        "--output", tmp_path / "merged",
    )  # fmt: skip
    merged = load_params(tmp_path / "merged", config)
    close(ours(merged, config), ours(params, config, adapters=adapters, lora=lora))


# --- what belongs together
def test_base_without_settings_takes_the_adapters(base, tmp_path):
    config, lora = load_config(base, (3, 5)), LoraConfig(r=2)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, str(base))
    assert load_config(base, adapter=tmp_path / "adapter") == config
    with pytest.raises(ValueError, match=r"pair_indices \[1\] was asked for, but .* \[3, 5\]"):
        load_config(base, (1,), adapter=tmp_path / "adapter")


def test_base_that_contradicts_is_refused_with_both_values(base, tmp_path):
    config, lora = load_config(base, (3, 5)), LoraConfig(r=2)
    save_adapter(tmp_path / "adapter", random_adapters(config, lora), lora, config, str(base))
    other = load_config(base, (2, 4))
    save_model(tmp_path / "ours", load_params(base, other), other, base)
    stored = load_config(tmp_path / "ours", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"pair_indices is \[3, 5\] in the adapter and \[2, 4\] in the base"):
        load_adapter(tmp_path / "adapter", stored)
    theta = make_source(tmp_path / "theta", rope_theta=5000000)
    with pytest.raises(ValueError, match=r"rope_theta is 1000000.0 in the adapter and 5000000.0 in the base"):
        load_adapter(tmp_path / "adapter", load_config(theta, (3, 5)))


def test_what_only_peft_can_do_is_refused_by_name(base, tmp_path):
    config, lora = load_config(base, ()), LoraConfig(r=2)
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, str(base))
    path = tmp_path / "a" / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"use_dora": True, "rank_pattern": {"q_proj": 8}}))
    with pytest.raises(ValueError, match=r"use_dora is True.*rank_pattern is \{'q_proj': 8\}"):
        load_adapter(tmp_path / "a", config)
    path.write_text(json.dumps(plain | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        load_adapter(tmp_path / "a", config)


def test_incomplete_adapters_are_refused_with_every_tensor_named(base, tmp_path):
    config, lora = load_config(base, ()), LoraConfig(r=2, target_modules=("q_proj",))
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, str(base))
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
    save_adapter(tmp_path / "a", random_adapters(config, lora), lora, config, "Qwen/Qwen3-0.6B")
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert stored[SECTION] == {"pair_indices": [3, 5], "branch_stride": 1.0, "sibling_bias": False, "rope_theta": 1e6}
