"""Every JSON file that is read: whatever stands in it, one line names the file, and the key where it is one."""

import dataclasses
import json
import shutil

import pytest
import tiny
from sources import make_source

from pd_jax.errors import InputError
from pd_jax.evaluation.rows import read_predictions
from pd_jax.evaluation.run import load_results
from pd_jax.files import (
    check_output,
    keep_metrics,
    load_adapter,
    load_config,
    load_eos_ids,
    load_params,
    load_tokenizer,
)

DEEP = b"[" * 100_000
DAMAGED = [b"", b"\xef\xbb\xbf{}", b"\xff\xfe", b'{"a": ', b"null", b"[]", b'"text"', b"7", DEEP, b"\0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("models") / "source")


def adapter(directory):
    return load_adapter(directory, tiny.config())


def weights(directory):
    return load_params(directory, load_config(directory, ()))


def check_run(directory):
    return check_output(directory, {})


READERS = {
    "config.json": load_config,
    "generation_config.json": lambda directory: load_eos_ids(directory, tiny.tokenizer()),
    "adapter_config.json": adapter,
    "model.safetensors.index.json": weights,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "run.json": check_run,
    "results.json": lambda directory: load_results(directory / "results.json"),
}


def one_line(read, directory, *names):
    with pytest.raises(InputError) as caught:
        read(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    for name in (str(directory), *names):
        assert name in message
    return message


@pytest.fixture
def copy(source, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(source, directory)
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    return directory


@pytest.mark.parametrize("content", DAMAGED, ids=lambda c: repr(c[:8]))
@pytest.mark.parametrize("name", READERS)
def test_damaged(copy, name, content):
    (copy / name).write_bytes(content)
    one_line(READERS[name], copy)


SAMPLES = [None, True, 0, -1, 1.5, float("inf"), "text", [], [None], {}, {"a": [1]}]
KEYS = {
    "config.json": ["model_type", "architectures", "layer_types", "vocab_size", "hidden_size", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "num_hidden_layers", "rms_norm_eps", "rope_theta",
                    "tie_word_embeddings", "max_position_embeddings", "rope_parameters", "rope_scaling", "pd_jax"],
    "adapter_config.json": ["r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", "pd_jax",
                            "target_modules", "peft_type"],
    "run.json": ["flags", "base", "finished"],
    "generation_config.json": ["eos_token_id"],
    "model.safetensors.index.json": ["weight_map"],
}  # fmt: skip
PARTS = {
    "config.json": ["pair_indices", "branch_stride", "sibling_bias", "visibility", "align", "unknown"],
    "adapter_config.json": ["pair_indices", "branch_stride", "sibling_bias", "base_fingerprint", "rope_theta"],
}
WHOLE = {
    "adapter_config.json": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "run.json": {"flags": {}, "base": {"name": "x", "fingerprint": "y"}, "finished": False},
    "model.safetensors.index.json": {"weight_map": {}},
}


@pytest.mark.parametrize("value", SAMPLES, ids=repr)
@pytest.mark.parametrize(
    ("name", "key", "inner"),
    [(name, key, False) for name, keys in KEYS.items() for key in keys]
    + [(name, key, True) for name, keys in PARTS.items() for key in keys],
)
def test_a_value_of_another_kind(copy, name, key, inner, value):
    """Either it is read, or one line names file and key; never another exception."""
    path = copy / name
    content = WHOLE.get(name) or json.loads(path.read_text())
    path.write_text(json.dumps({**content, **({"pd_jax": {key: value}} if inner else {key: value})}))
    said = str(copy)
    try:
        READERS[name](copy)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert str(copy) in said


@pytest.mark.parametrize("key", ["flags", "finished", "base"])
def test_run_json_without_a_key(tmp_path, key):
    run = {"flags": {}, "base": {"name": "x"}, "finished": False}
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k != key}))
    if key != "base":
        one_line(check_run, tmp_path, "run.json", f"{key} is missing")


def test_metrics(tmp_path):
    path, good = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n'
    for bad in ("[]\n", "null\n", '{"loss": 1}\n', '{"step": "1"}\n', "damaged\n"):
        path.write_text(good + bad + good)
        one_line(lambda directory: keep_metrics(directory / "metrics.jsonl", 9), tmp_path, "line 2 has no step")
        assert path.read_text() == good + bad + good  # nothing is lost
    path.write_text(good + '{"step": 2}\n{"step": 3, "lo')
    keep_metrics(path, 1)
    assert path.read_text() == good


@pytest.mark.parametrize("first", [b"[]", b"null", b'{"row": "x"}\n{"ids": []}\n', b"7"], ids=repr)
def test_predictions_of_something_else(tmp_path, first):
    path = tmp_path / "predictions-x.jsonl"
    path.write_bytes(first)
    one_line(lambda directory: read_predictions(directory / path.name, {"row": "x"}), tmp_path)


@pytest.mark.parametrize("part", ["rows", "contexts", "flags"])
@pytest.mark.parametrize("value", SAMPLES, ids=repr)
def test_results_with_a_part_of_another_kind(tmp_path, part, value):
    results = {"rows": {}, "contexts": [], "flags": {"against": None, "metric": "squad"}, "summary": {}}
    (tmp_path / "results.json").write_text(json.dumps(results | {part: value}))
    one_line(READERS["results.json"], tmp_path, "results.json")


def test_yaml_that_overflows(tmp_path):
    from pd_jax.cli import parse
    from pd_jax.training import PretrainFlags

    for text in ("max_steps: .inf", "max_steps: .nan", "max_steps: [1]", "mesh: [.inf]", "[" * 5000):
        (tmp_path / "x.yaml").write_text(text)
        one_line(lambda directory: parse(PretrainFlags, ["--config", str(directory / "x.yaml")]), tmp_path)
    (tmp_path / "x.yaml").write_text("max_steps: 7")
    assert dataclasses.asdict(parse(PretrainFlags, ["--config", str(tmp_path / "x.yaml")]))["max_steps"] == 7
