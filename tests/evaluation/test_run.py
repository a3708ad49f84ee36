"""Whole evaluations of small random models: what is recorded, gone on with, and refused."""

import dataclasses
import shutil
from pathlib import Path

import jax
import pytest

from pd_jax.evaluation import evaluate
from pd_jax.evaluation.rows import measure


def test_measure_throws_away_runs_in_which_something_compiled():
    calls = []

    def run():
        calls.append(None)
        if len(calls) == 1:
            jax.jit(lambda x: x + 1)(1.0)
        return len(calls)

    assert measure(run, 0) == (1, None)
    calls.clear()
    result, seconds = measure(run, 2)
    assert result == len(calls) == 3
    assert seconds is not None


def test_our_rows(finished):
    flags, results = finished
    assert list(results["rows"]) == list(flags.rows)
    assert (results["summary"]["contexts"], results["summary"]["questions"]) == (3, 6)
    answers = {name: [record["answers"] for record in records] for name, records in results["rows"].items()}
    assert answers["isolated"] == answers["sequential"]  # no branch pairs: ordinary decoding of each branch alone
    assert answers["columns"] != answers["isolated"]
    for records in results["rows"].values():
        for made in records:
            assert made["tokens"] <= 6 * len(made["answers"])
            assert made["seconds"] > 0
            assert made["first_token_seconds"] > 0
    serial, isolated = (results["rows"][name] for name in ("sequential", "isolated"))
    assert any(any(made["ended"]) for made in isolated)
    for alone, together in zip(serial, isolated, strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["forwards"] == together["columns"] < alone["forwards"] == alone["columns"]
        assert together["prefill_tokens"] < alone["prefill_tokens"]
        assert alone["slots"] == alone["forwards"] == alone["tokens"] + sum(alone["ended"])
        assert together["slots"] == 2 * together["forwards"]


def test_an_interrupted_run_goes_on_where_it_stopped(finished, tmp_path):
    flags, results = finished
    shorter = dataclasses.replace(flags, rows=("isolated", "columns"), output_dir=str(tmp_path))
    whole = (Path(flags.output_dir) / "predictions-columns.jsonl").read_text().splitlines(keepends=True)
    half = tmp_path / "predictions-columns.jsonl"
    half.write_text("".join(whole[:2]) + whole[2][:40])  # one context, and one cut off in the middle
    complete = tmp_path / "predictions-isolated.jsonl"
    complete.write_text((Path(flags.output_dir) / "predictions-isolated.jsonl").read_text())
    resumed = evaluate(shorter)
    assert resumed["rows"]["isolated"] == results["rows"]["isolated"]  # measurements too: nothing was run again
    assert resumed["rows"]["columns"][0] == results["rows"]["columns"][0]
    assert [r["answers"] for r in resumed["rows"]["columns"]] == [r["answers"] for r in results["rows"]["columns"]]
    assert len(half.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"predictions-isolated.jsonl was made with max_new_tokens 6 \(now 7\); use"):
        evaluate(dataclasses.replace(shorter, max_new_tokens=7))


def test_a_batch_gives_the_answers_of_its_contexts_alone(finished, tmp_path):
    flags, results = finished
    together = evaluate(
        dataclasses.replace(flags, rows=("isolated",), batch_size=3, repeats=0, output_dir=str(tmp_path))
    )
    batched, alone = together["rows"]["isolated"], results["rows"]["isolated"]
    assert [made["answers"] for made in batched] == [made["answers"] for made in alone]
    assert sum(made["forwards"] for made in batched) == pytest.approx(max(made["columns"] for made in alone))
    assert together["summary"]["rows"]["isolated"]["cost"]["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run: give --base-model"),
        (["--ft-model", "{flax}", "--rows", "column"], "--rows column: no such row; choose from hf-sequential"),
        (["--ft-model", "{flax}", "--rows", "hf-batched"], "row hf-batched needs --base-model"),
        (["--ft-model", "{flax}", "--against", "hf-batched"], "--against hf-batched is not one of the rows that run"),
        (["--ft-model", "{flax}", "--ft-base-model", "{hf}"], "is no adapter"),
        (["--ft-model", "{adapter}"], "does not name the model that it adapts; pass it as --ft-base-model"),
        (["--ft-model", "{nowhere}"], "nowhere is not a directory"),
        (
            ["--ft-model", "{flax}", "--pair-indices", "2"],
            "pair_indices [2] was asked for, but the weights were trained",
        ),
        (["--ft-model", "{empty}"], "has no weights, neither params/ nor model*.safetensors"),
        (["--ft-model", "{flax}", "--dataset-name", "nothing.json"], "nothing.json does not exist"),
        (["--ft-model", "{flax}", "--min-questions", "9", "--max-branches", "9"], "no context has 9 questions"),
        (["--ft-model", "{flax}", "--max-new-tokens", "0"], "--max-new-tokens 0 is below 1"),
    ],
)
def test_bad_input(models, data, tmp_path, capsys, arguments, message, script):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(models / "flax", tmp_path / "empty", ignore=shutil.ignore_patterns("params"))
    places = {"flax": models / "flax", "hf": models / "hf"} | {k: tmp_path / k for k in ("adapter", "nowhere", "empty")}
    given = ["--dataset-name", str(data), *(a.format(**places) for a in arguments)]
    assert script(*given, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
