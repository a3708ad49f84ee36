"""Samples of every kind through layout, decoding and evaluation: one clear line, or the right thing.

    python tests/faults/test_d2_samples.py --count 20000

draws so many samples for layouts, a tenth of them for decoding and a fiftieth for an evaluation, and prints what became
of them. The suite draws the first 100.
"""  # fmt: skip

import argparse
import collections
import json
import math
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ

import jax
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from pd_jax import Branch, ParallelDecoder, Sample, TokenSample
from pd_jax.config import VISIBILITIES, Align
from pd_jax.data.text import tokenise
from pd_jax.errors import InputError
from pd_jax.evaluation import EvaluateFlags, evaluate
from pd_jax.files import write_params
from pd_jax.layout import build_layout
from pd_jax.params import init_params

COUNT = 100  # of the fast suite
ODD = (
    "", " ", "\n", "\0", "\x07\x1b[2J", "\u202eمرحبا", "שלום", "🧑\u200d🚀", "e\u0301\u0327", "\ufeff", "\ud800",
    "<|im_end|>", "{}", "</script>", "背景", "a" * 2_000, "\u2028", "%s%n", "𝕏",
)  # fmt: skip
CONFIG = tiny.config(num_hidden_layers=1, sibling_bias=True, tie_word_embeddings=False)
KNOWN = len(tiny.tokenizer())
NEW = 4  # tokens of an answer
BOTH = ("isolated", "columns")  # rows of an evaluation

odd = st.sampled_from(ODD) | st.text(max_size=6)
texts = st.builds(lambda parts: "".join(parts), st.lists(odd, max_size=3))
asked = st.tuples(texts, st.lists(texts, max_size=4) | st.lists(texts, max_size=64))
ids = st.lists(st.integers(0, KNOWN - 1), max_size=5)


def small(counts: list[int], visibilities: list) -> st.SearchStrategy[TokenSample]:
    """Samples of at most 32 tokens: one size of rows to compile."""
    branch = st.builds(Branch, ids.filter(len))
    branches = st.sampled_from(counts).flatmap(lambda n: st.lists(branch, min_size=n, max_size=n))
    return st.builds(TokenSample, ids, branches, st.sampled_from(visibilities))


@cache
def decoder(align: str = "left") -> ParallelDecoder:
    params = init_params(CONFIG, jax.random.key(3))
    return ParallelDecoder(CONFIG, params, tiny.tokenizer(), (7, 9, 11), align=align)


def steps(count: int) -> settings:
    kept = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=kept,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# What must hold -------------------------------------------------------------------------------------------------------


def check_layout(background: str, prompts: list[str]) -> str:
    """Every branch's tokens are those of its text alone, in the columns of its own; or one line says what is wrong."""
    try:
        layout = decoder().layout([Sample(background, prompts)])
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    texts = [background, *prompts]
    bad = not prompts or not all(text.strip() for text in prompts)
    bad = bad or any("\ud800" <= c <= "\udfff" for c in "".join(texts)) or not all(tokenise(tiny.tokenizer(), prompts))
    assert bad == (refusal is not None), refusal
    if refusal is not None:
        assert refusal.strip()
        assert "\n" not in refusal
        return "refused"
    for number, text in enumerate([background, *prompts]):
        own = layout.branch[0] == number
        assert layout.tokens[0][own].tolist() == tokenise(tiny.tokenizer(), text)
        assert (np.diff(layout.column[0][own]) == 1).all()
    places = list(zip(layout.branch[0].tolist(), layout.column[0].tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert places == sorted(places, key=lambda place: place[::-1])
    assert layout.valid.all()
    return "taken"


def answers(samples: list[TokenSample], align: str) -> list[list[tuple[tuple[int, ...], str]]]:
    results = decoder(align).generate(samples, max_new_tokens=NEW)
    return [[(tuple(b.token_ids), b.finish_reason) for b in result.branches] for result in results]


def check_greedy(samples: list[TokenSample], align: str) -> None:
    """The same tokens alone, in a batch of four, in another order, and as the likeliest of one packed row."""
    alone = [answers([sample], align)[0] for sample in samples]
    batch = [samples[i % len(samples)] for i in range(4)]
    assert answers(batch, align) == [alone[i % len(samples)] for i in range(4)]
    assert answers(batch[::-1], align) == [alone[i % len(samples)] for i in range(4)][::-1]
    if align == "ragged" and any((s.visibility or "columns") == "columns" and len(s.branches) > 1 for s in samples):
        return  # there a prompt may wait for its siblings' answers: no layout of a finished sample says that
    said = [
        TokenSample(
            s.background,
            [Branch(b.prompt, list(ids)) for b, (ids, _) in zip(s.branches, said, strict=True)],
            s.visibility,
        )
        for s, said in zip(samples, alone, strict=True)
    ]
    layout = build_layout([said], 192, align)
    likeliest = decoder(align).logits(layout)[0, :, :KNOWN].argmax(-1)
    for number, (sample, told) in enumerate(zip(said, alone, strict=True)):
        for b, (branch, (ids, reason)) in enumerate(zip(sample.branches, told, strict=True), start=1):
            own = np.flatnonzero((layout.segment[0] == number) & (layout.branch[0] == b))
            chosen = likeliest[own][len(branch.prompt) - 1 :]
            assert tuple(chosen[: len(ids)].tolist()) == ids
            assert reason == ("eos" if len(ids) < NEW else reason)
            assert reason == "length" or chosen[len(ids)] in (7, 9, 11)


def check_evaluation(folder: Path, contexts: list[tuple[str, list[str]]], rows: tuple[str, ...]) -> str:
    """Odd texts as contexts and questions: refused in one line, or the answers are those of decoding them alone."""
    paragraphs = []
    for c, (text, asked) in enumerate(contexts):
        qas = [{"id": f"{c}-{q}", "question": asks, "answers": [{"text": asks}]} for q, asks in enumerate(asked)]
        paragraphs.append({"context": text, "qas": qas})
    (folder / "squad.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    flags = EvaluateFlags(
        ft_model=str(model(folder)),
        dataset_name=str(folder / "squad.json"),
        output_dir=str(folder / "out"),
        rows=rows,
        min_questions=1,
        max_branches=64,
        first_samples=True,
        repeats=0,
        max_new_tokens=NEW,
    )
    try:
        results = evaluate(flags)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.strip()
        assert "\n" not in refusal
        assert not (folder / "out").exists()
        return "refused"
    for row in results["rows"].values():
        assert [len(record["answers"]) for record in row] == [len(c["questions"]) for c in results["contexts"]]
    for summary in results["summary"]["rows"].values():
        assert all(0 <= summary[key]["value"] <= 100 and math.isfinite(summary[key]["value"]) for key in ("em", "f1"))
    assert "<script>alert" not in (folder / "out" / "report.html").read_text()
    return "taken"


def model(folder: Path) -> Path:
    if not (folder / "model").exists():
        tiny.model_directory(folder / "model", num_hidden_layers=1, tie_word_embeddings=False)
        config = tiny.config(num_hidden_layers=1, tie_word_embeddings=False)
        write_params(folder / "model", init_params(config, jax.random.key(3)), config)
    return folder / "model"


# The suite's part and the long one ------------------------------------------------------------------------------------


def layouts(count: int) -> collections.Counter:
    became: collections.Counter = collections.Counter()

    @steps(count)
    @given(asked)
    def each(sample):
        became[check_layout(*sample)] += 1

    each()
    return became


def greedy(count: int, samples: st.SearchStrategy[TokenSample], aligns: list[str]) -> int:
    """How many samples were decoded in `count` batches."""
    seen = []

    @steps(count)
    @given(st.lists(samples, min_size=1, max_size=3), st.sampled_from(aligns))
    def each(samples, align):
        check_greedy(samples, align)
        seen.append(len(samples))

    each()
    return sum(seen)


EVERYTHING = small([1, 2, 3, 4], [None, *VISIBILITIES]), list(get_args(Align))


def test_layouts():
    became = layouts(COUNT)
    assert became["taken"] > COUNT // 10
    assert became["refused"] > COUNT // 10


def test_64_branches_and_a_long_text():
    assert check_layout("a" * 100_000, [f"{text} {i}" for i, text in enumerate(["x", "🧑\u200d🚀"] * 32)]) == "taken"


def test_greedy_tokens_alone_in_a_batch_and_packed():
    assert greedy(COUNT // 10, small([4], [None]), ["left"]) >= COUNT // 10


@pytest.mark.slow
def test_greedy_tokens_in_every_alignment_and_visibility():
    assert greedy(COUNT, *EVERYTHING) >= COUNT


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        (["\0", "🧑\u200d🚀", "</script><script>alert(1)</script>"], ("isolated",)),
        pytest.param([t for t in ODD if t.strip() and t.isprintable() | len(t) < 9], BOTH, marks=pytest.mark.slow),
    ],
)
def test_evaluation(tmp_path, texts, rows):
    texts = [text for text in texts if text != "\ud800"]
    assert check_evaluation(tmp_path, [(f"{text} is", [text]) for text in texts], rows) == "taken"
    (tmp_path / "bad").mkdir()
    assert check_evaluation(tmp_path / "bad", [("\ud800", ["a"])], rows) == "refused"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    count = parser.parse_args().count
    print(f"layouts: {dict(layouts(count))}")
    print(f"decoding: {greedy(max(1, count // 10), *EVERYTHING)} samples alone, in batches and packed: the same tokens")
    became = collections.Counter()

    @steps(max(1, count // 50))
    @given(st.lists(asked, min_size=1, max_size=3))
    def each(contexts):
        with tempfile.TemporaryDirectory() as folder:
            became[check_evaluation(Path(folder), contexts, BOTH)] += 1

    each()
    print(f"evaluations: {dict(became)}; other exceptions: 0")
