"""An evaluation's results as tables on the terminal and as one HTML file with its plots inside."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pd_jax.evaluation.look import sight_line
from pd_jax.evaluation.results import Quality, Results, RowSummary, Summary
from pd_jax.machines import write_whole

TextTable = tuple[str, list[str], list[list[str]]]  # title, header, lines
Score = Literal["em", "f1"]
SCORES: tuple[Score, ...] = ("em", "f1")

FOOTNOTE = (
    "In brackets: 95 % intervals, paired bootstrap by context; none from fewer than 10 contexts. Cost is that of a "
    "context with all its questions; on a CPU the peak is that of the whole process."
)


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _estimate(part: Quality, key: Score) -> str:
    """`value [low, high]` of one estimate; "-" where no question belongs to the part."""
    if key not in part:
        return "-"
    value, interval = part[key]["value"], part[key]["interval"]
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else f"{value:.1f}"


def _difference(part: Quality, key: Score) -> str:
    if key not in part:
        return "-"
    value, interval = part[key]["difference"], part[key]["difference_interval"]
    return f"{value:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else f"{value:+.1f}"


def tables(summary: Summary) -> list[TextTable]:
    """Quality, quality without leaks, cost; then EM and F1 by the number of branches and by the index of a branch."""
    rows = summary["rows"]
    first = next(iter(rows.values()))
    against = f"against {summary['reference']}"
    quality = ["row", "EM %", f"EM {against}", "F1 %", f"F1 {against}"]

    def lines(part: Callable[[RowSummary], Quality]) -> list[list[str]]:
        return [
            [name, *(f(part(row), key) for key in SCORES for f in (_estimate, _difference))]
            for name, row in rows.items()
        ]

    cost = [
        [
            name,
            *(_number(c[key]) for key in ("forwards", "columns", "prefill_tokens")),
            _number(c["seconds"], ".3f"),
            _number(c["tokens_per_second"]),
            _number(c["first_token_seconds"], ".3f"),
            _number(c["peak_bytes"] and c["peak_bytes"] / 2**20, ".0f"),
            _number(c["dead"], ".0%"),
        ]
        for name, c in ((name, row["cost"]) for name, row in rows.items())
    ]
    header = ["row", "forwards", "columns", "prefill tok", "seconds", "tok/s", "first tok s", "peak MiB", "dead"]

    def by(part: Literal["by_branches", "by_index"], what: str) -> list[TextTable]:
        """EM and F1 by a number; one line a number, the rows side by side, then their differences."""
        others = [name for name in rows if name != summary["reference"]]
        return [
            (
                f"{key.upper()} % by {what}",
                [what, "questions", *rows, *(f"{name} {against}" for name in others)],
                [
                    [
                        str(k),
                        str(group["questions"]),
                        *(_estimate(row[part][k], key) for row in rows.values()),
                        *(_difference(rows[name][part][k], key) for name in others),
                    ]
                    for k, group in first[part].items()
                ],
            )
            for key in SCORES
        ]

    return [
        (f"{summary['questions']} questions on {summary['contexts']} contexts", quality, lines(lambda row: row)),
        (
            f"The {first['leak_free']['questions']} questions whose answer occurs in no sibling's question or answer",
            quality,
            lines(lambda row: row["leak_free"]),
        ),
        ("Cost of a context", header, cost),
        *by("by_branches", "number of branches"),
        *by("by_index", "branch index"),
    ]


def print_table(summary: Summary, console: Console) -> None:
    """The tables of quality and cost; in a pipe they are as wide as they need to be."""
    if not console.is_terminal:
        console = Console(width=140, file=console.file)
    for title, header, lines in tables(summary)[:3]:
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(FOOTNOTE, soft_wrap=True)


def _picture(figure: Any) -> str:
    """A figure as an <img> that holds its PNG; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _plots(rows: dict[str, RowSummary]) -> list[Any]:
    """Figures: EM by row with intervals, speed against the number of branches, EM by branch index."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figures = []

    figure, axes = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    for place, row in enumerate(rows.values()):
        if row["em"]["interval"]:
            axes.plot(row["em"]["interval"], [place, place], color="tab:blue")
        axes.plot(row["em"]["value"], place, "o", color="tab:blue")
    axes.set(
        yticks=range(len(rows)),
        yticklabels=list(rows),
        xlabel="exact match, % (95 % interval)",
        ylim=(len(rows) - 0.5, -0.5),
    )
    figures.append(figure)

    def curves(points: Callable[[RowSummary], dict[int, float | None]], x: str, y: str) -> None:
        figure, axes = plt.subplots(figsize=(7, 4))
        for name, row in rows.items():
            known = [(int(k), value) for k, value in points(row).items() if value is not None]
            axes.plot(*zip(*known, strict=True), "o-", label=name)
        axes.set(xlabel=x, ylabel=y, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        figures.append(figure)

    if all(row["cost"]["seconds"] is not None for row in rows.values()):
        curves(
            lambda row: {k: part["cost"]["tokens_per_second"] for k, part in row["by_branches"].items()},
            "branches",
            "answer tokens a second",
        )
    curves(
        lambda row: {k: part["em"]["value"] for k, part in row["by_index"].items()}, "branch index", "exact match, %"
    )
    return figures


def _html_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "\n".join(cells("td", line) for line in lines)
    return f"<h2>{html.escape(title)}</h2>\n<table>\n{cells('th', header)}\n{body}\n</table>"


STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; display: block }"""


def write_report(results: Results, path: Path) -> None:
    """One HTML file that needs nothing else."""
    facts = {"flags": results["flags"], **results["machine"], "settings": results["settings"]}
    parts = [_html_table(*table) for table in tables(results["summary"])]
    pictures = [_picture(figure) for figure in _plots(results["summary"]["rows"])]
    notes = [f"<p>Note: {html.escape(note)}.</p>" for note in results["notes"]]
    sight: list[str] = []
    for name, entry in results.get("sight", {}).items():
        from pd_jax.evaluation.pictures import attention_figure

        sight += [f"<p>{html.escape(sight_line(name, entry))}.</p>", _picture(attention_figure(entry["attention"]))]
    lines = [[name, json.dumps(value, ensure_ascii=False)] for name, value in facts.items()]
    write_whole(
        path,
        "\n".join(
            [
                f"<!doctype html><meta charset='utf-8'><title>Evaluation</title><style>{STYLE}</style>",
                "<h1>Evaluation</h1>",
                *notes,
                *parts[:3],
                f"<p>{FOOTNOTE}</p>",
                *pictures,
                *sight,
                *parts[3:],
                _html_table("How it was measured", ["what", "value"], lines),
            ]
        ),
    )
