"""The page that an ablation's runs support: a figure, tables, and sentences that the numbers alone decide."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pd_jax.machines import write_whole

Run = Mapping[str, Any]  # `pd_jax.benchmarks.ablation.Run`
Groups = dict[tuple[str, str, str], list[Run]]  # (task, scheme, visibility) -> its runs by seed
SAME = 0.01  # a mean this close to the optimum is at it


def write_findings(output: Path, about: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """findings.md, accuracy.png and accuracy.svg in `output`, in the order of `runs`; of a part of the grid, what that
    part says."""
    groups: Groups = defaultdict(list)
    for run in runs:
        groups[run["task"], run["scheme"], run["visibility"]].append(run)
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    schemes = list(dict.fromkeys(run["scheme"] for run in runs if run["visibility"] == "columns"))
    draw(output, groups, tasks, schemes)
    page = "\n".join(_page(about, groups, tasks, schemes))
    write_whole(output / "findings.md", page + "\n")


SEEN = ("isolated", "prompts", "columns")  # the visibilities, from who sees least to who sees most


def _scores(runs: Iterable[Run], visibility: str) -> list[float]:
    return [100 * run["accuracy"][visibility] for run in runs if visibility in run["accuracy"]]


def _best(runs: Sequence[Run], visibility: str) -> float | None:
    best = runs[0]["optimum"].get(visibility) if runs else None
    return None if best is None else 100 * best


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values) if values else "-"


def _at(runs: Sequence[Run]) -> str:
    """The steps at which the runs were solved."""
    return ", ".join(str(run["steps"]) if run["solved"] else f"not in {run['steps']}" for run in runs)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _page(about: Mapping[str, Any], groups: Groups, tasks: Sequence[str], schemes: Sequence[str]) -> list[str]:
    def cell(runs: Sequence[Run], visibility: str) -> str:
        best = _best(runs, visibility)
        if not runs:
            return "-"
        return _three(_scores(runs, visibility)) + ("" if best is None else f" (best {best:.1f})")

    seeds = ", ".join(map(str, about["seeds"]))
    lines = [
        "# What looking at siblings is worth",
        "",
        f"Made by `{about['command']}`: {about['runs']} runs, seeds {seeds}, {about['core_minutes']} core minutes of "
        f"training and looking; {about['machine']}.",
        "Models of 2 layers, width 64, 2 heads, trained with the project's own step on fresh samples and decoded with "
        "`ParallelDecoder`: 512 fresh samples, answers decoded greedily, what a task leaves free is drawn. Numbers are "
        "decoded accuracy in %, one a seed; *best* is what no model can beat (`pd_jax/tasks`, each proven by brute "
        "force). A decoded number has a standard error of at most 1.5 points (2 for the two tasks that count whole "
        "samples).",
        "",
        "Schemes, that is what tells branches apart: `none`; `pairs`, the default RoPE pairs scaled to the head; "
        "`pairs1`, pairs 1, 2, 3; `bias-8` and `bias0`, sibling_bias alone from -8 and from 0; `both`, `pairs1` and a "
        "bias from 0. The bias has the model's learning rate here.",
        "",
        "![accuracy by task and scheme](accuracy.svg)",
        "",
        "## Findings",
        "",
        *[f"* {line}" for line in _findings(groups, tasks)],
        "",
        "## Whom a branch sees (scheme `both`)",
        "",
    ]
    rows = [
        [task, *(cell(groups.get((task, "both", seen), []), seen) for seen in SEEN)]
        for task in tasks
        if (task, "both", "columns") in groups
    ]
    lines += _table(["task", *SEEN], rows)
    lines += ["## What tells branches apart (visibility `columns`)", ""]
    rows = [[task, *(cell(groups.get((task, name, "columns"), []), "columns") for name in schemes)] for task in tasks]
    lines += _table(["task", *schemes], rows)
    lines += ["Steps until decoded accuracy was at the optimum twice in a row (looked at every 50 steps):", ""]
    rows = [[task, *(_at(groups.get((task, name, "columns"), [])) for name in schemes)] for task in tasks]
    lines += _table(["task", *schemes], rows)
    mixed = [task for task in tasks if (task, "both", "mix") in groups]
    if mixed:
        lines += ["## One set of weights for both (scheme `both`)", ""]
        rows = []
        for task in mixed:
            mix, columns = groups[task, "both", "mix"], groups.get((task, "both", "columns"), [])
            rows.append(
                [task, cell(mix, "columns"), cell(mix, "isolated"), cell(columns, "columns"), cell(columns, "isolated")]
            )
        head = ["task", "mix, in columns", "mix, isolated", "columns, in columns", "columns, siblings hidden"]
        lines += _table(head, rows)
    lines += ["## Where attention goes (scheme `both`, trained in columns)", ""]
    lines += ["Mean shares of the tokens in branches, over heads and seeds; the bias at the end, over seeds.", ""]
    rows = []
    for task in tasks:
        runs = groups.get((task, "both", "columns"), [])
        if runs:
            shares = [
                " / ".join(f"{mean(run['attention'][layer][place] for run in runs):.2f}" for place in range(3))
                for layer in range(len(runs[0]["attention"]))
            ]
            low, high = min(run["bias"][0] for run in runs), max(run["bias"][1] for run in runs)
            rows.append([task, *shares, f"{low:.2f} .. {high:.2f}"])
    lines += _table(["task", "layer 1: background / own / siblings", "layer 2", "sibling_bias"], rows)
    return lines


def _findings(groups: Groups, tasks: Sequence[str]) -> list[str]:
    """Sentences, each with the numbers that make it true; one that the runs do not support is not written."""

    def reached(runs: Sequence[Run], visibility: str) -> bool:
        best = _best(runs, visibility)
        return bool(runs) and best is not None and min(_scores(runs, visibility)) >= best - 100 * SAME

    def named(condition: Callable[[str], bool]) -> list[str]:
        return [task for task in tasks if condition(task)]

    both = {task: groups.get((task, "both", "columns"), []) for task in tasks}
    out = []
    useful = named(
        lambda t: (
            reached(both[t], "columns") and (_best(groups.get((t, "both", "isolated"), []), "isolated") or 100) < 99
        )
    )
    if useful:
        gains = ", ".join(
            f"{t} {mean(_scores(groups[t, 'both', 'isolated'], 'isolated')):.1f} -> "
            f"{mean(_scores(both[t], 'columns')):.1f}"
            for t in useful
        )
        out.append(f"**Looking pays where it must.** Isolated against columns, both trained for it: {gains}.")
    hidden = [t for t in useful if _scores(both[t], "isolated")]
    if hidden:
        drops = ", ".join(f"{t} {mean(_scores(both[t], 'isolated')):.1f}" for t in hidden)
        out.append(f"**The models do look.** The same weights with siblings hidden: {drops}.")
    missed = [(t, both[t]) for t in tasks if both[t] and not reached(both[t], "columns")]
    for task, runs in missed:
        out.append(
            f"**Not reached** in columns with `both`: {task}, {_three(_scores(runs, 'columns'))} ({_at(runs)} steps)."
        )
    for task in tasks:
        runs = groups.get((task, "both", "prompts"), [])
        best = _best(runs, "prompts")
        if runs and best is not None and not reached(runs, "prompts"):
            out.append(
                f"**Seeing prompts only is not enough in practice** for {task}: {_three(_scores(runs, 'prompts'))}, "
                f"though {best:.1f} is possible in principle."
            )
    order = [
        t
        for t in tasks
        if (runs := groups.get((t, "bias0", "columns"), []))
        and (_best(runs, "columns") or 100) < 99
        and reached(both[t], "columns")
    ]
    if order:
        stays = ", ".join(f"{t} {_three(_scores(groups[t, 'bias0', 'columns'], 'columns'))}" for t in order)
        out.append(f"**Order needs pairs.** With a bias alone, whatever it learns: {stays}.")
    blind = named(lambda t: (_best(groups.get((t, "none", "columns"), []), "columns") or 0) > 99)
    if blind:
        out.append(
            "**Counting needs nothing**: without any signal "
            + ", ".join(f"{t} {_three(_scores(groups[t, 'none', 'columns'], 'columns'))}" for t in blind)
            + "."
        )
    slow = []
    for task in tasks:
        shut, wide = groups.get((task, "bias-8", "columns"), []), groups.get((task, "bias0", "columns"), [])
        if shut and wide and (_best(shut, "columns") or 0) > 99:
            slow.append(f"{task} {_at(shut)} against {_at(wide)}")
    if slow:
        out.append(f"**A bias that starts shut**, steps from -8 against from 0: {'; '.join(slow)}.")
    costs = []
    for task in tasks:
        alone = groups.get((task, "both", "isolated"), [])
        if alone and both[task] and (_best(alone, "isolated") or 0) > 99:
            costs.append(f"{task}: isolated {_at(alone)} steps, columns {_at(both[task])}")
    if costs:
        out.append(f"**What looking costs where it is useless** (isolated is enough): {'; '.join(costs)}.")
    broken = [
        f"{t} {mean(_scores(both[t], 'isolated')):.1f} (best {best:.1f})"
        for t in tasks
        if both[t] and (best := _best(both[t], "isolated")) is not None
        if mean(_scores(both[t], "isolated")) < best - 5
    ]
    if broken:
        out.append(
            "**Weights trained in columns need their siblings** even for what they could know alone: hidden, "
            f"{', '.join(broken)}."
        )
    mixed = [t for t in tasks if (runs := groups.get((t, "both", "mix"), [])) and reached(runs, "columns")]
    if mixed:
        kept = ", ".join(f"{t} {mean(_scores(groups[t, 'both', 'mix'], 'isolated')):.1f}" for t in mixed)
        out.append(
            f"**One set of weights for both**: trained on a mix, at the optimum in columns and isolated at {kept}."
        )
    other = {(t, n): [100 * r["counts"][n] for r in both[t]] for t in tasks if both[t] for n in both[t][0]["counts"]}
    if other:
        said = ", ".join(f"{t} with {n}: {_three(values)}" for (t, n), values in other.items())
        out.append(f"**Other numbers of branches** than the usual, in columns: {said}.")
    return out


def draw(output: Path, groups: Groups, tasks: Sequence[str], schemes: Sequence[str]) -> None:
    """Mean decoded accuracy by task and scheme, a dot a seed; a line where the optimum of the bar lies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [(name, "columns", f"C{place}", name) for place, name in enumerate(schemes)]
    kinds += [
        ("both", seen, grey, f"both, {seen}")
        for seen, grey in (("isolated", "0.35"), ("prompts", "0.65"))
        if any((t, "both", seen) in groups for t in tasks)
    ]
    figure, axes = plt.subplots(figsize=(1.5 + 1.25 * len(tasks), 4.2))
    width = 0.84 / len(kinds)
    for k, (scheme, seen, colour, label) in enumerate(kinds):
        for t, task in enumerate(tasks):
            runs = groups.get((task, scheme, seen), [])
            values, x = _scores(runs, seen), t - 0.42 + (k + 0.5) * width
            if not values:
                continue
            axes.bar(x, mean(values), width * 0.9, color=colour, label=label if t == 0 else None)
            axes.plot([x] * len(values), values, ".", color="black", markersize=2.5)
            best = _best(runs, seen)
            if best is not None:
                axes.plot([x - width / 2, x + width / 2], [best, best], color="black", linewidth=1.2)
    axes.plot([], [], color="black", linewidth=1.2, label="best possible")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="decoded accuracy, %", ylim=(0, 108), xlim=(-0.6, len(tasks) - 0.4))
    axes.legend(ncols=len(kinds) + 1, frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        figure.savefig(output / f"accuracy.{suffix}", dpi=110, bbox_inches="tight")
    plt.close(figure)
