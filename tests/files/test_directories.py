"""Model directories: what is saved comes back, what is incomplete never looks complete, and the two converters."""

import dataclasses
import filecmp
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sources import FAMILY_FIELDS, HF_CONFIG, ROOT, convert, make_source, tensors

from pd_jax.config import SECTION
from pd_jax.errors import InputError
from pd_jax.files import (
    find_model,
    load_config,
    load_eos_ids,
    load_params,
    load_tokenizer,
    read_adapter_config,
    save_model,
    saving,
)
from pd_jax.files.safetensors import read_params
from pd_jax.params import SIBLING_BIAS_START, init_params


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("model") / "hf")


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)))


# --- finding and reading
def test_find_model(source, tmp_path):
    assert find_model(str(source)) == source
    for name in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(ValueError, match="is not a directory"):
            find_model(name)
    with pytest.raises(ValueError, match=r"^nobody/nothing is no directory here and could not be had") as caught:
        find_model("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_tokenizer_is_loaded_or_missed_by_name(source, tmp_path):
    assert load_tokenizer(source).eos_token_id == 2
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer\.json\)"):
        load_tokenizer(tmp_path)


def test_eos_ids_from_the_best_place(source, tmp_path):
    tokenizer = load_tokenizer(source)
    assert load_eos_ids(source, tokenizer) == (5, 2)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_eos_ids(tmp_path, tokenizer) == (7,)
    (tmp_path / "config.json").write_text("{}")
    assert load_eos_ids(tmp_path, tokenizer) == (2,)


def test_settings_stored_with_the_weights_win(source, tmp_path):
    config = load_config(source, pair_indices=(3, 5))
    save_model(tmp_path / "ours", init_params(config, jax.random.key(0)), config, source)
    assert load_config(tmp_path / "ours") == config
    with pytest.raises(ValueError, match=r"pair_indices \[1\] was asked for, but .* trained with \[3, 5\]"):
        load_config(tmp_path / "ours", pair_indices=(1,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b"\xef\xbb\xbf{}", "is not valid JSON: Unexpected UTF-8 BOM"),
        (b'{"caf\xe9": 1}', "is not valid JSON: 'utf-8' codec"),
        (b'{"model_type": "qwen3"', "is not valid JSON: Expecting"),
        (b"[1]", "holds list, not a JSON object"),
    ],
    ids=["empty", "byte order mark", "latin-1", "cut off", "a list"],
)
def test_damaged_json_is_one_line_that_names_the_file(source, tmp_path, content, reason):
    readers = {
        "config.json": load_config,
        "adapter_config.json": read_adapter_config,
        "generation_config.json": lambda directory: load_eos_ids(directory, None),
        "model.safetensors.index.json": lambda directory: read_params(directory, load_config(source, ())),
    }
    for name, read in readers.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / name))} {reason}") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


# --- saving
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saved_model_comes_back(source, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)  # a relative path must do
    config = load_config(source, ())
    params = init_params(config, jax.random.key(1), dtype)
    save_model(Path("ours"), params, config, source)
    assert equal(load_params(Path("ours"), config, None), params)
    assert load_params(Path("ours"), config)["norm"].dtype == jnp.float32
    stored = json.loads(Path("ours/config.json").read_text())
    assert stored == HF_CONFIG | {"torch_dtype": jnp.dtype(dtype).name, SECTION: config.section()}
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_saved_model_comes_back_sharded(source, tmp_path):
    config = load_config(source, ())
    params = init_params(config, jax.random.key(1))
    save_model(tmp_path / "ours", params, config, source)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp")), params)
    got = load_params(tmp_path / "ours", config, shardings=shardings)
    assert equal(got, params)
    assert got["layers"]["q"].sharding == shardings["layers"]["q"]


def test_saving_over_a_model_replaces_it_and_keeps_the_rest(source, tmp_path):
    config, target = load_config(source, ()), tmp_path / "ours"
    save_model(target, init_params(config, jax.random.key(1)), config, source)
    (target / "metrics.jsonl").write_text("kept")
    params = init_params(config, jax.random.key(2))
    save_model(target, params, config, source)
    assert equal(load_params(target, config), params)
    assert (target / "metrics.jsonl").read_text() == "kept"


def test_interrupted_save_leaves_nothing_or_the_old_model(source, tmp_path, monkeypatch):
    config, target = load_config(source, ()), tmp_path / "ours"
    params = init_params(config, jax.random.key(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_metadata", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_model(target, params, config, source)
        assert not list(tmp_path.iterdir())
    save_model(target, params, config, source)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_metadata", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_model(target, init_params(config, jax.random.key(2)), config, source)
    assert equal(load_params(target, config), params)


def test_interrupted_replacement_does_not_look_complete(source, tmp_path, monkeypatch):
    config, target = load_config(source, ()), tmp_path / "ours"
    params = init_params(config, jax.random.key(1))
    save_model(target, params, config, source)
    replace = saving.os.replace

    def interrupt(old, new):
        if Path(new).name == "config.json":
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(saving.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(target, params, config, source)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_config(target)


def test_sibling_bias_starts_where_the_weights_have_none(source, tmp_path):
    config = dataclasses.replace(load_config(source, ()), sibling_bias=True)
    params = load_params(source, config)
    assert set(np.unique(params["layers"]["sibling_bias"])) == {SIBLING_BIAS_START}
    params["layers"]["sibling_bias"] += 3
    save_model(tmp_path / "ours", params, config, source)
    assert load_config(tmp_path / "ours") == config
    assert equal(load_params(tmp_path / "ours", config), params)


# --- faults
def test_directories_without_or_with_too_many_weights(source, tmp_path):
    config = load_config(source, ())
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(ValueError, match="has no weights"):
        load_params(tmp_path, config)
    save_model(tmp_path, init_params(config, jax.random.key(1)), config, source)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has weights twice"):
        load_params(tmp_path, config)


def test_checkpoint_of_another_shape_is_refused_with_every_tensor_named(source, tmp_path):
    config = load_config(source, ())
    save_model(tmp_path / "ours", init_params(config, jax.random.key(1)), config, source)
    other = dataclasses.replace(config, intermediate_size=64, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"\['lm_head'\] is missing") as caught:
        load_params(tmp_path / "ours", other)
    for name, was, wanted in (("gate", [2, 32, 48], [2, 32, 64]), ("down", [2, 48, 32], [2, 64, 32])):
        assert f"['layers']['{name}'] has shape {was}, the config says {wanted}" in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "half"])
def test_damaged_checkpoint_is_one_line(source, tmp_path, share):
    config = load_config(source, ())
    save_model(tmp_path / "ours", init_params(config, jax.random.key(1)), config, source)
    data = [path for path in (tmp_path / "ours" / "params").rglob("*") if path.is_file() and path.parent.name == "d"]
    largest = max(data, key=lambda path: path.stat().st_size)
    for path in [largest] if share else data:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="is not a readable checkpoint") as caught:
        load_params(tmp_path / "ours", config)
    assert "\n" not in str(caught.value)


# --- the converters
ROUND_TRIPS = [  # all of Qwen3's at once, one of each other family
    pytest.param(
        family,
        tied,
        dtype,
        id=f"{family}-{'tied' if tied else 'untied'}-{jnp.dtype(dtype).name}",
        marks=() if family == "qwen3" or (tied, dtype) == (False, jnp.bfloat16) else pytest.mark.slow,
    )
    for family, tied, dtype in itertools.product(FAMILY_FIELDS, (True, False), (jnp.float32, jnp.bfloat16))
]


@pytest.mark.parametrize(("family", "tied", "dtype"), ROUND_TRIPS)
def test_round_trip_of_the_converters_is_bitwise(tmp_path, monkeypatch, family, tied, dtype):
    name = jnp.dtype(dtype).name
    changes = {"tie_word_embeddings": tied, "torch_dtype": name, "unknown_field": {"kept": [1.5]}}
    hf = make_source(tmp_path / "hf", dtype, **FAMILY_FIELDS[family] | changes)
    convert("hf_to_flax", monkeypatch, "--model", hf, "--output", tmp_path / "ours")
    convert(
        "flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "ours", "--output", tmp_path / "back",
        "--max-shard-size", "20KB",
    )  # fmt: skip
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    before, after = tensors(hf), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != tied
    assert all(before[k].dtype == after[k].dtype and before[k].tobytes() == after[k].tobytes() for k in before)
    assert list(json.loads((tmp_path / "back/config.json").read_text()).items()) == list(
        json.loads((hf / "config.json").read_text()).items()
    )
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(hf / file, tmp_path / "back" / file, shallow=False), file
    card = (tmp_path / "back/README.md").read_text()
    assert f"plain {family.capitalize()} weights" in card
    assert f"- {family}\n" in card


def test_converted_dtype_is_what_the_config_says(source, tmp_path, monkeypatch):
    convert("hf_to_flax", monkeypatch, "--model", source, "--output", tmp_path / "o", "--dtype", "bfloat16")
    assert load_params(tmp_path / "o", load_config(tmp_path / "o", ()), None)["embed"].dtype == jnp.bfloat16
    assert json.loads((tmp_path / "o/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_columnar_export_says_what_it_is(source, tmp_path, monkeypatch):
    config = dataclasses.replace(load_config(source, (3, 5)), sibling_bias=True, branch_stride=2.0)
    params = init_params(config, jax.random.key(3))
    save_model(tmp_path / "ours", params, config, source)
    convert("flax_to_hf", monkeypatch, "--checkpoint", tmp_path / "ours", "--output", tmp_path / "back")
    assert load_config(tmp_path / "back") == config
    assert equal(load_params(tmp_path / "back", config), params)
    card = (tmp_path / "back/README.md").read_text()
    assert "Plain transformers does not reproduce this model" in card
    assert "| `pair_indices` | `[3, 5]` |" in card
    assert "self_attn.sibling_bias" in card


def test_conversion_never_writes_over_anything(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for name, flag in (("hf_to_flax", "--model"), ("flax_to_hf", "--checkpoint")):
        with pytest.raises(ValueError, match="exists and is not empty"):
            convert(name, monkeypatch, flag, source, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("name", "flag"), [("hf_to_flax", "--model"), ("flax_to_hf", "--checkpoint")])
def test_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch, name, flag):
    from rich.progress import Progress

    seen = []

    def interrupt(self, task, advance, description):
        seen.append(description)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(name, monkeypatch, flag, source, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_commands_as_a_user_runs_them(source, tmp_path):
    command = [sys.executable, ROOT / "convert" / "hf_to_flax.py"]
    done = subprocess.run([*command, "--model", source, "--output", tmp_path / "ours"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = load_config(source, ())
    assert equal(load_params(tmp_path / "ours", config, None), load_params(source, config, None))
    again = subprocess.run([*command, "--model", source, "--output", tmp_path / "ours"], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
