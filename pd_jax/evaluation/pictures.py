"""Pictures as PNG or SVG files, as their names end: loss curves, a layout (columns by branches), its mask, and which
RoPE pairs turn with the branch. What they show comes from `pd_jax.columns`."""

import json
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pd_jax.columns import Coordinates, column_mask, inverse_frequencies, rope_tables
from pd_jax.config import ModelConfig, Visibility
from pd_jax.errors import InputError
from pd_jax.layout import Layout
from pd_jax.watching.sight import PLACES

KINDS = ("background", "prompt", "answer")
COLOURS = ("#9ecae1", "#fdd49e", "#a1d99b")  # of the three kinds
OWN, SIBLING = "#4c9a5f", "#d9822b"
MOST_COLUMNS = 1500  # of a layout: a picture has at most 65,536 pixels across
MOST_NAMES = 60  # tokens of a mask that are named along its sides

log = logging.getLogger(__name__)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt


@cache
def fonts_for(characters: frozenset[str]) -> tuple[str, ...]:
    """Names of installed fonts that have `characters` together, matplotlib's own first. Says once which of them none
    has; their place shows a box."""
    from matplotlib import font_manager

    own = "DejaVu Sans"
    wanted = {ord(c) for c in characters if c.isprintable() and not c.isspace()}
    wanted -= font_manager.get_font(font_manager.findfont(own)).get_charmap().keys()
    chosen, has = [own], {}
    for file in font_manager.findSystemFonts() if wanted else ():
        with suppress(RuntimeError, OSError):  # a file that cannot be read
            font = font_manager.get_font(file)
            if font.scalable:  # emoji often are pictures, which matplotlib does not take
                has[file] = wanted & font.get_charmap().keys()
    while wanted and (best := max(has, key=lambda file: len(has[file] & wanted), default=None)) and has[best] & wanted:
        font_manager.fontManager.addfont(best)  # it may be newer than matplotlib's list
        chosen.append(font_manager.get_font(best).family_name)
        wanted -= has[best]
    if wanted:
        log.warning(
            "no installed font has %s; boxes stand in their place (Chinese is in Debian's fonts-noto-cjk and "
            "fonts-wqy-microhei)", "".join(map(chr, sorted(wanted)[:20])),
        )  # fmt: skip
    return tuple(chosen)


@contextmanager
def _fonts(words: Sequence[str]) -> Generator[None]:
    """Figures of the block have fonts for `words`."""
    with _pyplot().rc_context({"font.family": fonts_for(frozenset("".join(words)))}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # `fonts_for` has said so
        yield


def _shown(word: str) -> str:
    """A token's text as a label; "…" for a part of a character that ends in another token."""
    return word.replace("\n", "↵").replace("$", r"\$").strip(" ") or ("␣" if word else "…")


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
    if columns > MOST_COLUMNS:
        raise InputError(f"a picture shows at most {MOST_COLUMNS} columns, the sample has {columns}; shorten it")
    with _fonts(words):
        figure, axes = plt.subplots(figsize=(0.32 * columns + 1, 0.75 * branches + 0.8))
        for b, c, k, word in zip(branch, column, kind, words, strict=False):
            axes.add_patch(plt.Rectangle((c, b), 1, 1, facecolor=COLOURS[k], edgecolor="white"))
            shown = _shown(word)
            turn = 90 if len(shown) > 2 else 0
            axes.text(c + 0.5, b + 0.5, shown, ha="center", va="center", rotation=turn, fontsize=8)
        axes.set(xlim=(0, columns), ylim=(branches, 0), xlabel="column", ylabel="branch")
        axes.set_xticks(np.arange(0, columns, 5) + 0.5, np.arange(0, columns, 5))
        axes.set_yticks(np.arange(branches) + 0.5, np.arange(branches))
        there = {name: colour for k, (name, colour) in enumerate(zip(KINDS, COLOURS, strict=True)) if k in kind}
        _legend(plt, axes, there)
        _save(plt, figure, path)


def draw_mask(
    layout: Layout, path: Path, visibility: Visibility = "columns", row: int = 0, words: Sequence[str] = ()
) -> None:
    """Which key (across) each query (down) of one row may look at, in column-major order; `words` [T] are the tokens
    as text, which name the rows and columns of a small mask."""
    plt = _pyplot()
    n = int(layout.valid[row].sum())
    coordinates = Coordinates.of({name: layout[name][row, :n] for name in layout.keys()})  # noqa: SIM118
    seen = np.asarray(column_mask(coordinates, coordinates, visibility))
    branch = layout.branch[row, :n]
    relation = np.where(branch[None] == 0, 1, np.where(branch[None] == branch[:, None], 2, 3)) * seen
    from matplotlib.colors import ListedColormap

    with _fonts(words):
        figure, axes = plt.subplots(figsize=(8, 8))
        colours = ListedColormap(["white", COLOURS[0], OWN, SIBLING])
        axes.imshow(relation, cmap=colours, vmin=0, vmax=3, interpolation="nearest")
        axes.set(xlabel="key: is seen", ylabel="query: sees")
        if words and n <= MOST_NAMES:
            names, size = [_shown(word) for word in words[:n]], 9 if n <= 30 else 6
            axes.set_xticks(range(n), names, rotation=90, fontsize=size)
            axes.set_yticks(range(n), names, fontsize=size)
            axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
            axes.grid(which="minor", color="#dddddd", linewidth=0.5)
            axes.tick_params(which="both", length=0)
        _legend(plt, axes, {"background": COLOURS[0], "own branch": OWN, "sibling": SIBLING})
        _save(plt, figure, path)


def draw_rope(config: ModelConfig, layout: Layout, path: Path, row: int = 0) -> None:
    """Which RoPE pairs turn with the branch and which with the column, after how many branches or columns each has
    turned once, beside the size of one row; and how alike branches look to each branch pair, by their distance."""
    plt, half = _pyplot(), config.head_dim // 2
    valid = layout.valid[row]
    columns, branches = int(layout.column[row][valid].max()) + 1, int(layout.branch[row][valid].max())
    apart = np.arange(max(branches, 8) + 1)
    tables = rope_tables(config, jnp.asarray(apart), jnp.zeros(len(apart), jnp.int32))
    cos, sin = map(np.asarray, tables)  # [branches, pairs]
    alike = cos / np.hypot(cos, sin)  # YaRN's factor is no angle
    by_branch = (cos[1] != cos[0]) | (sin[1] != sin[0])
    frequency = np.where(by_branch, config.branch_stride, 1.0) * inverse_frequencies(config)[0]
    turn, pair = 2 * np.pi / frequency, np.arange(1, half + 1)  # columns or branches of a full turn
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": (3, 2)})
    left.plot(pair[~by_branch], turn[~by_branch], "o", color="#4a86b5", markersize=4, label="turn with the column")
    left.plot(pair[by_branch], turn[by_branch], "D", color=SIBLING, markersize=7, label="turn with the branch")
    for p, distance in zip(pair[by_branch], turn[by_branch], strict=True):
        note = f"pair {p}: {distance:,.1f} branches"
        place = {"xytext": (8, -4), "textcoords": "offset points", "va": "top"}
        left.annotate(note, (p, distance), **place, fontsize=9, bbox={"color": "white", "pad": 1}, zorder=3)
    left.axhline(columns, color="#4a86b5", linestyle=":", label=f"the sample's {columns} columns")
    left.axhline(max(branches, 1), color=SIBLING, linestyle=":", label=f"the sample's {branches} branches")
    left.set(xlabel=f"RoPE pair, of {half}", ylabel="columns or branches of a full turn", yscale="log")
    left.legend(fontsize=8, loc="upper left")
    for p in pair[by_branch]:
        right.plot(apart, alike[:, p - 1], "o-", markersize=4, label=f"pair {p}")
    right.set(xlabel="branches apart", ylabel="cosine of the angle between them", ylim=(-1.08, 1.08))
    if by_branch.any():
        right.legend(fontsize=8, loc="lower left")
    else:
        text = "no pair turns with the branch:\nthe plain model's RoPE,\nwith the column as position"
        right.text(0.5, 0.5, text, ha="center", va="center", transform=right.transAxes)
    figure.tight_layout()
    _save(plt, figure, path)


def attention_figure(mass: Sequence[Sequence[Sequence[float]]]) -> Any:
    """A figure of where attention goes, layers down and heads across, a panel for each of `sight.PLACES`;
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
