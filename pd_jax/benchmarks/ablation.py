"""What looking at siblings is worth: small models trained on tasks whose best score is known, and decoded.

A cell is a task, a position scheme (what tells branches apart) and a visibility (whom a branch sees); a run is a cell
and a seed. All of it goes through the project's own optimiser step and `ParallelDecoder`: only what was decoded counts,
because teacher forcing hands a branch the partial results that it could not have found.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from pd_jax.benchmarks.findings import write_findings
from pd_jax.cli import flag
from pd_jax.config import ROW_VISIBILITIES, VISIBILITIES, RowVisibility, Visibility
from pd_jax.errors import InputError
from pd_jax.layout import Branch, TokenSample, build_layout, unanswered
from pd_jax.machines import cpu_name, naming, write_whole
from pd_jax.tasks import END, TASKS, VOCABULARY, Task

TaskName = Literal[
    "drawn", "chain", "odd", "relay", "neighbour", "number", "distinct", "distinctsame", "vote", "lookup"
]
SchemeName = Literal["none", "pairs", "pairs1", "bias-8", "bias0", "both"]


@dataclass(frozen=True)
class Scheme:
    """What tells branches apart."""

    pairs: tuple[int, ...]  # RoPE pairs that turn with the branch, for heads of 32; "pairs" grow with the head
    bias: float | None  # where sibling_bias begins; None: there is none


SCHEMES: dict[str, Scheme] = {
    "none": Scheme((), None),
    "pairs": Scheme((2, 4, 6), None),  # the default (8, 16, 24) of heads of 128, at the same frequencies
    "pairs1": Scheme((1, 2, 3), None),
    "bias-8": Scheme((), -8.0),
    "bias0": Scheme((), 0.0),
    "both": Scheme((1, 2, 3), 0.0),
}
ORDER = ("neighbour", "number", "distinctsame")  # branches differ by their order only: a bias tells them nothing


@dataclass(frozen=True)
class Recipe:
    """How a task is learned; 2 layers of width 64 with 2 heads each, AdamW with a cosine over `steps`."""

    head_dim: int = 32
    learning_rate: float = 3e-3  # of sibling_bias too: how far it moves by itself is part of what is measured
    batch: int = 32  # rows of one sample
    steps: int = 1000  # at most
    branches: tuple[int, ...] | None = None  # drawn from in training; None: always the task's usual number


# Matching names needs sharper heads; short tasks are learned in tens of steps or not at all. A model that has seen
# four branches only is weakest with one (`lookup` alone is asked with other numbers).
RECIPES: dict[str, Recipe] = {
    "drawn": Recipe(steps=800),
    "chain": Recipe(),
    "odd": Recipe(),
    "relay": Recipe(head_dim=64, learning_rate=2e-3, batch=64, steps=1500),
    "neighbour": Recipe(steps=400),
    "number": Recipe(steps=400),
    "distinct": Recipe(steps=500),
    "distinctsame": Recipe(steps=500),
    "vote": Recipe(steps=200),
    "lookup": Recipe(head_dim=64, learning_rate=2e-3, batch=64, steps=1500, branches=(1, 4, 4, 4)),
}
CHECK_STEPS = 50  # between two looks at decoded accuracy
CHECK_ROWS, ROWS = 128, 512  # samples decoded at each look, and at the end
NEAR = 0.005  # this close to the optimum, beyond the standard error, is there


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    task: str
    scheme: str
    visibility: RowVisibility  # "mix": half of the rows in columns, half isolated


class Run(TypedDict):
    """One run: a line of runs.jsonl. Accuracies are shares of branches (of whole samples where the task says so)."""

    task: str
    scheme: str
    visibility: RowVisibility
    seed: int
    recipe: dict[str, Any]  # of `Recipe`
    accuracy: dict[str, float]  # decoded, by the visibility it was decoded in
    optimum: dict[str, float | None]  # likewise; None: low, and no closed form
    error: float  # the largest standard error of an accuracy
    steps: int  # taken
    solved: bool  # decoded accuracy was at the optimum twice in a row, in every visibility that was trained
    seconds: float  # of training and looking, without what compiled in the first step
    bias: tuple[float, float] | None  # least and greatest sibling_bias at the end
    attention: list[list[float]]  # [layer][background, own branch, siblings], mean over heads, in columns
    counts: dict[str, float]  # accuracy in the trained visibility by other numbers of branches


@dataclass(frozen=True)
class AblateFlags:
    output_dir: str = flag("ablation", "runs.jsonl, results.json, the page of findings and its figure; resumes there")
    quick: bool = flag(False, "12 runs in minutes: drawn, neighbour, vote with none, bias0, both; one seed")
    tasks: tuple[TaskName, ...] | None = flag(None, "default: all")
    schemes: tuple[SchemeName, ...] | None = flag(None, "default: all")
    seeds: tuple[int, ...] | None = flag(None, "default: 0 1 2")
    processes: int | None = flag(None, "one core each; default: as many as there are cores", minimum=1)


def grid(flags: AblateFlags) -> list[Cell]:
    """Every scheme in columns, and the last one in every visibility."""
    tasks = flags.tasks or (("drawn", "neighbour", "vote") if flags.quick else tuple(TASKS))
    schemes = flags.schemes or (("none", "bias0", "both") if flags.quick else tuple(SCHEMES))
    others = ROW_VISIBILITIES[1:2] if flags.quick else ROW_VISIBILITIES[1:]
    cells = [Cell(task, scheme, "columns") for task in tasks for scheme in schemes]
    return cells + [Cell(task, "both", seen) for task in tasks for seen in others if "both" in schemes]


def optimum(task: Task, scheme: Scheme, visibility: Visibility) -> float | None:
    """The best decoded accuracy of a task's models in `visibility`."""
    best = task.optimum(task.branches)
    no_signal = not scheme.pairs and (scheme.bias is None or task.name in ORDER)
    return best["no signal" if no_signal else visibility]


def decoded_as(cell: Cell) -> tuple[Visibility, ...]:
    """The visibilities in which a cell's models have been trained."""
    return VISIBILITIES[:2] if cell.visibility == "mix" else (cell.visibility,)


def accuracy(task: Task, decoder: Any, samples: Sequence[TokenSample], seed: int) -> tuple[float, float]:
    """Decoded by `decoder`: the mean score, and its standard error.

    What a task leaves free is drawn, for every sample anew: min_p keeps the tokens that are about equally likely, and
    is greedy elsewhere.
    """
    free = any(
        task.free(b, t) for s in samples[:1] for b, br in enumerate(s.branches, 1) for t in range(len(br.answer))
    )
    longest = max(len(branch.answer) for sample in samples for branch in sample.branches) + 1  # and its end
    if samples[0].later:
        answers = [decoded_turns(decoder, sample, longest) for sample in samples]
    else:
        results = decoder.generate(
            [unanswered(sample) for sample in samples],
            max_new_tokens=longest,
            do_sample=free,
            min_p=0.5,
            seed=[seed * len(samples) + i for i in range(len(samples))],
        )
        answers = [[b.token_ids for b in result.branches] for result in results]
    scores = np.concatenate([task.score(*pair) for pair in zip(samples, answers, strict=True)]).astype(float)
    return float(scores.mean()), float(np.sqrt(scores.mean() * (1 - scores.mean()) / len(scores)))


def decoded_turns(decoder: Any, sample: TokenSample, max_new_tokens: int) -> list[Sequence[int]]:
    """The answers to all turns of a sample, asked in one session, greedily."""
    session, answers = decoder.session(sample.background), []
    for turn in sample.turns:
        if isinstance(turn, Branch):
            answers.append(session.join(turn.prompt, max_new_tokens=max_new_tokens).token_ids)
        elif turn:
            fork = session.fork([branch.prompt for branch in turn], max_new_tokens=max_new_tokens)
            answers += [branch.token_ids for branch in fork.branches]
    return answers


def run_cell(cell: Cell, seeds: Sequence[int], recipe: Recipe, own: Task | None = None) -> list[Run]:
    """The runs of a cell, one after the other: its programs are compiled once. `own`: a task not in `TASKS`."""
    import jax
    import jax.numpy as jnp

    from pd_jax import ParallelDecoder
    from pd_jax.benchmarks.models import tokens_only
    from pd_jax.columns import Coordinates
    from pd_jax.config import ModelConfig
    from pd_jax.mesh import make_mesh
    from pd_jax.params import init_params
    from pd_jax.training import Optimisation, StepSettings, make_optimizer, make_step
    from pd_jax.watching.sight import attention_mass

    logging.getLogger("pd_jax").setLevel(logging.ERROR)  # decoded otherwise than trained, on purpose
    task, scheme = own or TASKS[cell.task], SCHEMES[cell.scheme]
    grow = recipe.head_dim // 32 if cell.scheme == "pairs" else 1
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=recipe.head_dim,
        rope_theta=1e4,
        pair_indices=tuple(grow * pair for pair in scheme.pairs),
        sibling_bias=scheme.bias is not None,
        visibility=cell.visibility,
    )
    rate = recipe.learning_rate
    optimisation = Optimisation(rate, warmup_ratio=50 / recipe.steps, sibling_bias_lr=rate)
    optimizer, _ = make_optimizer(optimisation, recipe.steps)
    step = jax.jit(make_step(config, optimizer, StepSettings())[0], donate_argnums=0)
    start = jax.jit(lambda key: init_params(config, key, sibling_bias_start=scheme.bias or 0.0))
    tokenizer, mesh = tokens_only(VOCABULARY), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    trained_as = decoded_as(cell)
    looks = VISIBILITIES if cell.scheme == "both" else trained_as
    widest = task.samples(0, 64, [max(recipe.branches or [task.branches])])
    length = max(map(len, widest))

    def decoders(params: Any, visibilities: Sequence[Visibility]) -> dict[Visibility, Any]:
        first = ParallelDecoder(config, params, tokenizer, (END,))
        return {name: first.variant(visibility=name) for name in visibilities}

    def batch(seed: int, number: int) -> dict[str, Any]:
        samples = task.samples((seed, number), recipe.batch, recipe.branches)
        if cell.visibility == "mix":
            half = len(samples) // 2
            samples = [replace(s, visibility="columns" if i < half else "isolated") for i, s in enumerate(samples)]
        layout = build_layout([[sample] for sample in samples], length)
        return {name: jnp.asarray(layout[name])[None] for name in layout}

    def near(score: float, error: float, best: float | None) -> bool:
        return best is not None and score >= best - NEAR - 2 * error * (best < 1)

    def run(seed: int) -> Run:
        params = start(jax.random.key(seed))
        state: Any = {"trained": params, "opt": optimizer.init(params), "step": jnp.int32(0)}
        held_out = task.samples((seed, 1, 1), CHECK_ROWS)
        good = taken = 0
        began = time.perf_counter()
        for taken in range(1, recipe.steps + 1):
            state, metrics = step(state, {}, batch(seed, taken))
            if taken == 1:
                jax.block_until_ready(metrics["loss"])
                began = time.perf_counter()
            if taken % CHECK_STEPS == 0:
                now = decoders(state["trained"], trained_as)
                there = [
                    near(*accuracy(task, d, held_out, taken), optimum(task, scheme, name)) for name, d in now.items()
                ]
                good = good + 1 if all(there) else 0
                if good == 2:
                    break
        seconds = time.perf_counter() - began
        final = task.samples((seed, 2, 2), ROWS)
        scores = {name: accuracy(task, d, final, seed) for name, d in decoders(state["trained"], looks).items()}
        (main,) = decoders(state["trained"], trained_as[:1]).values()
        other = [n for n in (1, 2, 6) if recipe.branches and n in task.counts]
        counts = {str(n): accuracy(task, main, task.samples((seed, 3, n), ROWS // 2, [n]), seed)[0] for n in other}
        layout = build_layout([[sample] for sample in final[:64]])
        look = Coordinates.of({name: jnp.asarray(layout[name]) for name in layout})
        mass = attention_mass(state["trained"], config, jnp.asarray(layout.tokens), look)
        bias = state["trained"]["layers"].get("sibling_bias")
        return {
            "task": cell.task,
            "scheme": cell.scheme,
            "visibility": cell.visibility,
            "seed": seed,
            "recipe": asdict(recipe),
            "accuracy": {name: score for name, (score, _) in scores.items()},
            "optimum": {name: optimum(task, scheme, name) for name in scores},
            "error": max(error for _, error in scores.values()),
            "steps": taken,
            "solved": good == 2,
            "seconds": round(seconds, 1),
            "bias": None if bias is None else (float(bias.min()), float(bias.max())),
            "attention": np.asarray(mass).mean((0, 2)).round(3).tolist(),
            "counts": counts,
        }

    with jax.set_mesh(mesh):
        return [run(seed) for seed in seeds]


def _pin(cores: Sequence[int]) -> None:
    """Every process on a core of its own."""
    from multiprocessing import current_process

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[(current_process()._identity[0] - 1) % len(cores)]})


def _done(path: Path) -> list[Run]:
    """The runs of earlier calls that are of today's recipes; a line that was cut is dropped from the file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if lines and lines[-1]:
        write_whole(path, "".join(line + "\n" for line in lines[:-1]))
    now = {task: json.loads(json.dumps(asdict(recipe))) for task, recipe in RECIPES.items()}
    return [run for run in map(json.loads, lines[:-1]) if run["recipe"] == now.get(run["task"])]


def _key(run: Run) -> tuple[Cell, int]:
    """What a run is one of: its cell and its seed."""
    return Cell(run["task"], run["scheme"], run["visibility"]), run["seed"]


def ablate(flags: AblateFlags) -> None:
    """Run the cells that are not in --output-dir yet, and write what all of them say.

    Raises `InputError` when --output-dir is no directory.
    """
    output = Path(flags.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output-dir {output} is a file; name a directory")
    output.mkdir(parents=True, exist_ok=True)
    seeds = flags.seeds or ((0,) if flags.quick else (0, 1, 2))
    cells, path = grid(flags), output / "runs.jsonl"
    done = {_key(run): run for run in _done(path)}
    missing = {cell: [seed for seed in seeds if (cell, seed) not in done] for cell in cells}
    missing = {cell: left for cell, left in missing.items() if left}
    # The longest first: no process waits for another's last cell.
    order = sorted(missing, key=lambda cell: -RECIPES[cell.task].steps * RECIPES[cell.task].batch)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    processes = min(flags.processes or len(cores), len(order) or 1)
    total = sum(map(len, missing.values()))
    print(f"{len(cells)} cells x {len(seeds)} seeds, {total} runs to do in {processes} processes", flush=True)
    began, count = time.perf_counter(), 0
    for runs in _run_cells(order, missing, processes, cores):
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(run) + "\n" for run in runs)
        done |= {_key(run): run for run in runs}
        count += len(runs)
        spent = time.perf_counter() - began
        for run in runs:
            print(_line(run), flush=True)
        print(
            f"[{count}/{total}] {spent / 60:.1f} min, about {spent / count * (total - count) / 60:.0f} left", flush=True
        )
    runs = [done[cell, seed] for cell in cells for seed in seeds]
    asked = ["--quick"] if flags.quick else []
    asked += ["--tasks", *flags.tasks] if flags.tasks else []
    asked += ["--schemes", *flags.schemes] if flags.schemes else []
    about = {
        "command": " ".join(["python scripts/ablate.py", *asked]),
        "seeds": list(seeds),
        "machine": f"{processes} processes, one core each, of {platform.machine()} {cpu_name()}".strip(),
        "runs": len(runs),
        "core_minutes": round(sum(run["seconds"] for run in runs) / 60, 1),
    }
    write_whole(output / "results.json", json.dumps({**about, "results": runs}, indent=1) + "\n")
    write_findings(output, about, runs)
    print(f"{output / 'findings.md'} and results.json are written", flush=True)


def _run_cells(
    order: Sequence[Cell], seeds: dict[Cell, list[int]], processes: int, cores: Sequence[int]
) -> Iterator[list[Run]]:
    """The runs of every cell as they end. Processes start afresh: a parent that has threads of XLA must not fork."""
    if not order:
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_pin, initargs=(cores,))
    try:
        futures = [pool.submit(run_cell, cell, seeds[cell], RECIPES[cell.task]) for cell in order]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _line(run: Run) -> str:
    scores = ", ".join(
        f"{name} {100 * score:.1f}" + ("" if (best := run["optimum"][name]) is None else f" (best {100 * best:.1f})")
        for name, score in run["accuracy"].items()
    )
    how = f"{'solved' if run['solved'] else 'ended'} at {run['steps']}, {run['seconds']:.0f} s"
    return f"{run['task']:13}{run['scheme']:8}{run['visibility']:9} seed {run['seed']}: {scores}; {how}"
