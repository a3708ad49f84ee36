"""The table: from constructed records, and again from the files of a run."""

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pd_jax.evaluation import EvaluateFlags
from pd_jax.evaluation.metrics import ranges, score, summarize
from pd_jax.evaluation.report import INK, compared, figures_that_matter, marked, tables, write_report


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
    assert [a["by_branches"][k]["em"]["value"] for k in ("2", "3")] == pytest.approx([100, 100 / 3])
    assert [a["by_branches"][k]["cost"]["tokens_per_second"] for k in ("2", "3")] == [2, 2]
    assert [a["by_index"][k]["em"]["value"] for k in ("1", "2", "3")] == [100, 50, 0]
    assert [a["by_index"][k]["questions"] for k in ("1", "2", "3")] == [2, 2, 1]
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


@pytest.mark.parametrize("values", [[2, 3, 3, 9], range(1, 9), range(1, 61), [1, 2, 5, 7, 9, 30, 31, 40, 64]])
def test_many_numbers_are_looked_at_in_ranges(values):
    values = np.array(values)
    found = ranges(values)
    assert all(sum(first <= value <= last for first, last in found.values()) == 1 for value in values)
    if len(set(values)) <= 8:
        assert found == {str(value): (value, value) for value in sorted(set(values))}
    else:
        assert [*found] == (["1", "2", "5 to 7", "9", "30 to 31", "40 to 64"] if len(values) == 9 else
                            ["1", "2", "3 to 4", "5 to 8", "9 to 16", "17 to 32", "33 to 60"])  # fmt: skip


HOSTILE = "<script>alert('x')</script> $x$ & \"q\""


def constructed(count: int = 12, seconds: float | None = 3.0) -> Any:
    """`count` contexts with three questions each; the row isolated=MODEL answers one of them, columns two."""
    contexts, rows = [], {f"isolated={HOSTILE}": [], "columns": []}
    for c in range(count):
        questions = [question("red"), question("blue"), question("dark green")]
        for b, q in enumerate(questions):
            q["question"] = f"{HOSTILE} {c}.{b}?"
        contexts.append({"title": "t", "text": HOSTILE, "questions": questions})
        for name, answers in zip(rows, (["red", "light blue", HOSTILE], ["red", "blue", "green"]), strict=True):
            rows[name].append(record(answers, seconds=seconds if name == "columns" else 6.0))
    flags = dataclasses.asdict(EvaluateFlags(ft_model="./ours", dataset_name="towers.json"))
    recorded = {"flags": flags, "contexts": contexts, "rows": rows, "notes": [HOSTILE], "machine": {}, "settings": {}}
    return {**recorded, "summary": summarize(recorded)}


def test_the_report_opens_with_what_was_compared_and_two_figures():
    results = constructed()
    text, rows = compared(results)
    assert "36 questions about 12 contexts of towers.json were answered by 2 rows" in text
    assert text.count(". ") == 1  # two sentences
    assert rows[1] == (
        "columns",
        "all questions of a context at once, each sees what the others ask and answer (./ours)",
    )
    assert rows[0][1].endswith(f"none sees another ({HOSTILE})")
    (quality, about), (speed, _) = figures_that_matter(results["summary"])
    assert quality == "+33.3 [+33.3, +33.3]"
    assert "columns against isolated=" in about
    assert "66.7 % against 33.3 %" in about
    assert speed == "2.00×"
    (_, about), (speed, _) = figures_that_matter(constructed(4, None)["summary"])
    assert "no interval from fewer than 10 contexts" in about
    assert speed == "-"


def test_words_that_no_gold_answer_has_are_marked():
    assert marked("The dark red <b>", ["dark blue", "a night"]) == "The dark <mark>red</mark> <mark>&lt;b&gt;</mark>"
    assert marked("林文远", ["林远"]) == "林<mark>文</mark>远"


def test_the_report_shows_examples_of_both_kinds_and_text_as_text(tmp_path):
    results = constructed(40)
    write_report(results, tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in report
    assert HOSTILE not in report
    assert "prefers-color-scheme: dark" in report
    assert "currentColor" in report
    assert INK not in report
    assert (
        report.index("were answered by")
        < report.index('class="figures"')
        < report.index("<table")
        < report.index("<svg")
    )
    assert "10 of the 40 questions on which the rows are not scored alike, the others from the 80" in report
    table = report.split('<table class="examples">')[1].split("</table>")[0]
    lines = [re.findall("<td>(.*?)</td>", line, re.S) for line in table.splitlines() if "<td>" in line]
    assert len(lines) == 20
    assert sum(len({answer.count("✓") for answer in answers}) == 2 for _, _, *answers in lines) == 10
    asked = [html.unescape(re.sub("<.*?>", "", question)) for question, *_ in lines]
    places = [int(re.search(r" (\d+)\.\d\?", text)[1]) for text in asked]  # ty: ignore[not-subscriptable]
    assert min(places) == 0
    assert max(places) > 30  # spread over the data
    blue = next(line for line, text in zip(lines, asked, strict=True) if ".1?" in text)
    assert blue[1:] == ["blue", "✗ <mark>light</mark> blue", '<span class="right">✓</span> blue']
    labels = re.findall("<text.*?>(.*?)</text>", report)
    assert [*map(html.unescape, labels)].count("columns") == 3  # in every plot


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
    assert report.count("<svg") == report.count("</svg>") == 4  # one row sees siblings
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
