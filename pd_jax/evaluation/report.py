"""An evaluation's results as tables on the terminal, and as one HTML file: what was compared, the two figures that
matter, tables, plots, and examples."""

import html
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pd_jax.evaluation.look import sight_line
from pd_jax.evaluation.metrics import FEWEST, answer_of, normalize, score
from pd_jax.evaluation.results import Quality, Results, RowSummary, Summary
from pd_jax.evaluation.ways import default_models, parse_rows
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
                        k,
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


# The HTML file --------------------------------------------------------------------------------------------------------

EXAMPLES = 20
INK = "#010203"  # of plots; it becomes the page's own colour, light or dark
PLOTS: Any = {
    "svg.fonttype": "none",  # labels stay text
    "svg.hashsalt": "pd_jax",  # the same results give the same file
    "font.size": 11,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
STYLE = """:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --line: #d5d9de; --faint: #5d666f;
  --card: #f3f5f7; --wrong: #f9d2b0; --right: #1d7a3c }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --line: #353b42; --faint: #9aa4ad;
  --card: #1e2327; --wrong: #7a4210; --right: #6cc98a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; background: var(--page);
  color: var(--ink) }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
td { white-space: nowrap } th:first-child, td:first-child, td:nth-child(2):last-child { text-align: left }
td:nth-child(2):last-child, .examples td { white-space: normal; overflow-wrap: anywhere }
.examples th, .examples td { text-align: left; min-width: 8em }
.figures { display: flex; flex-wrap: wrap; gap: 1em } .figures p { flex: 1 1 18em; margin: 0; padding: .8em 1em;
  background: var(--card); border-radius: .5em } .figures b { display: block; font-size: 1.9em; line-height: 1.2 }
mark { background: var(--wrong); color: inherit; border-radius: .2em } .right { color: var(--right) }
.faint, figcaption { color: var(--faint) } figure { margin: 1.5em 0 } svg { max-width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }"""


def compared(results: Results) -> tuple[str, list[tuple[str, str]]]:
    """What was compared, in two sentences; and every row in words."""
    flags, summary = results["flags"], results["summary"]
    names = list(summary["rows"])
    rows = "one row" if len(names) == 1 else f"{len(names)} rows"
    text = (
        f"{summary['questions']} questions about {summary['contexts']} contexts of {flags['dataset_name']} were "
        f"answered by {rows}, greedily, with at most {flags['max_new_tokens']} tokens an answer. An answer that is one "
        f"of the gold answers is an exact match (EM); differences are to the row {summary['reference']}, on the same "
        "questions."
    )
    models = default_models(flags["base_model"], flags["ft_model"], flags["sequential_model"])
    specs = {spec.name: spec for spec in parse_rows(names, models)}
    return text, [(name, f"{specs[name].way.words} ({specs[name].model})") for name in names]


def figures_that_matter(summary: Summary) -> list[tuple[str, str]]:
    """(figure, what it is): how much better a row answers than the reference, and how much faster; of columns, if that
    row is there, else of the last one."""
    rows, reference = summary["rows"], summary["reference"]
    others = [name for name in rows if name != reference]
    name = next(
        (other for other in others if other.partition("=")[0] == "columns"), others[-1] if others else reference
    )
    row, base = rows[name], rows[reference]
    seconds, slow = row["cost"]["seconds"], base["cost"]["seconds"]
    if name == reference:
        figures = [(f"{_estimate(row, 'em')} %", f"exact match of {name}")]
        return figures if seconds is None else [*figures, (f"{seconds:.3f} s", "a context with all its questions")]
    why = "" if row["em"]["difference_interval"] else f"; no interval from fewer than {FEWEST} contexts"
    em = f"{row['em']['value']:.1f} % against {base['em']['value']:.1f} %"
    quality = _difference(row, "em"), f"points of exact match: {name} against {reference}, {em}{why}"
    if not seconds or not slow:
        return [quality, ("-", "speed was not measured: --repeats 0")]
    speed = f"{name} against {reference}, {seconds:.3f} s against {slow:.3f} s a context with all its questions"
    return [quality, (f"{slow / seconds:.2f}\u00d7", f"as fast: {speed}")]


def _svg(figure: Any, caption: str) -> str:
    """A figure as part of the page; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    picture = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    picture = re.sub(r' xmlns(:xlink)?="[^"]*"', "", picture[picture.index("<svg") :]).replace(INK, "currentColor")
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _label(name: str) -> str:
    """A row's name in a plot: of its model the last part only. A dollar sign is no formula."""
    way, equals, model = name.partition("=")
    return f"{way}{equals}{Path(model).name}".replace("$", r"\$")


def _plots(rows: dict[str, RowSummary]) -> list[str]:
    """EM by row with intervals, speed by the number of branches, EM by branch index."""
    from matplotlib import pyplot as plt

    plots = []
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    for place, row in enumerate(rows.values()):
        if row["em"]["interval"]:
            axes.plot(row["em"]["interval"], [place, place], color="tab:blue")
        axes.plot(row["em"]["value"], place, "o", color="tab:blue")
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[_label(name) for name in rows],
        xlabel="exact match, %",
        ylim=(len(rows) - 0.5, -0.5),
    )
    plots.append(_svg(figure, "Exact match of every row; a line is its 95 % interval."))

    def curves(points: Callable[[RowSummary], dict[str, float | None]], x: str, y: str, caption: str) -> None:
        figure, axes = plt.subplots(figsize=(7, 3.5))
        groups = list(points(next(iter(rows.values()))))
        for name, row in rows.items():
            axes.plot([float("nan") if v is None else v for v in points(row).values()], "o-", label=_label(name))
        axes.set(xlabel=x, ylabel=y, xticks=range(len(groups)), xticklabels=groups, ylim=(0, None))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        plots.append(_svg(figure, caption))

    if all(row["cost"]["seconds"] is not None for row in rows.values()):
        curves(
            lambda row: {k: part["cost"]["tokens_per_second"] for k, part in row["by_branches"].items()},
            "branches",
            "answer tokens a second",
            "Speed, by the number of questions of a context.",
        )
    curves(
        lambda row: {k: part["em"]["value"] for k, part in row["by_index"].items()},
        "branch index",
        "exact match, %",
        "Exact match, by the place of a question among its siblings.",
    )
    return plots


def _html_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "\n".join(cells("td", line) for line in lines)
    return f'<h2>{html.escape(title)}</h2>\n<div class="wide"><table>\n{cells("th", header)}\n{body}\n</table></div>'


def marked(text: str, golds: Sequence[str]) -> str:
    """An answer as HTML, the words (of Chinese, the characters) that no gold answer has in <mark>."""

    def words(text: str) -> list[str]:
        return re.findall(r"\s+|[\u4e00-\u9fa5]|[^\s\u4e00-\u9fa5]+", text)

    known = {normalize(word) for gold in golds for word in words(gold)} | {""}
    parts = [(html.escape(word), normalize(word) in known) for word in words(text)]
    return "".join(word if plain else f"<mark>{word}</mark>" for word, plain in parts)


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _examples(results: Results) -> str:
    """Questions with their gold answers and what every row said: half of them such whose rows are not scored alike,
    taken evenly from the whole data."""
    metric, rows = results["flags"]["metric"], results["rows"]
    alike, differing = [], []
    for c, context in enumerate(results["contexts"]):
        for b, question in enumerate(context["questions"]):
            said = [answer_of(records[c]["answers"][b]) for records in rows.values()]
            right = [score(text, question["answers"], metric)[0] == 1 for text in said]
            (alike if len(set(right)) == 1 else differing).append((c, b, said, right))
    few = max(EXAMPLES // 2, EXAMPLES - len(alike))
    some = _evenly(differing, few)
    shown = sorted([*some, *_evenly(alike, EXAMPLES - len(some))], key=lambda example: example[:2])
    lines = []
    for c, b, said, right in shown:
        context = results["contexts"][c]
        question = context["questions"][b]
        signs = ['<span class="right">\u2713</span>' if ok else "\u2717" for ok in right]
        answers = [f"{s} {marked(text, question['answers']) or '-'}" for s, text in zip(signs, said, strict=True)]
        text = f"<details><summary class='faint'>context</summary>{html.escape(context['text'])}</details>"
        golds = " | ".join(dict.fromkeys(question["answers"]))
        cells = [html.escape(question["question"]) + text, html.escape(golds), *answers]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ("question", "gold", *rows))
    return (
        f"<h2>{len(shown)} examples</h2>\n<p>{len(some)} of the {len(differing)} questions on which the rows are not "
        f"scored alike, the others from the {len(alike)} on which they are, spread over the whole data. Marked: what "
        f'no gold answer has.</p>\n<div class="wide"><table class="examples">\n<tr>{header}</tr>\n'
        + "\n".join(lines)
        + "\n</table></div>"
    )


def write_report(results: Results, path: Path) -> None:
    """One HTML file that needs nothing else."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    facts = {"flags": results["flags"], **results["machine"], "settings": results["settings"]}
    parts = [_html_table(*table) for table in tables(results["summary"])]
    opening, rows = compared(results)
    words = [f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>" for name, text in rows]
    figures = [f"<p><b>{html.escape(f)}</b> {html.escape(t)}</p>" for f, t in figures_that_matter(results["summary"])]
    sight: list[str] = []
    with matplotlib.rc_context(PLOTS):
        pictures = _plots(results["summary"]["rows"])
        for name, entry in results.get("sight", {}).items():
            from pd_jax.evaluation.pictures import attention_figure

            sight.append(_svg(attention_figure(entry["attention"]), f"{sight_line(name, entry)}."))
    lines = [[name, json.dumps(value, ensure_ascii=False)] for name, value in facts.items()]
    write_whole(
        path,
        "\n".join(
            [
                "<!doctype html><html lang='en'><meta charset='utf-8'>",
                "<meta name='viewport' content='width=device-width, initial-scale=1'>",
                f"<title>Evaluation</title><style>{STYLE}</style>",
                f"<h1>Evaluation</h1>\n<p>{html.escape(opening)}</p>\n<ul>{''.join(words)}</ul>",
                f'<div class="figures">{"".join(figures)}</div>',
                *(f"<p>Note: {html.escape(note)}.</p>" for note in results["notes"]),
                *parts[:3],
                f"<p class='faint'>{FOOTNOTE}</p>",
                *pictures,
                *sight,
                *parts[3:],
                _examples(results),
                _html_table("How it was measured", ["what", "value"], lines),
            ]
        )
        + "\n",
    )
