"""The results page, from random weights to its tables, in a size that says nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

SCRIPTS = Path(__file__).parents[2] / "scripts"

# The script, but for the size of the world's two stages.
PROGRAM = f"""
import dataclasses, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import quickstart, results
whole = quickstart.stages
quickstart.stages = lambda out: [dataclasses.replace(flags, max_steps=2) for flags in whole(out)]
results.main()
"""


@pytest.mark.slow
def test_one_command_writes_the_page_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("torch")
    web, squad = tiny.documents(tmp_path / "web.jsonl"), tiny.squad(tmp_path / "squad.json", 40)
    arguments = ["--web", web, "--train", squad, "--eval", squad, "--vocabulary", 300, "--hidden-size", 64]
    arguments += ["--layers", 1, "--pretrain-steps", 2, "--finetune-steps", 2, "--max-eval-samples", 40]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), "--timed-samples", "2", "--max-new-tokens", "4"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    page, out = (tmp_path / "results.md").read_text(encoding="utf-8"), tmp_path / "results"
    assert "not Qwen3's weights" in page
    assert "--eval FILE --vocabulary 300 --hidden-size 64 --layers 1" in page
    for text in (
        "isolated=control",
        "hf-one-prompt",
        "| columnar | finetuned |",
        "F1 % by branch index",
        "cores, float32",
    ):
        assert text in page
    assert "tower" not in page  # no question, no answer

    def flags(model: str, stage: str) -> dict:
        return json.loads((out / "web" / model / stage / "run.json").read_text(encoding="utf-8"))["flags"]

    control = flags("control", "finetuned")
    assert (control["pair_indices"], control["visibility"], control["align"]) == ([], "isolated", "ragged")
    for stage in ("pretrained", "finetuned"):
        columnar, control = flags("columnar", stage), flags("control", stage)
        different = {key for key in columnar if columnar[key] != control[key]}
        assert different - {"output_dir", "model_name", "sibling_bias"} == {"pair_indices", "visibility", "align"}
    weights = (out / "web" / "columnar" / "finetuned" / "run.json").stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)  # finished: nothing is trained anew
    assert (out / "web" / "columnar" / "finetuned" / "run.json").stat().st_mtime_ns == weights


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    monkeypatch.setattr(sys, "argv", ["results.py", "--web", str(tiny.documents(tmp_path / "web.jsonl"))])
    with pytest.raises(ValueError, match="--train and --eval must name a file"):
        results.main()
