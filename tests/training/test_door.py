"""The learned bias towards siblings: where it begins, how far it moves, and that a run shows whether anybody looks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from examples import SMALL, WORKED
from runs import inputs, metrics, pretrain_flags
from safetensors.numpy import load_file
from sources import convert

from pd_jax import ParallelDecoder
from pd_jax.config import SECTION
from pd_jax.files import load_adapter, load_config, load_params, write_params
from pd_jax.lora import merge
from pd_jax.params import SIBLING_BIAS_START, init_params
from pd_jax.training import Optimisation, make_optimizer, pretrain
from pd_jax.training.loop import door_line
from pd_jax.training.step import BIAS_TRAVEL

ALL = {"mesh": (1, 8, 1), "batch_size": 8}  # every device of the tests
DOOR = {"sibling_bias": True, "eval_dataset_name": inputs()["web"], "eval_steps": 6, **ALL}


def travel(steps: int, **changes) -> tuple[float, float]:
    """How far sibling_bias and a kernel's number go when every gradient points the same way."""
    optimizer, _ = make_optimizer(Optimisation(**{"learning_rate": 1e-4, "weight_decay": 0.0} | changes), steps)
    params = init_params(tiny.config(sibling_bias=True), jax.random.key(0))
    gradient, state, update = jax.tree.map(jnp.ones_like, params), optimizer.init(params), jax.jit(optimizer.update)
    moved = np.zeros(2)
    for _ in range(steps):
        step, state = update(gradient, state, params)
        moved += [float(step["layers"]["sibling_bias"][0, 0]), float(step["layers"]["q"][0, 0, 0, 0])]
    return moved[0], moved[1]


@pytest.mark.parametrize("steps", [20, 80])
def test_the_bias_can_move_by_several_units_whatever_the_run(steps):
    bias, kernel = travel(steps)
    assert abs(bias) == pytest.approx(BIAS_TRAVEL, rel=0.1)
    assert abs(kernel) < 1e-4 * steps
    assert abs(travel(steps, sibling_bias_lr=1e-4)[0]) == pytest.approx(abs(kernel), rel=1e-3)
    assert travel(steps, learning_rate=0.0) == (0, 0)


@pytest.mark.slow
def test_a_run_shows_the_door_and_moves_it(tmp_path, capsys):
    output = tmp_path / "out"
    pretrain(pretrain_flags(output, **DOOR))
    records = metrics(output)
    assert all(r["sibling_bias_min"] <= r["sibling_bias_max"] for r in records)
    assert [r["step"] for r in records if 0 < r.get("sibling_attention", 0) < 1] == [6, 12]
    bias = np.asarray(load_params(output, load_config(output))["layers"]["sibling_bias"])
    assert np.abs(bias).max() > 0.05  # it began at 0, from random weights
    assert (bias.min(), bias.max()) == pytest.approx((records[-1]["sibling_bias_min"], records[-1]["sibling_bias_max"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "on siblings" in said
    assert "sibling bias" in said
    assert "never seen" not in said


@pytest.mark.parametrize(("bias", "shut"), [(-8.0, True), (-4.5, True), (-2.0, False), (0.0, False)])
def test_a_bias_that_hides_every_sibling_is_said(bias, shut):
    config = tiny.config(sibling_bias=True, visibility="columns")
    params = {"layers": {"sibling_bias": jnp.full((2, 4), bias)}}
    assert ("never seen" in door_line(config, params)) == shut
    assert door_line(dataclasses.replace(config, visibility="isolated"), params) == ""


@pytest.mark.slow
def test_a_door_that_stays_shut_is_said_in_the_last_line(tmp_path, capsys):
    pretrain(pretrain_flags(tmp_path / "out", **DOOR, sibling_bias_start=-8.0, sibling_bias_lr=0.0, max_steps=2))
    assert "its siblings are never seen: sibling_bias ends at -8.00 .. -8.00." in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_start_without_a_new_bias_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--sibling-bias-start -2\.0 is for a new bias, but there is no"):
        pretrain(pretrain_flags(tmp_path / "out", sibling_bias_start=-2.0, **ALL))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_weights_that_never_saw_columns_begin_with_the_door_ajar(tmp_path):
    """The base is an ordinary language model: no column settings, and so no bias of its own."""
    base = tmp_path / "base"
    pretrain(pretrain_flags(base, max_steps=1, **ALL))
    config = json.loads((base / "config.json").read_text())
    del config[SECTION]
    (base / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    flags = {"random_init": False, "model_name": str(base), "pair_indices": (2, 4, 6), "sibling_bias_lr": 0.0}
    pretrain(pretrain_flags(output, max_steps=1, sibling_bias=True, **flags, **ALL))
    bias = np.asarray(load_params(output, load_config(output))["layers"]["sibling_bias"])
    np.testing.assert_array_equal(bias, -2)


@pytest.mark.slow
def test_a_mix_trains_and_is_decoded_in_columns_unless_asked_otherwise(tmp_path, caplog):
    output = tmp_path / "out"
    pretrain(pretrain_flags(output, visibility="mix", max_steps=2, **ALL))
    assert json.loads((output / "config.json").read_text())[SECTION]["visibility"] == "mix"
    caplog.clear()
    assert ParallelDecoder.from_pretrained(output).visibility == "columns"
    assert ParallelDecoder.from_pretrained(output, visibility="isolated").visibility == "isolated"
    assert not caplog.messages  # a mix holds every visibility
    with pytest.raises(ValueError, match=r"--mix-shares 1\.0 2\.0: give three shares"):
        pretrain(pretrain_flags(tmp_path / "other", visibility="mix", mix_shares=(1.0, 2.0), **ALL))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Pretrained weights as the hub has them: they know nothing of columns."""
    directory = tiny.model_directory(tmp_path_factory.mktemp("stock") / "hf", pair_indices=())
    config = load_config(directory)
    write_params(directory, init_params(config, jax.random.key(0)), config)
    stored = json.loads((directory / "config.json").read_text())
    del stored[SECTION]
    (directory / "config.json").write_text(json.dumps(stored))
    return directory


def lora_flags(stock, output, **changes):
    return pretrain_flags(
        output,
        **{"model_name": str(stock), "random_init": False, "use_lora": True, "pair_indices": (), **ALL} | changes,
    )


def test_stock_weights_get_a_door_that_lora_trains_too(stock, tmp_path, capsys, monkeypatch):
    output = tmp_path / "adapter"
    pretrain(lora_flags(stock, output))
    assert "has never seen columns: it gets a sibling_bias that begins at -2" in " ".join(
        capsys.readouterr().out.split()
    )
    config = load_config(stock, adapter=output)
    assert config.sibling_bias
    adapters, lora = load_adapter(output, config, stock)
    bias = np.asarray(adapters["sibling_bias"])
    assert 0.05 < np.abs(bias + 2).max() < 4
    assert (bias.min(), bias.max()) == pytest.approx(
        tuple(metrics(output)[-1][f"sibling_bias_{end}"] for end in ("min", "max"))
    )
    # Decoded, exported and continued with that bias; PEFT's own file knows nothing of it.
    decoder = ParallelDecoder.from_pretrained(stock, output)
    assert np.array_equal([layer["sibling_bias"] for layer in decoder.weights["layers"]], bias)
    assert not any("sibling" in name for name in load_file(output / "adapter_model.safetensors"))
    convert("flax_to_hf", monkeypatch, "--checkpoint", output, "--output", tmp_path / "merged")
    merged = ParallelDecoder.from_pretrained(tmp_path / "merged")
    layout = decoder.layout([WORKED, SMALL])
    np.testing.assert_allclose(merged.logits(layout), decoder.logits(layout), atol=1e-4)
    plain = merge({**load_params(stock, config)}, {k: v for k, v in adapters.items() if k != "sibling_bias"}, lora)
    assert set(np.unique(plain["layers"]["sibling_bias"])) == {SIBLING_BIAS_START}
    other = ParallelDecoder(config, plain, tiny.tokenizer(), ())
    assert np.abs(other.logits(layout) - decoder.logits(layout)).max() > 1e-3  # it is used


@pytest.mark.slow
def test_a_recipe_given_by_hand_is_kept(stock, tmp_path, capsys):
    first = tmp_path / "first"
    pretrain(lora_flags(stock, first, sibling_bias_start=-1.0, sibling_bias_lr=0.0, max_steps=1))
    further = lora_flags(
        stock, tmp_path / "further", use_lora=False, adapter=str(first), sibling_bias_lr=0.0, max_steps=1
    )
    pretrain(further)
    assert metrics(tmp_path / "further")[0]["sibling_bias_max"] == -1.0  # where the first run left it
    capsys.readouterr()
    pretrain(lora_flags(stock, tmp_path / "without", sibling_bias=False, max_steps=1))
    assert "never seen columns" not in capsys.readouterr().out
    assert not (tmp_path / "without" / "sibling_bias.safetensors").exists()
    pretrain(lora_flags(stock, tmp_path / "alone", visibility="isolated", max_steps=1))
    assert not load_config(stock, adapter=tmp_path / "alone").sibling_bias
