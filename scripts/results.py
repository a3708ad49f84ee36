"""The results page anew: a real pretrained model, finetuned with and without columns, and decoded.

    python scripts/results.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --train train-mix.json.gz --eval dev-v1.1.json.gz

Everything is a command of this repository that the page names; they run one a core, and their speed is measured alone.
Run again, it goes on where it was stopped.
"""  # fmt: skip

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError
from pd_jax.machines import cpu_name, write_whole

ROOT = Path(__file__).parents[1]
TRAIN, EVAL = "training", "evaluation"
ORDINARY = "--pair-indices --no-sibling-bias --visibility isolated --align ragged"
NEARER = "--pair-indices --sibling-bias-start -4 --align ragged"  # to the ordinary model than the default of columns


@dataclass(frozen=True)
class Flags:
    gguf: str | None = flag(None, "SmolLM2-135M-Instruct, or another model; required", group=TRAIN)
    train: str | None = flag(None, "questions for finetuning, a file in SQuAD's format; required", group=TRAIN)
    eval: str | None = flag(None, "questions of the evaluation, a file in SQuAD's format; required", group=EVAL)
    output_dir: str = flag("./results", "where models and evaluations go, and every command's log")
    page: str = flag("./results.md", "the page to write, and beside it its picture")
    processes: int | None = flag(None, "commands at a time, one core each; default: the cores", minimum=1)
    steps: int = flag(70, "optimiser steps of every model, one row each", group=TRAIN, minimum=1)
    row: int = flag(1024, "tokens of a row", group=TRAIN, minimum=64)
    train_contexts: int = flag(300, "contexts of --train for the questions", group=TRAIN, minimum=1)
    passages: tuple[int, ...] = flag((2, 4, 8), "branches of the sets of passages", group=TRAIN, minimum=2)
    contexts: int = flag(500, "contexts of --eval", group=EVAL, minimum=1)
    sets: int = flag(1000, "at most so many sets of passages of --eval", group=EVAL, minimum=1)
    timed: int = flag(50, "contexts on which every way of answering is timed; 0: none", group=EVAL, minimum=0)
    max_new_tokens: int = flag(24, "tokens an answer, at most", group=EVAL, minimum=1)


@dataclass(frozen=True)
class Job:
    """A command of this repository, run from its root."""

    name: str  # of its log
    command: str
    made: Path  # exists when it is over; of a training run.json, which says so

    def over(self) -> bool:
        if self.made.name != "run.json":
            return self.made.exists()
        return self.made.exists() and json.loads(self.made.read_text(encoding="utf-8"))["finished"]


# The commands ---------------------------------------------------------------------------------------------------------


def jobs(flags: Flags, out: Path) -> list[list[Job]]:
    """In stages: what a stage makes, the next ones use."""
    start, middle = out / "start", flags.passages[len(flags.passages) // 2]
    sets = {k: {part: out / f"passages-{k}" / part for part in ("train", "eval")} for k in flags.passages}
    quoted = {name: shlex.quote(str(Path(getattr(flags, name)).absolute())) for name in ("gguf", "train", "eval")}

    def made(k: int, part: str, number: int) -> Job:
        asked = f"--dataset-name {quoted[part]} --branches {k} --sets {number} --output-dir {sets[k][part]}"
        return Job(f"passages-{k}-{part}", f"scripts/make_passages.py {asked}", sets[k][part] / "background.json")

    def trained(name: str, data: str) -> Job:
        learn = f"--max-length {flags.row} --learning-rate 2e-4 --epochs 100 --max-steps {flags.steps}"
        command = f"scripts/finetune.py --model-name {start} {data} {learn} --output-dir {out / name}"
        return Job(name, command, out / name / "run.json")

    def evaluated(name: str, data: str, rows: str, more: str = "--batch-size 8 --repeats 0") -> Job:
        asked = f"{data} --rows {rows} --max-new-tokens {flags.max_new_tokens} {more} --seed 0"
        return Job(
            f"evaluate-{name}", f"scripts/evaluate.py {asked} --output-dir {out / name}", out / name / "results.json"
        )

    squad = f"--dataset-name {quoted['train']} --max-train-samples {flags.train_contexts} --max-branches 6"
    ask = f"--dataset-name {quoted['eval']} --max-branches 6"
    control, told, nearer = out / "control", out / "told", out / "columns-nearer"
    begin = [
        Job("convert", f"convert/from_gguf.py --gguf {quoted['gguf']} --output {start}", start / "config.json"),
        *(made(k, "train", 300) for k in flags.passages),
        *(made(k, "eval", flags.sets) for k in flags.passages),
    ]
    siblings = {k: f"--dataset-name {sets[k]['train'] / 'siblings.json'} --max-branches {k}" for k in flags.passages}
    background = sets[middle]["train"] / "background.json"
    train = [
        trained("control", f"{squad} {ORDINARY}"),
        trained("columns", squad),
        trained("columns-nearer", f"{squad} {NEARER}"),
        *(trained(f"passages-{k}-columns", siblings[k]) for k in flags.passages),
        trained("told", f"--dataset-name {background} --min-questions 1 {ORDINARY}"),
    ]
    answer = [
        evaluated(
            "questions",
            f"--ft-model {out / 'columns'} {ask} --max-eval-samples {flags.contexts}",
            f"isolated={control} columns columns={nearer}",
        )
    ]
    for k in flags.passages:
        model, held_out = out / f"passages-{k}-columns", sets[k]["eval"]
        rows = f"isolated={told} isolated prompts columns --against columns"
        here = f"--max-branches {k} --max-eval-samples 100000"
        answer += [
            evaluated(f"passages-{k}-seen", f"--ft-model {model} --dataset-name {held_out}/siblings.json {here}", rows),
            evaluated(
                f"passages-{k}-told",
                f"--ft-model {told} --dataset-name {held_out}/background.json --min-questions 1 {here}",
                "isolated",
            ),
        ]
    exported = out / "control-hf"
    convert = f"convert/flax_to_hf.py --checkpoint {control} --output {exported}"
    alone = f"--base-model {exported} --ft-model {out / 'columns'} {ask} --max-eval-samples {flags.timed}"
    rows = f"hf-sequential hf-batched isolated={control} columns"
    timed = evaluated("speed", alone, rows, "--batch-size 1 --repeats 1")
    export = Job("export", convert, exported / "config.json")
    return [begin, train, [*answer, export], [timed]] if flags.timed else [begin, train, answer]


def run_jobs(stage: Sequence[Job], out: Path, processes: int | None) -> None:
    """Those that are not over yet, so many at a time, each on a core of its own; a lone one has all cores.

    Raises `InputError` with the last line that a failed command has said.
    """
    pinned = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pinned else list(range(os.cpu_count() or 1))
    free: SimpleQueue[set[int]] = SimpleQueue()
    count = min(processes or len(cores), len(stage))
    for i in range(count):
        free.put({cores[i % len(cores)]} if len(stage) > 1 else set(cores))
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | os.environ
    stop: list[str] = []

    def work(job: Job) -> None:
        if job.over() or stop:
            return
        mine, began, log = free.get(), time.monotonic(), out / "logs" / f"{job.name}.log"
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, *shlex.split(job.command)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
            if pinned:
                os.sched_setaffinity(process.pid, mine)
            code = process.wait()
        free.put(mine)
        if code or not job.over():
            said = log.read_text(encoding="utf-8").strip().splitlines()
            stop.append(f"{job.command}: {said[-1] if said else 'it said nothing'} (exit code {code}, see {log})")
            return
        seconds = time.monotonic() - began
        print(f"{time.strftime('%H:%M:%S')} {job.name}: {seconds:.0f} s", flush=True)

    waiting = [job.name for job in stage if not job.over()]
    print(f"{len(waiting)} of {len(stage)} commands to run: {', '.join(waiting)}", flush=True)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, stage))
    if stop:
        raise InputError(stop[0])


# The page -------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def trained_lines(out: Path, names: Iterable[str]) -> list[list[str]]:
    """Loss over the last tenth, speed and door of every run: what metrics.jsonl says."""
    import numpy as np

    lines = []
    for name in names:
        text = (out / name / "metrics.jsonl").read_text(encoding="utf-8")
        logged = [json.loads(line) for line in text.splitlines()]
        last = logged[-max(1, len(logged) // 7) :]
        door = [f"{last[-1][f'sibling_bias_{end}']:.2f}" for end in ("min", "max") if f"sibling_bias_{end}" in last[-1]]
        loss, speed = np.mean([m["loss"] for m in last]), np.mean([m["tokens_per_second"] for m in logged])
        lines.append([name, str(last[-1]["step"]), f"{loss:.2f}", f"{speed:.0f}", " .. ".join(door) or "none"])
    return lines


def load(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name / "results.json").read_text(encoding="utf-8"))


def score(part: dict[str, Any], key: str) -> str:
    estimate = part[key]
    low, high = estimate["interval"] or (float("nan"),) * 2
    return f"{estimate['value']:.1f} [{low:.1f}, {high:.1f}]"


def difference(part: dict[str, Any]) -> str:
    estimate = part["em"]
    low, high = estimate["difference_interval"] or (float("nan"),) * 2
    return f"{estimate['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def bins(row: dict[str, Any], reference: dict[str, Any]) -> Iterable[tuple[str, int, float, float]]:
    """(branches, questions, EM here, EM of the reference) by the number of branches, in at most four bins."""
    counts = sorted(row["by_branches"], key=int)
    for first, last in ((1, 2), (3, 4), (5, 5), (6, 1000)):
        inside = [k for k in counts if first <= int(k) <= last]
        total = sum(row["by_branches"][k]["questions"] for k in inside)
        if total:
            mean = [
                sum(r["by_branches"][k]["em"]["value"] * r["by_branches"][k]["questions"] for k in inside) / total
                for r in (row, reference)
            ]
            most = min(last, int(counts[-1]))
            yield (str(first) if first == most else f"{first} to {most}"), total, *mean


def questions_part(out: Path) -> list[str]:
    results = load(out, "questions")
    rows, effects = results["summary"]["rows"], [f"{entry['effect']:.2f}" for entry in results["sight"].values()]
    words = ["control: trained and decoded one by one", "columns, as they are trained by default"]
    names = dict(zip(rows, [*words, f"columns, with `{NEARER}`"], strict=True))
    lines = [
        [names[n], score(r, "em"), difference(r), score(r, "f1"), score(r["leak_free"], "em")] for n, r in rows.items()
    ]
    first = next(iter(rows.values()))
    binned = [[b, str(n), f"{c:.1f}", f"{r:.1f}"] for b, n, c, r in bins(rows["columns"], first)]
    leak_free = first["leak_free"]["questions"]
    return [
        "## Questions about one context",
        f"{first['questions']:,} questions; nothing in them needs a sibling, so the aim is to lose nothing. Leak-free: "
        f"the {leak_free:,} questions whose answer stands in no sibling's question or answer. Hiding the siblings "
        f"changes a logit of the models in columns by {' and '.join(effects)} of the logits' standard deviation.",
        table(["model", "EM", "EM against the control", "F1", "EM, leak-free"], lines),
        table(["branches", "questions", "EM in columns", "EM of the control"], binned),
    ]


def speed_part(out: Path) -> list[str]:
    results = load(out, "speed")
    rows, summary = results["summary"]["rows"], results["summary"]
    slow = next(iter(rows.values()))["cost"]["seconds"]
    words = ["transformers, one question at a time", "transformers, a context's questions as a batch"]
    words += ["control, all questions of a context at once (`isolated`)", "columns"]
    lines = [
        [word, f"{r['cost']['seconds']:.2f}", f"{slow / r['cost']['seconds']:.1f}", f"{r['cost']['forwards']:.1f}",
         f"{r['cost']['prefill_tokens']:.0f}"]
        for word, r in zip(words, rows.values(), strict=True)
    ]  # fmt: skip
    return [
        "## Speed",
        f"{summary['contexts']} of these contexts, {summary['questions']} questions, one context after the other on "
        f"{results['machine']['cpus']} cores, nothing else running.",
        table(["way", "seconds a context", "times as fast", "forwards", "prompt tokens"], lines),
    ]


def passages_part(flags: Flags, out: Path) -> list[str]:
    lines, curve = [], {}
    for k in flags.passages:
        seen, told = load(out, f"passages-{k}-seen")["summary"], load(out, f"passages-{k}-told")["summary"]["rows"]
        closed, hidden, prompts, columns = seen["rows"].values()
        bound = told["isolated"]
        share = columns["em"]["value"] / bound["em"]["value"] if bound["em"]["value"] else float("nan")
        curve[k] = {"told": bound, "columns": columns, "siblings hidden": hidden, "closed book": closed}
        lines.append(
            [str(k), str(seen["questions"]), score(bound, "em"), score(columns, "em"), f"{share:.0%}",
             score(prompts, "em"), score(hidden, "em"), score(closed, "em")]
        )  # fmt: skip
    draw(curve, Path(flags.page).with_name("passages.svg"))
    heads = []
    for k in flags.passages:
        bias, effect = door(out / f"passages-{k}-columns"), load(out, f"passages-{k}-seen")["sight"]["columns"]
        counts = [(bias > -1).sum(), ((bias > -1.5) & (bias <= -1)).sum(), ((bias > -2.5) & (bias <= -1.5)).sum()]
        at = [f"{layer + 1} ({bias[layer].max():.2f})" for layer in bias.max(1).argsort()[::-1][:3]]
        last = [str(count) for count in (*counts, (bias <= -2.5).sum())]
        heads.append([str(k), *last, ", ".join(at), f"{effect['effect']:.2f}"])
    header = ["branches", "questions", "upper bound", "columns", "share", "prompts", "siblings hidden", "closed book"]
    doors = ["branches", "heads > -1", "-1.5 .. -1", "-2.5 .. -1.5", "< -2.5", "most open layers", "effect on logits"]
    return [
        "## Questions about a sibling's passage",
        "Every branch holds a passage of its own and is asked about a sibling's; the background holds none. EM, in "
        "percent. Upper bound: a model trained in the ordinary way, told the passage in the background. Closed book: "
        "the same model, not told.",
        table(header, lines),
        "![Exact match by the number of branches](passages.svg)",
        "Where `sibling_bias` ends, of all heads (it begins at -2), and the mean change of a logit when siblings are "
        "hidden, in standard deviations of the logits:",
        table(doors, heads),
    ]


def door(model: Path) -> Any:
    """sibling_bias [layers, heads] of a finetuned model."""
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.files import load_config, load_params

    return np.asarray(load_params(model, load_config(model), jnp.float32)["layers"]["sibling_bias"])


def draw(curve: dict[int, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name in next(iter(curve.values())):
        points = [curve[k][name]["em"] for k in curve]
        ends = [p["interval"] or [p["value"]] * 2 for p in points]
        errors = [[p["value"] - low for p, (low, _) in zip(points, ends, strict=True)],
                  [high - p["value"] for p, (_, high) in zip(points, ends, strict=True)]]  # fmt: skip
        axes.errorbar(list(curve), [p["value"] for p in points], errors, fmt="o-", capsize=3, label=name)
    axes.set(xlabel="branches of a set", ylabel="exact match, % (95 % interval)", xticks=list(curve), ylim=(0, None))
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def write_page(flags: Flags, out: Path, stages: Sequence[Sequence[Job]]) -> None:
    """Aggregates only: no question, no answer."""
    sizes = [f for f in fields(flags) if f.name not in ("gguf", "train", "eval", "output_dir", "page", "processes")]
    changed = [
        f"--{f.name.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, tuple) else v}"
        for f in sizes
        if (v := getattr(flags, f.name)) != f.default
    ]
    command = " ".join(["python scripts/results.py --gguf FILE --train FILE --eval FILE", *changed])
    machine = load(out, "questions")["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    names = [job.name for job in stages[1]]
    places = {str(out): "OUT", str(Path(str(flags.train)).absolute()): "TRAIN"}
    commands = "\n".join(f"python {job.command}" for job in stages[1])
    for place, word in sorted(places.items(), key=lambda item: -len(item[0])):
        commands = commands.replace(place, word)
    parts = [
        "# Results",
        f"Written by `{command}`. **{Path(str(flags.gguf)).stem}, from weights of about 4 bits, trained for "
        f"{flags.steps} rows of {flags.row:,} tokens on at most {flags.train_contexts} contexts; not Qwen3.** Numbers "
        "of so small a model say what columns cost and give, not how good a model can be. Brackets: 95 % intervals, "
        "bootstrapped by context. Answers are greedy, of at most "
        f"{flags.max_new_tokens} tokens.",
        *questions_part(out),
        *(speed_part(out) if flags.timed else ()),
        *passages_part(flags, out),
        "## How the models were trained",
        table(["model", "steps", "loss, last rows", "tokens/s", "sibling_bias"], trained_lines(out, names)),
        f"```bash\n{commands}\n```",
        f"{cpu_name() or platform.processor()}, float32, one core a command. {versions}.",
    ]
    write_whole(Path(flags.page), "\n\n".join(parts) + "\n")


def main() -> None:
    flags = parse(Flags, description=__doc__)
    missing = [f"--{name}" for name in ("gguf", "train", "eval") if not Path(getattr(flags, name) or "").is_file()]
    if missing:
        raise InputError(f"{' and '.join(missing)} must name a file, see --help")
    out = Path(flags.output_dir).absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    Path(flags.page).parent.mkdir(parents=True, exist_ok=True)
    stages = jobs(flags, out)
    for stage in stages:
        run_jobs(stage, out, flags.processes)
    write_page(flags, out, stages)
    print(f"written: {flags.page}")


if __name__ == "__main__":
    run(main)
