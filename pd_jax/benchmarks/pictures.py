"""The plot of a decoding benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_decoding(measured: Mapping[str, Any], path: Path) -> None:
    """What `scripts/benchmark.py decode` has measured: milliseconds a column (above) and tokens a second of whole calls
    (below) against branches, a panel for every length of the background; the longest answers that were timed."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    longest = max(row["new_tokens"] for row in measured["rows"])
    rows = [row for row in measured["rows"] if row["new_tokens"] == longest]
    lengths, names, counts = (sorted({row[key] for row in rows}) for key in ("background", "contender", "branches"))
    figure, panels = plt.subplots(2, len(lengths), figsize=(4.5 * len(lengths), 7), squeeze=False, sharey="row")
    for across, length in enumerate(lengths):
        for axes, key, label in zip(
            panels[:, across], ("column_ms", "tokens_per_second"), ("ms a column", "tokens a second"), strict=True
        ):
            for name in names:
                points = [(r["branches"], r[key]) for r in rows if (r["background"], r["contender"]) == (length, name)]
                points = [(n, y) for n, y in sorted(points) if y is not None and y > 0]
                style = "--" if name.startswith("transformers") else "-"
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="branches", ylabel=label, title=f"background {length}")
            axes.set_xticks(counts, [str(n) for n in counts])
            axes.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{measured['model']} {measured['dtype']}, {measured['device']}, {measured['threads']} threads")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
