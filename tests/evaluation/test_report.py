"""The table: from constructed records, and again from the files of a run."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from pd_jax.evaluation.metrics import score, summarize
from pd_jax.evaluation.report import tables


def record(answers: list[str], **changes) -> dict:
    made = {"ids": [], "answers": answers, "ended": [True] * len(answers), "tokens": 4, "peak_bytes": None}
    made |= {"columns": 5, "forwards": 5.0, "slots": 10.0, "prefill_tokens": 30.0, "seconds": 2.0}
    return made | {"first_token_seconds": 1.0} | changes


def question(answer: str, leaks: bool = False) -> dict:
    return {"id": "", "question": "", "answers": [answer], "leaks": leaks}


def test_the_summary_of_constructed_records():
    results: Any = {
        "flags": {"metric": "squad", "against": "b", "seed": 0},
        "contexts": [
            {"questions": [question("red"), question("blue", leaks=True)]},
            {"questions": [question("red"), question("blue"), question("dark green")]},
        ],
        "rows": {
            "a": [
                record(["red", "blue"], peak_bytes=7),
                record(["red\nQuestion:", "red", "green"], tokens=6, seconds=3.0, slots=20.0, peak_bytes=9),
            ],
            "b": [record(["red", "red"]), record(["red", "red", "red"], seconds=None)],
        },
    }
    summary = summarize(results)
    a, b = summary["rows"]["a"], summary["rows"]["b"]
    assert (summary["reference"], summary["contexts"], summary["questions"]) == ("b", 2, 5)
    assert (a["em"]["value"], a["em"]["difference"], b["em"]["value"]) == pytest.approx((60, 20, 40))
    assert a["f1"]["value"] == pytest.approx(100 * (3 + 2 / 3) / 5)
    assert (a["leak_free"]["questions"], a["leak_free"]["em"]["value"]) == (4, pytest.approx(50))
    assert [a["by_branches"][k]["em"]["value"] for k in (2, 3)] == pytest.approx([100, 100 / 3])
    assert [a["by_branches"][k]["cost"]["tokens_per_second"] for k in (2, 3)] == [2, 2]
    assert [a["by_index"][k]["em"]["value"] for k in (1, 2, 3)] == [100, 50, 0]
    assert [a["by_index"][k]["questions"] for k in (1, 2, 3)] == [2, 2, 1]
    assert a["em"]["interval"] is a["em"]["difference_interval"] is None  # two contexts say nothing about others
    shown = {title: lines for title, _, lines in tables(summary)}
    assert shown["EM % by number of branches"] == [
        ["2", "2", "100.0", "50.0", "+50.0"],
        ["3", "3", "33.3", "33.3", "+0.0"],
    ]
    assert shown["F1 % by branch index"][2] == ["3", "1", "66.7", "0.0", "+66.7"]
    assert (a["cost"]["seconds"], a["cost"]["tokens_per_second"], a["cost"]["peak_bytes"]) == (2.5, 2, 9)
    assert a["cost"]["dead"] == pytest.approx(1 - (4 + 2 + 6 + 3) / 30)
    assert b["cost"]["seconds"] is b["cost"]["tokens_per_second"] is b["cost"]["peak_bytes"] is None
    for context in results["contexts"]:
        for q in context["questions"]:
            q["leaks"] = True
    assert summarize(results)["rows"]["a"]["leak_free"] == {"questions": 0}


def test_files_are_enough_to_recompute_the_table(finished):
    flags, results = finished
    output = Path(flags.output_dir)
    stored = json.loads((output / "results.json").read_text())
    again = summarize(stored)
    assert again == results["summary"]
    assert stored["machine"]["versions"]["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", stored["settings"]["columns"]["weights"][0])
    assert stored["flags"] == json.loads(json.dumps(dataclasses.asdict(flags)))
    report = (output / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4  # one row sees siblings
    assert [*results["sight"]] == ["columns"]
    shares = results["sight"]["columns"]["attention"]
    assert sum(shares[0][0]) == pytest.approx(1, abs=1e-3)
    assert results["sight"]["columns"]["effect"] > 0.01
    assert "Sight of columns (3 contexts): attention on the background" in report
    assert "http" not in re.sub(r"base64,[^\"]*", "", report)
    dumped = json.loads(Path(flags.dump_file).read_text())
    assert len(dumped) == 6
    for entry in dumped:
        assert entry["answers"]
        assert (entry["baseline_row"], entry["parallel_row"]) == ("isolated", "columns")
        assert entry["parallel"] == entry["predictions"]["columns"]
        assert entry["parallel_em"] == score(entry["parallel"], entry["answers"])[0]


def test_from_renders_without_running(finished, tmp_path, capsys, script):
    flags, results = finished
    copy = tmp_path / "results.json"
    copy.write_text((Path(flags.output_dir) / "results.json").read_text())
    assert script("--from", copy) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in results["rows"])
    assert (tmp_path / "report.html").read_text() == (Path(flags.output_dir) / "report.html").read_text()
    copy.write_text('{"rows": {}}')
    assert script("--from", copy) == 2
    assert "is not a results.json of this script" in capsys.readouterr().err
