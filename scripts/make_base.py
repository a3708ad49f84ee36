"""Train the quickstart's base model anew: a small Qwen3, an ordinary language model of the made-up world.

    python scripts/make_base.py

A quarter of an hour on 2 cores. The result replaces scripts/quickstart-base.
"""  # fmt: skip

import os
from dataclasses import dataclass
from pathlib import Path

from pd_jax.cli import flag, parse, run
from pd_jax.training import PretrainFlags

BASE = Path(__file__).parent / "quickstart-base"


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag("./quickstart-base-run", "where the run's state goes; run again, it resumes there")


def make_base(out: Path) -> None:
    """Train the base from random weights: with one branch and no branch pairs, an ordinary language model."""
    import jax.numpy as jnp

    from pd_jax.config import ModelConfig
    from pd_jax.data.synthetic import train_tokenizer, write_documents
    from pd_jax.files import (
        load_config,
        load_params,
        read_config_json,
        staging,
        write_metadata,
        write_params,
        write_untrained,
    )
    from pd_jax.training import pretrain

    start, trained, documents = out / "start", out / "language-model", out / "documents.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
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
    write_untrained(start, config, tokenizer)
    write_documents(documents, 16000)
    pretrain(
        PretrainFlags(
            model_name=str(start),
            random_init=True,
            pair_indices=(),
            output_dir=str(trained),
            dataset_name=str(documents),
            branch_count=1,
            seq_length=152,  # a longer document is cut; one in a hundred is
            batch_size=8,
            learning_rate=2e-3,
            max_steps=2000,
            save_steps=250,
            logging_steps=50,
        )
    )
    config = load_config(trained)
    params = load_params(trained, config, jnp.bfloat16)
    with staging(BASE) as stage:
        write_params(stage, params, config)
        write_metadata(stage, read_config_json(start), start, params["embed"].dtype)


def main() -> None:
    flags = parse(Flags, description=__doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    make_base(Path(flags.output_dir))


if __name__ == "__main__":
    run(main)
