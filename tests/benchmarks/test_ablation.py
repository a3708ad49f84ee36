"""The ablation: its grid, runs that go on where they stopped, and a page that says only what the runs support."""

import json
from dataclasses import replace

import pytest

from pd_jax.benchmarks import AblateFlags, ablate
from pd_jax.benchmarks.ablation import RECIPES, SCHEMES, Cell, Recipe, decoded_as, grid, optimum, run_cell
from pd_jax.benchmarks.findings import write_findings
from pd_jax.tasks import TASKS, odd, total

FLAGS = AblateFlags(tasks=("vote",), schemes=("both",), seeds=(0,))


def test_the_grid_is_every_scheme_in_columns_and_the_last_in_every_visibility():
    cells = grid(AblateFlags())
    assert len(cells) == len(set(cells)) == len(TASKS) * (len(SCHEMES) + 3) == 90
    assert {cell.visibility for cell in cells if cell.scheme != "both"} == {"columns"}
    assert {cell.visibility for cell in cells if cell.scheme == "both"} == {"columns", "isolated", "prompts", "mix"}
    assert len(grid(AblateFlags(quick=True))) == 12
    assert set(RECIPES) == set(TASKS)


@pytest.mark.parametrize(
    ("task", "scheme", "visibility", "best"),
    [
        ("neighbour", "bias0", "columns", 0.25),  # an order cannot be told by a bias
        ("neighbour", "pairs1", "columns", 1.0),
        ("relay", "bias0", "columns", 1.0),
        ("relay", "none", "columns", 0.25),
        ("odd", "none", "columns", None),
        ("odd", "both", "isolated", 0.375),
    ],
)
def test_the_optimum_of_a_cell(task, scheme, visibility, best):
    assert optimum(TASKS[task], SCHEMES[scheme], visibility) == best


def run(task="drawn", scheme="both", visibility="columns", seed=0, **changes) -> dict:
    names = decoded_as(Cell(task, scheme, visibility))
    names = ("columns", "isolated", "prompts") if scheme == "both" else names
    best = {name: optimum(TASKS[task], SCHEMES[scheme], name) for name in names}
    made = {"task": task, "scheme": scheme, "visibility": visibility, "seed": seed, "accuracy": best, "optimum": best}
    made |= {"steps": 100, "solved": True, "seconds": 1.0, "bias": [-1.0, 1.0], "counts": {}}
    return made | {"attention": [[0.1, 0.4, 0.5]] * 2} | changes


ABOUT = {"command": "c", "runs": 2, "seeds": [0], "core_minutes": 1.0, "machine": "m"}


def page(tmp_path, *runs) -> str:
    write_findings(tmp_path, ABOUT, runs)
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    return (tmp_path / "findings.md").read_text()


def test_the_page_says_what_the_runs_support_and_nothing_else(tmp_path, monkeypatch):
    alone = run(visibility="isolated", accuracy={"isolated": 0.4, "columns": 0.1, "prompts": 0.1})
    good = page(tmp_path, run(accuracy={"columns": 1.0, "isolated": 0.26, "prompts": 0.2}), alone)
    assert "Isolated against columns, both trained for it: drawn 40.0 -> 100.0" in good
    assert "with siblings hidden: drawn 26.0" in good
    assert "Not reached" not in good
    monkeypatch.setattr("pd_jax.benchmarks.findings.draw", lambda *_: None)
    bad = page(tmp_path, run(accuracy={"columns": 0.5, "isolated": 0.26, "prompts": 0.2}, solved=False), alone)
    assert "Looking pays" not in bad
    assert "**Not reached** in columns with `both`: drawn, 50.0 (not in 100 steps)" in bad


@pytest.mark.slow
def test_a_run_that_learns_to_look(monkeypatch):
    """The shortest of them: whoever counts the bits of all needs no binding."""
    recipe = replace(RECIPES["vote"], steps=150)
    monkeypatch.setattr("pd_jax.benchmarks.ablation.ROWS", 128)
    (made,) = run_cell(Cell("vote", "bias0", "columns"), [0], recipe)
    assert made["solved"]
    assert made["accuracy"]["columns"] > 0.99 > 0.75 > TASKS["vote"].optimum(5)["isolated"]
    assert sum(layer[2] for layer in made["attention"]) > 0.2  # of siblings


@pytest.mark.slow
def test_a_join_says_what_isolated_branches_found(monkeypatch):
    monkeypatch.setattr("pd_jax.benchmarks.ablation.ROWS", 256)
    scores = {}
    for task in (total.TASK, total.HIDDEN):
        (made,) = run_cell(Cell("total", "pairs1", "isolated"), [0], Recipe(), task)
        scores[task.name] = made["accuracy"]["isolated"]
    assert scores["total"] >= 0.98
    assert scores["total, hidden"] < 0.3


def test_the_serial_job_is_the_same_job():
    split, alone = odd.TASK.samples(3, 1)[0], odd.serial(4).samples(3, 1)[0]
    (branch,) = alone.branches
    assert branch.prompt[:-1] == [token for part in split.branches for token in part.prompt[:-1]]
    assert branch.answer[-1] == split.branches[0].answer[-1]
    assert len(branch.answer) == 18
    assert len(split.branches[0].answer) == 6


@pytest.mark.slow
def test_the_script_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    short = Recipe(steps=50)
    monkeypatch.setitem(RECIPES, "vote", short)
    flags = replace(FLAGS, output_dir=str(tmp_path))
    ablate(flags)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    capsys.readouterr()
    ablate(flags)
    assert "1 runs to do" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["results"]) == 4
    ablate(flags)
    assert "0 runs to do" in capsys.readouterr().out


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        ablate(replace(FLAGS, output_dir=str(tmp_path / "out")))
