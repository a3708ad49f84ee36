"""The results page, from random weights to its tables, in a size that says nothing."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.slow
def test_one_command_writes_the_page_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import quickstart
    import results

    whole = quickstart.stages
    monkeypatch.setattr(quickstart, "stages", lambda out: [dataclasses.replace(f, max_steps=2) for f in whole(out)])
    monkeypatch.chdir(tmp_path)
    web, squad = tiny.documents(tmp_path / "web.jsonl"), tiny.squad(tmp_path / "squad.json")
    arguments = ["--web", web, "--train", squad, "--eval", squad, "--vocabulary", 300, "--hidden-size", 64]
    arguments += ["--layers", 1, "--pretrain-steps", 2, "--finetune-steps", 2, "--max-eval-samples", 12]
    monkeypatch.setattr(sys, "argv", ["results.py", *map(str, arguments), "--timed-samples", "2"])
    results.main()
    page = Path("results.md").read_text(encoding="utf-8")
    assert "not Qwen3's weights" in page
    for text in (
        "isolated=control",
        "hf-one-prompt",
        "| columnar | finetuned |",
        "F1 % by branch index",
        "cores, float32",
    ):
        assert text in page
    run = json.loads(Path("results/web/control/finetuned/run.json").read_text())["flags"]
    assert (run["pair_indices"], run["visibility"], run["align"]) == ([], "isolated", "ragged")
    runs = [json.loads(Path(f"results/web/{m}/pretrained/run.json").read_text())["flags"] for m in results.MODELS]
    different = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert different == {"output_dir", "pair_indices", "sibling_bias", "visibility", "align"}
    tokens = [results.trained(Path(f"results/web/{m}/finetuned"))[1:3] for m in results.MODELS]
    assert tokens[0] == tokens[1]
    weights = Path("results/web/columnar/finetuned/run.json").stat().st_mtime_ns
    results.main()
    assert Path("results/web/columnar/finetuned/run.json").stat().st_mtime_ns == weights
    assert "tower" not in page  # no question, no answer


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    monkeypatch.setattr(sys, "argv", ["results.py", "--web", str(tiny.documents(tmp_path / "web.jsonl"))])
    with pytest.raises(ValueError, match="--train and --eval must name a file"):
        results.main()
