"""LoRA's tree: adapters beside the weights and merged into them, what is trained, dropout, and the settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import CHOICES, LAYOUT, close, ours, random_adapters
from sources import make_source

from pd_jax.columns import Coordinates
from pd_jax.config import LoraConfig
from pd_jax.files import load_config, load_params
from pd_jax.lora import init_adapters, merge
from pd_jax.model import forward


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("lora") / "hf")


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
