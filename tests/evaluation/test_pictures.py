"""scripts/visualize.py and what it draws with: pictures that follow `pd_jax.columns`, in fonts that have the text."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from examples import WORKED
from matplotlib import font_manager
from matplotlib.image import imread

from pd_jax.columns import Coordinates, column_mask
from pd_jax.errors import InputError
from pd_jax.evaluation import draw_layout, draw_mask, draw_rope
from pd_jax.evaluation.pictures import COLOURS, OWN, SIBLING, fonts_for
from pd_jax.files import known_config
from pd_jax.layout import Branch, TokenSample, build_layout

LAYOUT = build_layout([[WORKED]])


def area(picture: np.ndarray, colour: str) -> int:
    """The pixels that have `colour` (#rrggbb)."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.01).sum())


@pytest.mark.parametrize("visibility", ["columns", "isolated", "prompts"])
def test_the_mask_has_a_cell_for_every_pair_that_may_look(tmp_path, visibility):
    draw_mask(LAYOUT, tmp_path / "mask.png", visibility)
    picture = imread(tmp_path / "mask.png")
    coordinates = Coordinates.of({name: LAYOUT[name][0] for name in LAYOUT.keys()})  # noqa: SIM118
    seen = np.asarray(column_mask(coordinates, coordinates, visibility))
    branch = LAYOUT.branch[0]
    own = (branch[None] == branch[:, None]) & (branch > 0)
    counts = [int((seen & part).sum()) for part in ((branch[None] == 0), own, ~own & (branch[None] > 0))]
    cell = area(picture, COLOURS[0]) / counts[0]
    for count, colour in zip(counts[1:], (OWN, SIBLING), strict=True):
        assert area(picture, colour) / cell == pytest.approx(count, abs=0.6)  # the legend's patch is less than a cell


def test_pairs_turn_once_in_as_many_branches_as_their_frequency_says(tmp_path):
    config = known_config("Qwen/Qwen3-0.6B")
    assert (config.pair_indices, config.rope_theta) == ((8, 16, 24), 1e6)
    first, third = (2 * math.pi * 1e6 ** ((p - 1) / 64) for p in (8, 24))  # the 2nd, 16, turns with the column
    for stride in (1.0, 2.0):
        draw_rope(replace(config, branch_stride=stride), LAYOUT, tmp_path / "rope.svg")
        text = (tmp_path / "rope.svg").read_text(encoding="utf-8")
        for pair, distance in ((8, first / stride), (24, third / stride)):
            assert f"<!-- pair {pair}: {distance:,.1f} branches -->" in text
        assert "pair 16:" not in text
        assert "the sample's 12 columns" in text
    draw_rope(replace(config, pair_indices=()), LAYOUT, tmp_path / "rope.svg")
    text = (tmp_path / "rope.svg").read_text(encoding="utf-8")
    assert "<!-- no pair turns with the branch:" in text
    assert "<!-- pair" not in text


def test_a_layout_that_no_picture_can_hold_is_refused(tmp_path):
    long = build_layout([[TokenSample([1] * 1500, [Branch([1])])]])
    with pytest.raises(InputError, match="at most 1500 columns, the sample has 1501"):
        draw_layout(long, ["a"] * 1501, tmp_path / "layout.png")


def test_fonts_are_found_for_the_text_or_what_is_missing_is_said(monkeypatch, caplog):
    def has(name: str) -> set[int]:
        return font_manager.get_font(font_manager.findfont(name)).get_charmap().keys()

    other = font_manager.findfont("STIXGeneral")
    only_there = chr(min(c for c in has("STIXGeneral") - has("DejaVu Sans") if chr(c).isprintable()))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [other])
    fonts_for.cache_clear()
    assert fonts_for(frozenset("a b")) == ("DejaVu Sans",)
    assert fonts_for(frozenset(f"a{only_there}")) == ("DejaVu Sans", "STIXGeneral")
    assert not caplog.records
    assert fonts_for(frozenset("塔a")) == ("DejaVu Sans",)
    fonts_for(frozenset("塔a"))
    fonts_for.cache_clear()
    assert [record.getMessage()[:29] for record in caplog.records] == ["no installed font has 塔; boxes"[:29]]


def test_the_script_draws_the_worked_example(tmp_path, command, capsys):
    assert command("visualize", "--output-dir", tmp_path) == 0
    assert "17 tokens, visibility columns, align left" in capsys.readouterr().out
    names = {f"{name}.{kind}" for name in ("layout", "mask", "rope") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
    labels = (tmp_path / "mask.svg").read_text(encoding="utf-8")
    for name in ("B0", "B7", "Q1[3]", "Q2[2]", "Q3[1]"):
        assert labels.count(f"<!-- {name} -->") == 2  # a row and a column
    assert imread(tmp_path / "layout.png").std() > 0.01


@pytest.mark.slow
def test_the_script_draws_the_samples_of_a_file(tmp_path, command, capsys):
    source, model = tmp_path / "in.jsonl", tiny.model_directory(tmp_path / "model")
    rows = [{"background": f"Tower {i}.", "branches": ["$How$?", "🦉"]} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--model-name", model, "--input", source, "--documents", 2, "--align", "right", "--visibility", "isolated")
    assert command("visualize", *flags, "--output-dir", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 12
    assert capsys.readouterr().out.count("visibility isolated, align right") == 2
    assert "<!-- pair 2:" in (tmp_path / "out" / "rope-2.svg").read_text(encoding="utf-8")  # the model's own
    for wrong, message in (
        (("--background", "a"), "--background needs --branches"),
        (("--input", source, "--branches", "a"), "contradict"),
        (("--pair-indices", 99), "outside 1..64"),
    ):
        assert command("visualize", *wrong, "--output-dir", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
