"""Small random models, three contexts, a finished evaluation of them, and the script as a user runs it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import pytest
import tiny

from pd_jax.evaluation import EvaluateFlags, Results, evaluate
from pd_jax.files import load_config, save_model, write_params
from pd_jax.params import init_params


@pytest.fixture
def script(command) -> Callable[..., int]:
    """scripts/evaluate.py with some arguments; its exit code."""
    return partial(command, "evaluate")


@pytest.fixture(scope="session")
def eos_ids() -> tuple[int, ...]:
    """A fifth of the vocabulary ends an answer."""
    return tuple(range(256, 320))


@pytest.fixture(scope="session")
def models(tmp_path_factory, eos_ids) -> Path:
    """One random model twice: `flax` (orbax) and `hf` (safetensors); a fifth of the vocabulary ends an answer."""
    root = tmp_path_factory.mktemp("models")
    source = tiny.model_directory(root / "hf", pair_indices=(), tie_word_embeddings=False, num_hidden_layers=1)
    eos = {"eos_token_id": list(eos_ids), "do_sample": True, "temperature": 2.0}
    (source / "generation_config.json").write_text(json.dumps(eos))
    config = load_config(source)
    params = init_params(config, jax.random.key(1))
    save_model(root / "flax", params, config, source)
    write_params(source, params, config)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Three contexts of one size (one shape to compile), two questions each; a fourth has one only."""
    paragraphs = [
        {
            "context": f"{name}: red.",
            "qas": [
                {"id": f"{name}{i}", "question": text, "answers": [{"text": "red", "answer_start": 5}]}
                for i, text in enumerate(texts)
            ],
        }
        for name, texts in {"A": ["Is?", "What?"], "B": ["How so?", "Why?"], "C": ["Who?", "It?"], "D": ["No"]}.items()
    ]
    path = tmp_path_factory.mktemp("data") / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "letters", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="session")
def finished(models, data, tmp_path_factory) -> tuple[EvaluateFlags, Results]:
    output = tmp_path_factory.mktemp("finished")
    flags = EvaluateFlags(
        ft_model=str(models / "flax"),
        dataset_name=str(data),
        rows=("sequential", "isolated", "columns"),
        max_new_tokens=6,
        output_dir=str(output),
        dump_file=str(output / "dump.json"),
        against="isolated",
    )
    return flags, evaluate(flags)
