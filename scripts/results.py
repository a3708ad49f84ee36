"""The results page anew: columns against ordinary training on the same data, from random weights to the tables.

    python scripts/results.py --web train.jsonl.gz --train train-mix.json.gz --eval dev-v1.1.json.gz

Two pairs of models. Web text: a byte-level BPE tokenizer and a small Qwen3 from random weights, pretrained and
finetuned in columns; its control takes the same rows, steps and tokens as ordinary sequences (no branch pairs, siblings
hidden, nobody waits). The made-up world: quickstart's base and models, and a control in the same way. Then
scripts/evaluate.py's rows on all of --eval, and their speed on its first contexts. Run again, it goes on where it was
stopped.
"""  # fmt: skip

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError
from pd_jax.evaluation import EvaluateFlags, Results
from pd_jax.training import FinetuneFlags, PretrainFlags

SCRIPTS = Path(__file__).parent
MODEL, TRAIN, EVAL = "model", "training", "evaluation"
TITLES = {"web": "Web text and questions", "world": "The made-up world of quickstart"}
MODELS = ("columnar", "control")
STAGES = ("pretrained", "finetuned")


@dataclass(frozen=True)
class Flags:
    web: str | None = flag(None, "documents for pretraining, a file; required", group=TRAIN)
    train: str | None = flag(None, "questions for finetuning, a file in SQuAD's format; required", group=TRAIN)
    eval: str | None = flag(None, "questions of the evaluation, a file in SQuAD's format; required", group=EVAL)
    output_dir: str = flag("./results", "where data, models and evaluations go")
    page: str = flag("./results.md", "the page to write")
    vocabulary: int = flag(8192, "tokens of the tokenizer", group=MODEL, minimum=300)
    hidden_size: int = flag(192, "width; the MLP has three times as much", group=MODEL, minimum=64)
    layers: int = flag(4, "layers", group=MODEL, minimum=1)
    pretrain_steps: int = flag(400, "optimiser steps of pretraining, 2,048 tokens each", group=TRAIN, minimum=1)
    finetune_steps: int = flag(500, "optimiser steps of finetuning, 2,048 tokens each", group=TRAIN, minimum=1)
    learning_rate: float = flag(2e-3, "peak learning rate of both stages", group=TRAIN, minimum=0)
    max_eval_samples: int = flag(100000, "contexts of --eval", group=EVAL, minimum=1)
    timed_samples: int = flag(16, "contexts on which all rows are timed", group=EVAL, minimum=1)
    max_new_tokens: int = flag(12, "tokens an answer, at most", group=EVAL, minimum=1)


@contextmanager
def stage(out: Path, name: str) -> Generator[None]:
    """Adds the seconds that `name` takes to stages.json, over all runs of this command."""
    path, began = out / "stages.json", time.monotonic()
    print(f"== {name}", flush=True)
    try:
        yield
    finally:
        seconds = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        seconds[name] = seconds.get(name, 0) + time.monotonic() - began
        path.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


def fit(out: Path, name: str, flags: PretrainFlags | FinetuneFlags) -> None:
    """Pretraining or finetuning to its end. Exits when a signal stopped it."""
    from pd_jax.training import finetune, finished, pretrain

    if not finished(flags):
        with stage(out, name):
            pretrain(flags) if isinstance(flags, PretrainFlags) else finetune(flags)
    if not finished(flags):
        raise SystemExit(1)


def ordinary(flags: Any, **places: str) -> Any:
    """The same run as `flags`, but every branch is a sequence of its own, trained in the ordinary way."""
    return dataclasses.replace(
        flags, pair_indices=(), sibling_bias=False, visibility="isolated", align="ragged", **places
    )


def make_start(flags: Flags, out: Path) -> Path:
    """config.json and the tokenizer, learned from the web text."""
    from pd_jax.config import ModelConfig
    from pd_jax.data.fineweb import load_documents
    from pd_jax.data.synthetic import train_tokenizer
    from pd_jax.files import write_untrained

    start = out / "start"
    if (start / "config.json").is_file():
        return start
    with stage(out, "tokenizer"):
        tokenizer = train_tokenizer(
            (row["text"] for row in load_documents(str(flags.web)) if row["text"]), flags.vocabulary
        )
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=flags.hidden_size,
        intermediate_size=3 * flags.hidden_size,
        num_hidden_layers=flags.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    write_untrained(start, config, tokenizer)
    return start


def web_stages(flags: Flags, start: Path) -> tuple[PretrainFlags, FinetuneFlags]:
    """Without their places, see `make_pair`."""
    return (
        PretrainFlags(
            model_name=str(start),
            random_init=True,
            sibling_bias=True,
            dataset_name=str(flags.web),
            branch_count=8,
            seq_length=128,
            batch_size=2,
            learning_rate=flags.learning_rate,
            max_steps=flags.pretrain_steps,
            save_steps=100,
        ),
        FinetuneFlags(
            dataset_name=str(flags.train),
            max_branches=6,
            max_length=512,
            batch_size=4,
            learning_rate=flags.learning_rate,
            epochs=100,
            max_steps=flags.finetune_steps,
            save_steps=100,
        ),
    )


def compare(out: Path, columnar: Path, control: Path, data: str, flags: Flags) -> dict[str, Results]:
    """Evaluations: `quality` of our rows on all of `data`, `speed` of all rows on its first contexts."""
    from pd_jax.evaluation import evaluate

    exported = out / "control-hf"
    if not exported.is_dir():
        convert = [str(SCRIPTS.parent / "convert" / "flax_to_hf.py"), "--checkpoint", str(control)]
        subprocess.run([sys.executable, *convert, "--output", str(exported)], check=True)
    quality = EvaluateFlags(
        ft_model=str(columnar),
        sequential_model=str(control),
        rows=(f"isolated={control}", "isolated", "prompts", "columns"),
        dataset_name=data,
        max_branches=100,
        min_questions=1,
        max_eval_samples=flags.max_eval_samples,
        max_new_tokens=flags.max_new_tokens,
        batch_size=8,
        repeats=0,
        output_dir=str(out / "quality"),
    )
    speed = dataclasses.replace(
        quality,
        base_model=str(exported),
        rows=(),
        max_eval_samples=flags.timed_samples,
        batch_size=1,
        repeats=3,
        output_dir=str(out / "speed"),
    )
    results = {}
    for name, asked in {"quality": quality, "speed": speed}.items():
        with stage(out.parent, f"{out.name}, {name}"):
            results[name] = evaluate(asked)
    return results


# The page -------------------------------------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def trained(directory: Path) -> list[str]:
    """Parameters, steps, tokens and loss of a run: what config.json and metrics.jsonl say."""
    import numpy as np

    from pd_jax.files import load_config
    from pd_jax.params import parameter_count

    size = parameter_count(load_config(directory))
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = np.diff([0, *(m["step"] for m in logged)])
    tokens = sum(steps * [m["tokens_per_second"] * m["seconds_per_step"] for m in logged])
    loss = np.mean([m["loss"] for m in logged[-max(1, len(logged) // 10) :]])
    return [f"{size / 1e6:.2f} M", f"{logged[-1]['step']:,}", f"{tokens / 1e6:.2f} M", f"{loss:.3f}"]


def processor() -> str:
    """What Linux calls the CPU."""
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_page(flags: Flags, out: Path, evaluations: dict[str, dict[str, Results]]) -> None:
    """Aggregates only: no question, no answer."""
    from pd_jax.evaluation import FOOTNOTE, tables

    machine = next(iter(evaluations.values()))["speed"]["machine"]
    sizes = [field for field in dataclasses.fields(flags) if field.type in (int, float)]
    values = {field.name: getattr(flags, field.name) for field in sizes if getattr(flags, field.name) != field.default}
    changed = "".join(f" --{name.replace('_', '-')} {value}" for name, value in values.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    seconds = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    parts = [
        "# Results",
        f"Written by `python scripts/results.py --web FILE --train FILE --eval FILE{changed}`. **These are not Qwen3's "
        "weights**: the models are small and were trained for minutes, so on real questions exact match is near 0 "
        "whoever answers. What can be read is the difference between columns and ordinary training of the same size "
        "on the same data, its interval, and what each way of answering costs.",
        f"Machine: {processor()}, {machine['cpus']} of {os.cpu_count()} cores, float32, load {os.getloadavg()[1]:.1f} "
        f"in the run's last five minutes. {versions}.",
        "The control has the same start, rows, steps and tokens as the columnar model, but was trained on ordinary "
        "sequences (no branch pairs, siblings hidden, nobody waits). `isolated=control` is its ordinary decoding, "
        "token for token that of one question at a time, which the speed tables show as `sequential`; the hf rows are "
        "the control in transformers. `isolated`, `prompts` and `columns` are the columnar model. Answers have at most "
        f"{flags.max_new_tokens} tokens, greedily. Numbers and indices of branches with fewer than 10 contexts are "
        "left out; `report.html` of each evaluation has them.",
    ]
    for world, results in evaluations.items():
        lines = [
            [model, stage, *trained(out / world / model / stage), f"{seconds[f'{world}, {model} {stage}']:.0f}"]
            for stage in STAGES
            for model in MODELS
        ]
        parts += [
            f"## {TITLES[world]}",
            table(["model", "stage", "parameters", "steps", "tokens", "loss, last tenth", "seconds"], lines),
        ]
        quality, speed = tables(results["quality"]["summary"]), tables(results["speed"]["summary"])
        for title, header, rows in quality:
            if title.startswith(("EM", "F1")):
                rows = [line for line in rows if "[" in line[2]]  # others are in the report
            text = f"### {title}\n\n{table(header, rows)}"
            parts.append(text.replace(str(out / world / MODELS[1] / STAGES[1]), MODELS[1]))
        took = ", ".join(f"{name} {seconds[f'{world}, {name}']:.0f} s" for name in results)
        timed = results["speed"]["summary"]
        parts += [
            f"### Speed: the first {timed['contexts']} contexts ({timed['questions']} questions), one at a time",
            table(*speed[2][1:]),
            f"The median of {results['speed']['flags']['repeats']} runs. The evaluations took: {took}.",
        ]
    page = Path(flags.page)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part.rstrip("\n") for part in [*parts, FOOTNOTE]) + "\n", encoding="utf-8")


# The runs -------------------------------------------------------------------------------------------------------------


def make_pair(out: Path, world: str, stages: tuple[PretrainFlags, FinetuneFlags]) -> tuple[Path, Path]:
    """The columnar model of `stages`, and its control."""
    for model in MODELS:
        for name, flags in zip(STAGES, stages, strict=True):
            place, before = (str(out / world / model / stage) for stage in (name, STAGES[0]))
            places = {"output_dir": place} | ({"model_name": before} if name == STAGES[1] else {})
            wanted = dataclasses.replace(flags, **places) if model == "columnar" else ordinary(flags, **places)
            fit(out, f"{world}, {model} {name}", wanted)
    columnar, control = (out / world / model / STAGES[1] for model in MODELS)
    return columnar, control


def web(flags: Flags, out: Path) -> dict[str, Results]:
    pair = make_pair(out, "web", web_stages(flags, make_start(flags, out)))
    return compare(out / "web", *pair, str(flags.eval), flags)


def world(flags: Flags, out: Path) -> dict[str, Results]:
    import quickstart
    from pd_jax.data.synthetic import write_squad

    here, test = out / "world", out / "world" / "test.json"
    quickstart.make_world(here)
    if not test.is_file():
        write_squad(test, 400, held_out=True, seed=1)
    pair = make_pair(out, "world", quickstart.stages(here))
    return compare(here, *pair, str(test), flags)


def main() -> None:
    flags = parse(Flags, description=__doc__)
    missing = [f"--{name}" for name in ("web", "train", "eval") if not Path(getattr(flags, name) or "").is_file()]
    if missing:
        raise InputError(f"{' and '.join(missing)} must name a file, see --help")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = Path(flags.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_page(flags, out, {"web": web(flags, out), "world": world(flags, out)})
    print(f"written: {flags.page}")


if __name__ == "__main__":
    run(main)
