"""The results page, from a GGUF file to its tables, in a size that says nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

SCRIPTS = Path(__file__).parents[2] / "scripts"


def articles(path: Path, count: int = 12) -> Path:
    """As many articles with a passage of 30 words and more, and three questions about each."""
    data = []
    for i in range(count):
        facts = [f"The tower {i}{j} is painted c{i}{j}x on all of its sides." for j in range(3)]
        qas = [
            {"id": f"{i}-{j}", "question": f"How is the tower {i}{j} painted?", "answers": [{"text": f"c{i}{j}x"}]}
            for j in range(3)
        ]
        for question in qas:
            question["answers"][0]["answer_start"] = 0
        data.append({"title": f"towers {i}", "paragraphs": [{"context": " ".join(facts), "qas": qas}]})
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_one_command_writes_the_page_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    from llama_cpp import make_gguf

    model, squad = make_gguf(tmp_path / "tiny.gguf"), articles(tmp_path / "squad.json")
    sizes = "--steps 2 --row 400 --train-contexts 6 --passages 2 --contexts 11 --timed 2 --max-new-tokens 3"
    command = [sys.executable, SCRIPTS / "results.py", "--gguf", model, "--train", squad, "--eval", squad]
    command = [*map(str, command), *sizes.split()]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    page, out = (tmp_path / "results.md").read_text(encoding="utf-8"), tmp_path / "results"
    assert "not Qwen3" in page
    assert f"--gguf FILE --train FILE --eval FILE {sizes}" in page
    assert len(page.splitlines()) <= 120
    for text in ("control: trained and decoded one by one", "| 2 | 12 |", "upper bound", "leak-free", "times as fast"):
        assert text in page
    assert not re.search(r"tower|c\d+x", page)  # no question, no answer
    assert str(tmp_path) not in page
    assert (tmp_path / "passages.svg").is_file()

    def flags(model: str) -> dict:
        return json.loads((out / model / "run.json").read_text(encoding="utf-8"))["flags"]

    columns, control = flags("columns"), flags("control")
    different = {key for key in columns if columns[key] != control[key]}
    assert different == {"output_dir", "pair_indices", "sibling_bias", "visibility", "align"}
    assert (control["pair_indices"], control["visibility"], control["align"]) == ([], "isolated", "ragged")
    nearer = flags("columns-nearer")
    different = {key for key in nearer if nearer[key] != control[key]}
    assert different == {"output_dir", "sibling_bias", "sibling_bias_start", "visibility"}
    shutil.rmtree(out / "told")  # only this is made anew
    before = (out / "columns" / "run.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "told: " in again.stdout
    assert "columns: " not in again.stdout
    assert (out / "columns" / "run.json").stat().st_mtime_ns == before


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    monkeypatch.setattr(sys, "argv", ["results.py", "--gguf", str(tiny.documents(tmp_path / "m.gguf"))])
    with pytest.raises(ValueError, match="--train and --eval must name a file"):
        results.main()
