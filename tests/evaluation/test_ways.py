"""The ways of answering against each other, and rows with models of their own."""

import dataclasses
import json
import shutil

import jax
import pytest
import tiny

from pd_jax.config import LoraConfig
from pd_jax.data.squad import Context, Question
from pd_jax.errors import InputError
from pd_jax.evaluation import EvaluateFlags, evaluate
from pd_jax.evaluation.ways import WAYS, default_models, parse_rows
from pd_jax.files import load_config, save_adapter, save_model
from pd_jax.lora import init_adapters
from pd_jax.params import init_params


def test_any_row_runs_with_a_control_beside(finished, models, tmp_path, capsys, script):
    flags, results = finished
    config, control = load_config(models / "hf"), models / "control"
    save_model(control, init_params(config, jax.random.key(2)), config, models / "hf")
    rows = ("isolated", f"isolated={control}", f"sequential={control}", f"columns={models / 'flax'}")
    made = evaluate(dataclasses.replace(flags, rows=rows, repeats=0, output_dir=str(tmp_path), dump_file=None))
    assert list(made["rows"]) == [rows[2], *rows[:2], rows[3]]  # in the table's order
    answers = [[record["answers"] for record in made["rows"][row]] for row in rows]
    assert answers[0] == [record["answers"] for record in results["rows"]["isolated"]]
    assert answers[1] == answers[2] != answers[0]
    assert answers[3] == [record["answers"] for record in results["rows"]["columns"]]
    assert made["settings"][rows[1]]["weights"] != made["settings"]["isolated"]["weights"]
    assert len(list(tmp_path.glob("predictions-*.jsonl"))) == 4
    assert script("--from", tmp_path / "results.json", "--against", rows[1]) == 0
    assert f"EM against {rows[1]}" in (tmp_path / "report.html").read_text()
    assert script("--from", tmp_path / "results.json", "--against", "prompts") == 2
    assert "--against prompts is not a row of" in capsys.readouterr().err


def test_a_control_is_a_row_of_transformers_too(models, data, tmp_path):
    pytest.importorskip("torch")
    asked = EvaluateFlags(dataset_name=str(data), max_new_tokens=6, repeats=0, output_dir=str(tmp_path))
    rows = (f"hf-sequential={models / 'hf'}", f"isolated={models / 'flax'}")
    made = evaluate(dataclasses.replace(asked, rows=rows))["rows"]
    assert [r["answers"] for r in made[rows[0]]] == [r["answers"] for r in made[rows[1]]]


def test_transformers_rows_answer_as_ours_do(models, data, tmp_path, capsys, script):
    """Without branch pairs, `isolated` and both plain baselines are the same computation."""
    pytest.importorskip("torch")
    arguments = ["--base-model", models / "hf", "--ft-model", models / "flax", "--dataset-name", data]
    arguments += ["--max-new-tokens", 6, "--output-dir", tmp_path, "--repeats", 0, "--batch-size", 3]
    arguments += ["--rows", "hf-sequential", "hf-batched", "hf-one-prompt", "isolated"]
    assert script(*arguments) == 0
    assert "hf-one-prompt" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    sequential, batched, isolated = (rows[name] for name in ("hf-sequential", "hf-batched", "isolated"))
    for name in ("answers", "tokens", "ended"):
        assert [r[name] for r in sequential] == [r[name] for r in batched] == [r[name] for r in isolated]
    assert any(any(r["ended"]) for r in sequential)
    assert [r["columns"] for r in batched] == [r["columns"] for r in isolated]
    assert [r["prefill_tokens"] for r in batched] == [r["prefill_tokens"] for r in sequential]
    assert sum(r["prefill_tokens"] for r in rows["hf-one-prompt"]) < sum(r["prefill_tokens"] for r in sequential)


def test_hf_rows_of_a_columnar_checkpoint_say_what_they_leave_out(models, data, tmp_path, capsys, script):
    pytest.importorskip("torch")
    columnar = shutil.copytree(models / "hf", tmp_path / "columnar")
    config = json.loads((columnar / "config.json").read_text())
    (columnar / "config.json").write_text(json.dumps(config | {"pd_jax": {"pair_indices": [2, 4, 6]}}))
    arguments = ["--base-model", columnar, "--dataset-name", data, "--output-dir", tmp_path / "out"]
    assert script(*arguments, "--rows", "hf-batched", "--repeats", 0, "--max-new-tokens", 1) == 0
    assert "was trained with RoPE pairs [2, 4, 6] on the branch axis" in capsys.readouterr().out


def test_one_prompt_with_its_cache_equals_feeding_everything_again(models, eos_ids):
    torch = pytest.importorskip("torch")
    from pd_jax.evaluation.baselines import Transformers

    tokenizer = tiny.tokenizer()
    model = Transformers(models / "hf", tokenizer, eos_ids, "float32", "cpu")
    context = Context(
        "", "The tower is red.", (Question("1", "Which?", ("a",)), Question("2", "What else is?", ("b",)))
    )
    decoded = model.one_prompt([context], 5)
    pieces = ["Context: The tower is red.\n", "Question 1: Which?\n", "Question 2: What else is?\n"]
    ids = [i for piece in pieces for i in tokenizer(piece)["input_ids"]]
    for cue, answer, ended in zip(["Answer 1:", "\nAnswer 2:"], decoded.ids[0], decoded.ended[0], strict=True):
        ids += tokenizer(cue)["input_ids"]
        for wanted in [*answer, None] if ended else answer:
            with torch.inference_mode():
                logits = model._model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
            chosen = int(logits.argmax())
            if wanted is None:
                assert chosen in eos_ids
            else:
                assert chosen == wanted
                ids.append(chosen)


def test_without_torch_the_hf_rows_are_skipped(models, data, tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    common = ["--base-model", models / "hf", "--dataset-name", data, "--output-dir", tmp_path]
    assert script(*common) == 2
    assert "nothing to run" in capsys.readouterr().err
    arguments = [*common, "--ft-model", models / "flax", "--rows", "hf-batched", "isolated", "--max-new-tokens", 6]
    assert script(*arguments, "--repeats", 0, "--batch-size", 3) == 0
    assert "the hf rows are skipped: torch is not installed (pip install 'pd_jax[hf]')" in capsys.readouterr().out


def test_a_flax_checkpoint_as_base_model_names_the_converter(models, data, tmp_path, capsys, script):
    pytest.importorskip("torch")
    arguments = ["--base-model", models / "flax", "--dataset-name", data, "--output-dir", tmp_path / "out"]
    assert script(*arguments) == 2
    assert "convert/flax_to_hf.py --checkpoint" in capsys.readouterr().err


def test_rows_are_parsed_once():
    models = default_models("base", "ours", None)
    assert {row.name: row.model for row in parse_rows((), models)} == models
    assert [row.name for row in parse_rows((), default_models(None, "ours", None))] == [
        name for name, way in WAYS.items() if not way.hf
    ]
    asked = parse_rows(("columns=b=c/d", "hf-batched", "columns", "columns"), models)
    assert [(row.name, row.way.name, row.model) for row in asked] == [
        ("hf-batched", "hf-batched", "base"),
        ("columns=b=c/d", "columns", "b=c/d"),
        ("columns", "columns", "ours"),
    ]
    with pytest.raises(InputError, match="--rows column isolated=: no such row"):
        parse_rows(("column", "isolated=", "columns"), models)


def test_a_sequential_model_is_that_of_the_row_sequential_alone():
    (flag,) = parse_rows(("sequential",), default_models(None, "ours", "control"))
    (row,) = parse_rows(("sequential=control",), default_models(None, "ours", None))
    assert dataclasses.replace(row, name="sequential") == flag
    assert parse_rows(("isolated",), default_models(None, "ours", "control"))[0].model == "ours"


def test_an_adapter_needs_no_base_model_if_it_names_one(finished, models, tmp_path):
    """This adapter changes nothing: the answers are those of the base."""
    flags, results = finished
    config, lora = load_config(models / "flax"), LoraConfig()
    adapters = init_adapters(config, lora, jax.random.key(0))
    save_adapter(tmp_path / "adapter", adapters, lora, config, base=str(models / "flax"))
    asked = dataclasses.replace(flags, ft_model=str(tmp_path / "adapter"), rows=("isolated",), repeats=0)
    made = evaluate(dataclasses.replace(asked, output_dir=str(tmp_path / "out"), dump_file=None))
    assert [r["answers"] for r in made["rows"]["isolated"]] == [r["answers"] for r in results["rows"]["isolated"]]
    assert len(made["settings"]["isolated"]["weights"]) == 2
