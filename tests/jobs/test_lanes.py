"""What the demo shows: lanes on a terminal, plain lines and JSON elsewhere, and answers of the small model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from pd_jax.decoding import Event
from pd_jax.jobs import Lanes, one_line

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    "Where is it?",
    "它有多高？",
    "Who 🙂 lit the lamp, every evening for thirty-one years and more than that?",
]


def lines(lanes: Lanes, width: int, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(lanes)
    return [line.rstrip() for line in capture.get().splitlines()]


def grow(columns: list[list[str | None]], *, end: bool = False) -> Lanes:
    """Lanes that have taken these columns, one a second; None: the branch has said nothing more."""
    seconds = iter(range(1000))
    lanes = Lanes(QUESTIONS[: len(columns[0])], clock=lambda: next(seconds))
    for number, texts in enumerate(columns):
        over = end and number == len(columns) - 1
        tokens = tuple(None if text is None else 1 for text in texts)
        reasons: list = ["eos" if text is None or over else None for text in texts]
        lanes.take(Event(number, tokens, tuple(text or "" for text in texts), tuple(reasons)))
    return lanes


@pytest.mark.parametrize("width", [40, 80, 140])
def test_words_of_a_column_stand_under_one_another(width):
    shown = lines(grow([[" a", "八十", " 🙂🙂"], [" bc", "六", " q"], ["X", "X", "X"]]), width)[:3]
    assert all(cell_len(line) <= width for line in shown)
    assert len({cell_len(line[: line.rindex("X")]) for line in shown}) == 1
    assert " a    bcX" in shown[0]  # as wide as the widest word of the column


@pytest.mark.parametrize("width", [40, 80, 140])
def test_long_answers_scroll(width):
    lanes = grow([[f" w{n}", f" v{n}"] for n in range(100)])
    first, second, footer = lines(lanes, width)
    assert first.endswith(" w99")
    assert second.endswith(" v99")
    assert " w1 " not in first
    assert cell_len(first) <= width
    assert footer == "column 100 · 200 tokens · 2 tokens/s"


def test_lanes_that_go_on_are_shown_first():
    lanes = Lanes([f"question {n}" for n in range(30)])
    reasons: list = ["eos" if n < 20 else None for n in range(30)]
    lanes.take(Event(0, (1,) * 30, (" x",) * 30, tuple(reasons)))
    shown = lines(lanes, 80, height=15)
    assert len(shown) <= 15
    assert all(any(f"question {n}" in line for line in shown) for n in range(20, 30))
    assert "and 18 more branches" in shown


def test_whole_answers_stand_there_once_in_the_end():
    columns = [[f" w{n}", f" v{n}", None if n else " only"] for n in range(60)]
    text = " ".join(" ".join(lines(grow(columns, end=True), 80)).split())
    for n in range(60):
        assert text.count(f"w{n} ") == 1
        assert text.count(f"v{n} ") == 1
    assert text.count("only") == 1
    assert text.count("✓") == 3


def test_text_does_not_steer_the_terminal():
    nasty = "a\x1b[31mb\x07\u202ec\nd\r\ne\ud800"
    assert one_line(nasty) == "a\ufffd[31mb\ufffd\ufffdc⏎d⏎e\ufffd"
    shown = "\n".join(lines(grow([[nasty, "x"]], end=True), 80))
    assert "\x1b" not in shown
    assert "\x07" not in shown


def demo(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["demo", *flags])
    runpy.run_path(str(ROOT / "scripts" / "demo.py"), run_name="__main__")
    return capsys.readouterr().out


def test_without_arguments_the_small_model_answers(monkeypatch, capsys):
    out = demo(monkeypatch, capsys)
    assert "made-up world" in out
    right = ["organ", "early June", "night baker", "white parrot", "school pilot", "Lindow"]
    right += ["新石桥县", "杏仁茶", "黑色山羊"]
    answers = [line.rsplit("  ", 1)[1] for line in out.splitlines() if line[:3] in ("1  ", "2  ", "3  ")]
    assert len(answers) == len(right)
    assert sum(a == b for a, b in zip(answers, right, strict=True)) >= 7


def test_json_is_one_object_a_text(monkeypatch, capsys):
    asked = ["--background", "Rosa Toll plays the harp.", "--questions", "What does Rosa Toll play?", "Who?\nNobody?"]
    [line] = demo(monkeypatch, capsys, "--json", *asked).splitlines()
    content = json.loads(line)
    assert [a["question"] for a in content["answers"]] == ["What does Rosa Toll play?", "Who?\nNobody?"]
    assert content["answers"][0]["answer"].strip() == "harp"
    assert {a["finish_reason"] for a in content["answers"]} <= {"eos", "length"}


HOLT = "Dario Holt was born in early June. Clara Ibsen plays the organ. Clara Ibsen lives in Port Marden."
ASKED = ["--background", HOLT, "--questions", "What does Clara Ibsen play?", "When was Dario Holt born?"]


def test_follow_ups_are_asked_behind_the_answers(monkeypatch, capsys):
    more = ["--follow-up", "Where does Clara Ibsen live?", "--follow-up", "= Clara Ibsen"]
    out = demo(monkeypatch, capsys, *ASKED, *more)
    lines = [line.split("  ") for line in out.splitlines() if line[:3] in ("1  ", "2  ")]
    assert [line[0] for line in lines] == ["1", "2", "1", "1"]
    assert [line[2] for line in lines[:3]] == ["organ", "early June", "Port Marden"]
    assert lines[3][1] == "Clara Ibsen"
    content = json.loads(demo(monkeypatch, capsys, "--json", *ASKED, *more))
    assert [a["answer"].strip() for a in content["answers"]] == ["organ", "early June"]
    assert [turn["answers"][0]["question"] for turn in content["later"]] == [
        "Where does Clara Ibsen live?",
        more[3][2:],
    ]


def test_interactive_goes_on_with_typed_lines(monkeypatch, capsys):
    lines = iter(["Where does Clara Ibsen live?", "=", "When was Dario Holt born?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    out = demo(monkeypatch, capsys, *ASKED, "--interactive")
    assert [line.rsplit("  ")[-1] for line in out.splitlines() if line.startswith("1  ")] == [
        "organ",
        "Port Marden",
        "early June",
    ]
    assert next(lines, None) is None
