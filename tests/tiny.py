"""A tokenizer and model directories small enough for every test."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pd_jax.config import ModelConfig
from pd_jax.files import config_to_hf

TEXTS = [
    "Context: The tower is red and the river is long. Question: What colour is the tower? Answer: red",
    "Once there was a small town by the sea, where every house was painted in another colour.",
    "背景：塔是红色的，河很长。问题：塔是什么颜色？答案：红色",
]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens that reads and writes any text."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=318, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config(**changes) -> ModelConfig:
    fields = {
        "vocab_size": 336,  # more rows than the tokenizer has tokens, as in Qwen3
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "pair_indices": (2, 4, 6),
    }
    return ModelConfig(**fields | changes)


def model_directory(directory: Path, **changes) -> Path:
    """config.json and a tokenizer, for --random-init."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config(**changes))))
    tokenizer().save_pretrained(directory)
    return directory


def documents(path: Path, count: int = 40) -> Path:
    """Web text in FineWeb's format."""
    rows = [{"text": f"{i} {TEXTS[i % 3]} " * (1 + i % 4)} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def squad(path: Path, count: int = 12) -> Path:
    """Contexts with 1 to 4 questions in SQuAD's official format."""
    paragraphs = []
    for i in range(count):
        facts = [(f"tower {i}{j}", "red" if (i + j) % 2 else "light blue") for j in range(1 + i % 4)]
        context = " ".join(f"The {name} is {colour}." for name, colour in facts)
        qas = [
            {
                "id": f"{i}-{j}",
                "question": f"What colour is the {name}?",
                "answers": [{"text": colour, "answer_start": context.index(f"{name} is {colour}") + len(name) + 4}],
            }
            for j, (name, colour) in enumerate(facts)
        ]
        paragraphs.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "towers", "paragraphs": paragraphs}]}))
    return path
