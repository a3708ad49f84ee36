"""Everything once, small, on the CPU and without network: a made-up world, a base model, columns, and the comparison.

    python scripts/quickstart.py

A world of facts is written as web documents and as questions in SQuAD's format. The base is a Qwen3 of 0.7 M parameters
that has learnt that world as an ordinary language model (scripts/quickstart-base, made by scripts/make_base.py). Then
run what the scripts run: columnar pretraining, finetuning, and the evaluation of the base in transformers, question by
question, against all questions of a context in parallel, about people that training never saw. Half of the contexts put
the facts into notes, one a question, and every question asks for a sibling's note: no branch can answer without
looking. Run again, it goes on where it was stopped.
"""  # fmt: skip

import json
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
SIGHT = {"isolated": "hidden", "prompts": "seen in their prompts", "columns": "seen"}


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
            eval_dataset_name=str(out / "world" / "dev-notes.json"),  # for the share of attention on siblings
            max_branches=4,
            max_length=192,
            batch_size=12,
            learning_rate=2e-3,
            epochs=2,
            max_steps=420,
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


def compare(out: Path) -> dict[str, Results]:
    """By kind of question, the finetuned model in three visibilities, and for the first kind the base in transformers;
    about the world's held-out people."""
    from pd_jax.evaluation import evaluate

    kinds = {"context": ("dev.json", ("hf-sequential", *SIGHT)), "notes": ("dev-notes.json", SIGHT)}
    return {
        kind: evaluate(
            EvaluateFlags(
                base_model=str(BASE),
                ft_model=str(out / "finetuned"),
                rows=tuple(rows),
                dataset_name=str(out / "world" / name),
                max_branches=4,
                max_new_tokens=12,
                batch_size=32,
                output_dir=str(out / ("evaluation" if kind == "context" else f"evaluation-{kind}")),
            )
        )
        for kind, (name, rows) in kinds.items()
    }


def door(out: Path) -> str:
    """What training's last line of metrics says about looking at siblings."""
    last = json.loads((out / "finetuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return (
        f"sibling_bias {last['sibling_bias_min']:.2f} .. {last['sibling_bias_max']:.2f} (it began at -2), "
        f"{last['sibling_attention']:.1%} of attention on siblings where the facts are in their notes"
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


def report(results: dict[str, Results], pictures: list[Path], door: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from pd_jax.data.synthetic import best_guess

    console, summary = Console(soft_wrap=True), results["context"]["summary"]
    table = Table(title="The same questions about people never seen", title_justify="left")
    for name in ("", "EM", "F1", "questions", "seconds", "forwards"):
        table.add_column(name, justify="right" if name else "left")
    for name, title in TITLES.items():
        if name in summary["rows"]:
            row = summary["rows"][name]
            quality = [f"{row[key]['value'] / 100:.3f}" for key in ("em", "f1")]
            cost = row["cost"]
            seconds, forwards = ((cost[key] or 0) * summary["contexts"] for key in ("seconds", "forwards"))
            table.add_row(title, *quality, str(summary["questions"]), f"{seconds:.1f}", f"{forwards:.0f}")
    console.print(table)

    table = Table(title="What looking at siblings is worth: EM, and the best that can be reached", title_justify="left")
    for name in ("siblings are", "facts in the context", "best", "facts in siblings' notes", "best"):
        table.add_column(name, justify="left" if name == "siblings are" else "right")
    for name, title in SIGHT.items():
        em = [f"{results[kind]['summary']['rows'][name]['em']['value'] / 100:.3f}" for kind in ("context", "notes")]
        table.add_row(title, em[0], "1.000", em[1], f"{best_guess() if name == 'isolated' else 1.0:.3f}")
    console.print(table)
    console.print(f"the door: {door}")
    for note in results["context"]["notes"]:
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
    report(results, draw(out), door(out))
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run(main)
