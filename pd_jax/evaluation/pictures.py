"""Pictures as PNG files: loss curves, a layout (columns by branches) and its mask."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pd_jax.columns import Coordinates, column_mask
from pd_jax.config import Visibility
from pd_jax.layout import Layout
from pd_jax.watching.sight import PLACES

KINDS = ("background", "prompt", "answer")
COLOURS = ("#9ecae1", "#fdd49e", "#a1d99b")  # of the three kinds
OWN, SIBLING = "#4c9a5f", "#d9822b"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _legend(plt: Any, axes: Any, entries: Mapping[str, str]) -> None:
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in entries.values()]
    axes.legend(patches, list(entries), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(entries), frameon=False)


def draw_losses(runs: Mapping[str, Path], path: Path) -> None:
    """The training loss of every run, one panel each; `runs` are names and their metrics.jsonl."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.2), squeeze=False)
    for axes, (name, file) in zip(panels[0], runs.items(), strict=True):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        axes.plot([r["step"] for r in records], [r["loss"] for r in records])
        axes.set(title=name, xlabel="optimiser step", ylabel="loss (nats a token)", ylim=(0, None))
        axes.grid(alpha=0.3)
    _save(plt, figure, path)


def _kinds(layout: Layout, row: int) -> np.ndarray:
    """0 background, 1 prompt, 2 answer: int [T]."""
    return np.where(layout.branch[row] == 0, 0, np.where(layout.prompt[row], 1, 2))


def draw_layout(layout: Layout, words: Sequence[str], path: Path, row: int = 0) -> None:
    """Where the tokens of one row stand, branches by columns; `words` [T] are the tokens as text."""
    plt = _pyplot()
    valid = layout.valid[row]
    branch, column, kind = layout.branch[row][valid], layout.column[row][valid], _kinds(layout, row)[valid]
    columns, branches = column.max() + 1, branch.max() + 1
    figure, axes = plt.subplots(figsize=(0.32 * columns + 1, 0.75 * branches + 0.8))
    for b, c, k, word in zip(branch, column, kind, words, strict=False):
        axes.add_patch(plt.Rectangle((c, b), 1, 1, facecolor=COLOURS[k], edgecolor="white"))
        shown = word.replace("\n", "↵").replace("$", r"\$").strip(" ") or "␣"
        axes.text(c + 0.5, b + 0.5, shown, ha="center", va="center", rotation=90, fontsize=7)
    axes.set(xlim=(0, columns), ylim=(branches, 0), xlabel="column", ylabel="branch")
    axes.set_xticks(np.arange(0, columns, 5) + 0.5, np.arange(0, columns, 5))
    axes.set_yticks(np.arange(branches) + 0.5, np.arange(branches))
    _legend(plt, axes, dict(zip(KINDS, COLOURS, strict=True)))
    _save(plt, figure, path)


def draw_mask(layout: Layout, path: Path, visibility: Visibility = "columns", row: int = 0) -> None:
    """Which key (across) each query (down) of one row may look at, in column-major order."""
    plt = _pyplot()
    n = int(layout.valid[row].sum())
    coordinates = Coordinates.of({name: layout[name][row, :n] for name in layout.keys()})  # noqa: SIM118
    seen = np.asarray(column_mask(coordinates, coordinates, visibility))
    branch = layout.branch[row, :n]
    relation = np.where(branch[None] == 0, 1, np.where(branch[None] == branch[:, None], 2, 3)) * seen
    from matplotlib.colors import ListedColormap

    figure, axes = plt.subplots(figsize=(8, 8))
    axes.imshow(relation, cmap=ListedColormap(["white", COLOURS[0], OWN, SIBLING]), vmin=0, vmax=3)
    axes.set(xlabel="key token", ylabel="query token")
    _legend(plt, axes, {"background": COLOURS[0], "own branch": OWN, "sibling": SIBLING})
    _save(plt, figure, path)


def attention_figure(mass: Sequence[Sequence[Sequence[float]]]) -> Any:
    """A figure of where attention goes, layers down and heads across, a panel for each of `pd_jax.sight.PLACES`;
    `mass` [L, N, 3] as `ParallelDecoder.attention` gives it for a row."""
    plt, shares = _pyplot(), np.asarray(mass)
    layers, heads, _ = shares.shape
    figure, panels = plt.subplots(1, len(PLACES), figsize=(2 + 0.3 * heads * 3, 1.6 + 0.18 * layers), sharey=True)
    for place, axes in enumerate(panels):
        image = axes.imshow(shares[..., place], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=f"{PLACES[place]}: {shares[..., place].mean():.1%}", xlabel="head")
        axes.set_xticks(range(0, heads, max(1, heads // 8)))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="share of attention")
    return figure
