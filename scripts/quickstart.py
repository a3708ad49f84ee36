"""Everything once, small, on the CPU and without network: a made-up world, a base model, columns, and the comparison.

    python scripts/quickstart.py

A world of facts is written as web documents and as questions in SQuAD's format. The base is a Qwen3 of 0.7 M parameters
that has learnt that world as an ordinary language model (scripts/quickstart-base; `--make-base` trains it anew). Then
run what the scripts run: columnar pretraining, finetuning, and the evaluation of the base in transformers, question by
question, against all questions of a context in parallel, about people that training never saw. Run again, it goes on
where it was stopped.
"""  # fmt: skip

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_jax.cli import flag, parse, run
from pd_jax.flags import EvaluateFlags, FinetuneFlags, PretrainFlags

BASE = Path(__file__).parent / "quickstart-base"
DOCUMENT = 152  # tokens; one document in ten is longer and loses its last question
TITLES = {"hf-sequential": "base, transformers, one by one", "columns": "finetuned, all in parallel"}


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag("./quickstart", "where data, models, results and pictures go")
    make_base: bool = flag(False, f"only train the base and write it to scripts/{BASE.name} (half an hour on 2 cores)")


def make_base(out: Path) -> None:
    """Train the base from random weights: with one branch and no branch pairs, an ordinary language model."""
    import jax.numpy as jnp

    from pd_jax.checkpoint import load_config, load_params, staging, write_metadata
    from pd_jax.config import SECTION, ModelConfig, read_config_json
    from pd_jax.data.synthetic import train_tokenizer, write_documents
    from pd_jax.train import pretrain
    from pd_jax.weights import write_params

    start, trained, documents = out / "start", out / "language-model", out / "documents.jsonl"
    start.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(start)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    plain = {key: value for key, value in config.to_hf().items() if key != SECTION}
    for name, content in (("generation_config.json", special), ("config.json", plain | special | {"dtype": "float32"})):
        (start / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_documents(documents, 24000)
    pretrain(
        PretrainFlags(
            model_name=str(start),
            random_init=True,
            pair_indices=(),
            output_dir=str(trained),
            dataset_name=str(documents),
            branch_count=1,
            seq_length=DOCUMENT,
            batch_size=8,
            learning_rate=2e-3,
            max_steps=3000,
            save_steps=250,
            logging_steps=50,
        )
    )
    config = load_config(trained)
    params = load_params(trained, config, jnp.bfloat16)
    with staging(BASE) as stage:
        write_params(stage, params, config)
        write_metadata(stage, read_config_json(start), start, params["embed"].dtype)


def train(out: Path) -> None:
    """The world, columnar pretraining and finetuning."""
    from pd_jax.data.synthetic import write_world
    from pd_jax.train import finetune, pretrain

    world = out / "world"
    if not (world / "dev.json").is_file():
        write_world(world, documents=4000, train=8000, dev=64)
    pretrain(
        PretrainFlags(
            model_name=str(BASE),
            output_dir=str(out / "pretrained"),
            dataset_name=str(world / "documents.jsonl"),
            sibling_bias=True,
            branch_count=4,
            seq_length=DOCUMENT,
            batch_size=2,
            learning_rate=1e-3,
            max_steps=100,
        )
    )
    finetune(
        FinetuneFlags(
            model_name=str(out / "pretrained"),
            output_dir=str(out / "finetuned"),
            dataset_name=str(world / "train.json"),
            max_branches=4,
            max_length=192,
            batch_size=12,
            learning_rate=1e-3,
            max_steps=300,
        )
    )


def compare(out: Path) -> dict[str, Any]:
    """The base in transformers against the finetuned model in columns, on the world's held-out people."""
    from pd_jax.evaluate import evaluate

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
    """loss.png, and layout.png and mask.png of an English context (matplotlib's own font has no Chinese)."""
    from pd_jax.checkpoint import load_tokenizer
    from pd_jax.data import squad
    from pd_jax.layout import build_layout
    from pd_jax.pictures import draw_layout, draw_losses, draw_mask

    tokenizer = load_tokenizer(BASE)
    context = next(c for c in squad.load_squad(str(out / "world" / "dev.json")) if c.text.isascii())
    layout = build_layout([[squad.to_tokens(context, tokenizer, tokenizer.eos_token_id)]])
    loss, places, mask = pictures = [out / f"{name}.png" for name in ("loss", "layout", "mask")]
    draw_losses({name: out / name / "metrics.jsonl" for name in ("pretrained", "finetuned")}, loss)
    draw_layout(layout, [tokenizer.decode([int(token)]) for token in layout.tokens[0]], places)
    draw_mask(layout, mask)
    return pictures


def report(results: dict[str, Any], pictures: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, summary = Console(soft_wrap=True), results["summary"]
    table = Table(title="The same questions about people never seen", title_justify="left")
    for name in ("", "EM", "F1", "questions", "seconds", "forwards"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in summary["rows"].items():
        quality = [f"{row[key]['value'] / 100:.3f}" for key in ("em", "f1")]
        seconds, forwards = (row["cost"][key] * summary["contexts"] for key in ("seconds", "forwards"))
        table.add_row(TITLES[name], *quality, str(summary["questions"]), f"{seconds:.1f}", f"{forwards:.0f}")
    console.print(table)
    for note in results["notes"]:
        console.print(f"note: {note}")
    console.print(f"pictures: {', '.join(map(str, pictures))}")


def main() -> None:
    flags, began = parse(Flags, description=__doc__), time.monotonic()
    out = Path(flags.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output-dir {out} is a file; choose a directory")
    if flags.make_base:
        make_base(out)
        return
    if not (BASE / "config.json").is_file():
        raise ValueError(f"{BASE} is missing; check it out again, or train it with --make-base")
    train(out)
    results = compare(out)
    report(results, draw(out))
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run(main)
