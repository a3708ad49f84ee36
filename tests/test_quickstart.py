"""The quickstart as the README gives it, and the pictures that it draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pd_jax.evaluation.pictures import draw_layout, draw_losses, draw_mask
from pd_jax.layout import Branch, TokenSample, build_layout

SCRIPT = Path(__file__).parent.parent / "scripts" / "quickstart.py"


def quickstart(*flags: str) -> subprocess.CompletedProcess:
    """Runs as a user's process does: one device, not the eight of the other tests."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return subprocess.run([sys.executable, str(SCRIPT), *flags], env=environment, capture_output=True, text=True)


def pixels(path: Path) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(path)[..., :3]


def share(picture: np.ndarray, colour: str) -> float:
    """The share of the pixels that have `colour` (#rrggbb)."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(picture - wanted).max(axis=-1) < 0.01).mean())


@pytest.mark.slow
def test_quickstart_answers_in_parallel_what_training_never_saw(tmp_path):
    out = tmp_path / "run"
    first = quickstart("--output-dir", str(out))
    assert first.returncode == 0, first.stderr
    summary = json.loads((out / "evaluation" / "results.json").read_text(encoding="utf-8"))["summary"]
    assert summary["questions"] > 100
    assert summary["rows"]["columns"]["em"]["value"] >= 90
    assert summary["rows"]["columns"]["f1"]["value"] >= summary["rows"]["columns"]["em"]["value"]
    assert "finetuned, all in parallel" in first.stdout
    notes = json.loads((out / "evaluation-notes" / "results.json").read_text(encoding="utf-8"))["summary"]["rows"]
    assert notes["columns"]["em"]["value"] >= 60  # what a sibling's note says is read there ...
    assert notes["isolated"]["em"]["value"] <= 10  # ... and nowhere else: the best guess is right in 3 %
    assert "the door: sibling_bias" in first.stdout
    for name in ("loss", "layout", "mask"):
        assert pixels(out / f"{name}.png").std() > 0.01
        assert f"{name}.png" in first.stdout
    answers = (out / "evaluation" / "predictions-columns.jsonl").read_bytes()
    weights = (out / "finetuned" / "run.json").stat().st_mtime_ns

    again = quickstart("--output-dir", str(out))  # finished: nothing is trained or answered anew
    assert again.returncode == 0, again.stderr
    assert (out / "evaluation" / "predictions-columns.jsonl").read_bytes() == answers
    assert (out / "finetuned" / "run.json").stat().st_mtime_ns == weights


def test_an_output_directory_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    result = quickstart("--output-dir", str(path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: --output-dir {path} is a file; choose a directory\n"
    assert path.read_text() == "mine"


@pytest.fixture(scope="module")
def layout():
    """A background of 6 tokens, prompts of 3 and 2, answers of 2 and 1."""
    branches = [Branch([1, 2, 3], [4, 5], 9), Branch([1, 2], [4], 9)]
    return build_layout([[TokenSample([1, 2, 3, 4, 5, 6], branches)]])


def test_the_mask_picture_shows_siblings_only_where_they_are_visible(layout, tmp_path):
    for visibility in ("columns", "isolated"):
        draw_mask(layout, tmp_path / f"{visibility}.png", visibility)
    # The legend shows every colour once, so a patch of it is always there.
    orange = [share(pixels(tmp_path / f"{v}.png"), "#d9822b") for v in ("columns", "isolated")]
    assert orange[0] > 10 * orange[1] > 0


def test_the_layout_picture_shows_background_prompts_and_answers(layout, tmp_path):
    path = tmp_path / "pictures" / "layout.png"
    draw_layout(layout, ["$x"] * 14, path)
    picture = pixels(path)
    assert share(picture, "#9ecae1") > share(picture, "#fdd49e") > share(picture, "#a1d99b") > 0


def test_the_loss_picture_reads_metrics_files(tmp_path):
    runs = {}
    for name in ("one", "two"):
        runs[name] = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"step": step, "loss": 5 / step}) for step in range(1, 9)]
        runs[name].write_text("\n".join(lines) + "\n")
    draw_losses(runs, tmp_path / "loss.png")
    assert share(pixels(tmp_path / "loss.png"), "#1f77b4") > 0
