"""Everything once, small, on the CPU and without network: a made-up world, a base model, columns, and the comparison.

    python scripts/quickstart.py

A world of facts is written as web documents and as questions in SQuAD's format. The base is a Qwen3 of 0.7 M parameters
that has learnt that world as an ordinary language model (scripts/quickstart-base, made by scripts/make_base.py). Then
run what the scripts run: columnar pretraining, finetuning, and the evaluation of the base in transformers, question by
question, against all questions of a context in parallel, about people that training never saw. Run again, it goes on
where it was stopped.
"""  # fmt: skip

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError
from pd_jax.evaluation import EvaluateFlags, Results
from pd_jax.training import FinetuneFlags, PretrainFlags

BASE = Path(__file__).parent / "quickstart-base"
DOCUMENT = 152  # tokens; one document in a hundred is longer
TITLES = {"hf-sequential": "base, transformers, one by one", "columns": "finetuned, all in parallel"}


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag("./quickstart", "where data, models, results and pictures go")


def stages(out: Path) -> tuple[PretrainFlags, FinetuneFlags]:
    """Columnar pretraining and finetuning of the base on the world."""
    return (
        PretrainFlags(
            model_name=str(BASE),
            output_dir=str(out / "pretrained"),
            dataset_name=str(out / "world" / "documents.jsonl"),
            sibling_bias=True,
            branch_count=4,
            seq_length=DOCUMENT,
            batch_size=2,
            learning_rate=1e-3,
            max_steps=100,
        ),
        FinetuneFlags(
            model_name=str(out / "pretrained"),
            output_dir=str(out / "finetuned"),
            dataset_name=str(out / "world" / "train.json"),
            max_branches=4,
            max_length=192,
            batch_size=12,
            learning_rate=1.5e-3,
            max_steps=300,
        ),
    )


def make_world(out: Path) -> None:
    from pd_jax.data.synthetic import write_world

    if not (out / "world" / "dev.json").is_file():
        write_world(out / "world", documents=2000, train=7500, dev=48)


def train(out: Path) -> None:
    """The world, columnar pretraining and finetuning."""
    from pd_jax.training import finetune, pretrain

    make_world(out)
    pretraining, finetuning = stages(out)
    pretrain(pretraining)
    finetune(finetuning)


def compare(out: Path) -> Results:
    """The base in transformers against the finetuned model in columns, on the world's held-out people."""
    from pd_jax.evaluation import evaluate

    return evaluate(
        EvaluateFlags(
            base_model=str(BASE),
            ft_model=str(out / "finetuned"),
            rows=tuple(TITLES),
            dataset_name=str(out / "world" / "dev.json"),
            max_branches=4,
            max_new_tokens=12,
            batch_size=32,
            output_dir=str(out / "evaluation"),
        )
    )


def draw(out: Path) -> list[Path]:
    """loss.png, and layout.png and mask.png of an English context (matplotlib's own font has no Chinese), the one
    whose answers differ most in length."""
    from pd_jax.data import squad
    from pd_jax.evaluation import draw_layout, draw_losses, draw_mask
    from pd_jax.files import load_tokenizer
    from pd_jax.layout import build_layout

    tokenizer = load_tokenizer(BASE)
    contexts = [c for c in squad.load_squad(str(out / "world" / "dev.json")) if c.text.isascii()]
    samples = [squad.to_tokens(context, tokenizer, tokenizer.eos_token_id) for context in contexts]
    layout = build_layout([[max(samples, key=lambda s: len({len(branch.answer) for branch in s.branches}))]])
    loss, places, mask = pictures = [out / f"{name}.png" for name in ("loss", "layout", "mask")]
    draw_losses({name: out / name / "metrics.jsonl" for name in ("pretrained", "finetuned")}, loss)
    draw_layout(layout, [tokenizer.decode([int(token)]) for token in layout.tokens[0]], places)
    draw_mask(layout, mask)
    return pictures


def report(results: Results, pictures: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, summary = Console(soft_wrap=True), results["summary"]
    table = Table(title="The same questions about people never seen", title_justify="left")
    for name in ("", "EM", "F1", "questions", "seconds", "forwards"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in summary["rows"].items():
        quality = [f"{row[key]['value'] / 100:.3f}" for key in ("em", "f1")]
        cost = row["cost"]
        seconds, forwards = ((cost[key] or 0) * summary["contexts"] for key in ("seconds", "forwards"))
        table.add_row(TITLES[name], *quality, str(summary["questions"]), f"{seconds:.1f}", f"{forwards:.0f}")
    console.print(table)
    for note in results["notes"]:
        console.print(f"note: {note}")
    console.print(f"pictures: {', '.join(map(str, pictures))}")


def main() -> None:
    flags, began = parse(Flags, description=__doc__), time.monotonic()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the same result on every machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = Path(flags.output_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--output-dir {out} is a file; choose a directory")
    if not (BASE / "config.json").is_file():
        raise InputError(f"{BASE} is missing; check it out again, or run scripts/make_base.py")
    train(out)
    results = compare(out)
    report(results, draw(out))
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run(main)
