"""The benchmarks run, at sizes that say nothing, and report every contender that this machine has."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny

from pd_jax import Branch, ParallelDecoder, TokenSample
from pd_jax.benchmarks.decoding import answer
from pd_jax.benchmarks.timing import Contender, fastest
from pd_jax.params import init_params

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "benchmark.py")


def report(*arguments: str) -> str:
    """A process of its own: the script keeps itself to few cores."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_attention():
    shape = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--branches", "4"]
    text = report("attention", "--tokens", "96", *shape, "--repeat", "1", "--no-model")
    assert text.count("96 tokens, forward") == 2
    for name in ("causal", "dense", "chunked"):
        assert text.count(f"\n{name} ") == 2
    assert "skipped: attention backend 'splash' cannot run here: it needs a TPU" in text


def test_compiling_is_neither_timed_nor_charged_and_what_takes_too_long_is_not_called():
    calls = []

    def contender(name, *seconds, **about):
        pauses = iter(seconds)
        return Contender(lambda: calls.append(name) or time.sleep(next(pauses)), **about)

    contenders = {
        "compiles": contender("compiles", 0.4, 0.01, 0.01, compiles=True),
        "slow": contender("slow", 0.15, 0.15),
        "slower": contender("slower", like=("slow", 4.0)),
        "compiles slowly": contender("compiles slowly", like=("slower", 1.0), compiles=True),
    }
    timings = fastest(contenders, 2, cpu_time=False, patience=0.2)
    assert calls == ["compiles", "slow", "compiles", "compiles"]
    assert timings.keys() == {"compiles", "slow"}
    assert timings["compiles"].seconds < 0.1 < timings["slow"].seconds


def test_what_does_not_fit_into_memory_is_said_and_called_no_more(capsys):
    calls = []

    def starved():
        calls.append("starved")
        raise RuntimeError("RESOURCE_EXHAUSTED: no room\nfor it")

    assert fastest({"starved": Contender(starved), "fine": Contender(lambda: None)}, 2, cpu_time=False).keys() == {
        "fine"
    }
    assert calls == ["starved"]
    assert capsys.readouterr().out == "skipped: starved: RESOURCE_EXHAUSTED: no room\n"
    with pytest.raises(RuntimeError, match="another"):
        fastest({"broken": Contender(lambda: (_ for _ in ()).throw(RuntimeError("another")))}, 1, cpu_time=False)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--use-lora", "--remat", "full"]])
def test_train(lora):
    """The first step of all has the same loss, and every line has an MFU."""
    sizes = ["--branches", "2", "--seq-length", "8", "--batch-size", "1", "--repeat", "1"]
    text = report("train", *sizes, "--attention", "dense", "chunked", *lora)
    found = re.findall(r"loss of the first step: ([\d.]+) \((\w+)\)", text)
    losses = {name: float(loss) for loss, name in found}
    assert losses.keys() == {"transformers", "dense", "chunked"}
    assert max(losses.values()) - min(losses.values()) < 1e-4
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith((*losses,))}
    assert rows.keys() == losses.keys()
    assert all(float(row[2]) > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize(("visibility", "align"), [("columns", "left"), ("isolated", "ragged")])
def test_what_is_timed_of_decoding_is_what_generate_does(monkeypatch, visibility, align):
    config, decoded = tiny.config(), []
    kind = type(tiny.tokenizer())
    decode = kind.decode

    def spy(self, ids, **how):
        decoded.append((ids, how))
        return decode(self, ids, **how)

    monkeypatch.setattr(kind, "decode", spy)
    weights = init_params(config, jax.random.key(0))
    never = ()
    decoder = ParallelDecoder(config, weights, tiny.tokenizer(), never, visibility=visibility, align=align)
    sample = TokenSample([5] * 9, [Branch([6, 7]), Branch([8]), Branch([9, 10, 11])])
    results = decoder.generate([sample], max_new_tokens=40)
    expected = decoded[:]
    decoded.clear()
    answer(decoder, sample, 40, cpu_time=True)
    assert [ids for ids, _ in decoded] == [list(branch.token_ids) for branch in results[0].branches]
    assert decoded == expected


@pytest.mark.slow
def test_decode(tmp_path):
    sizes = ["--branches", "1", "2", "--background", "16", "--new-tokens", "3", "--repeat", "1"]  # a 29M model
    report("decode", *sizes, "--no-transformers", "--output", str(tmp_path / "d.json"))
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert {(r["contender"], r["branches"]) for r in rows} == {
        (name, n) for name in ("matrices alone", "columns", "isolated", "one by one") for n in (1, 2)
    }
    assert all(r["column_ms"] > 0 for r in rows)
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_columns():
    text = report("columns", "--chunks", "4", "--train", "0", "--repeat", "1")
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "branch" in line]
    assert [(row[1].strip(), int(row[2])) for row in rows] == [("1 branch", 18), ("4 branches", 6)]
    assert float(rows[1][4]) > 1.0  # a third of the columns


@pytest.mark.slow
def test_sessions():
    sizes = ["--background", "90", "--forks", "2", "--questions", "3", "--new-tokens", "4", "--repeat", "1"]
    text = report("sessions", *sizes, "--passages", "2", "--passage-length", "40", "--no-learn")
    for name in ("session", "a call a fork", "transformers, kept cache"):
        assert f"{name}: 100.0% of the first fork's tokens are those of 'a call a fork'" in text
    assert "2 forks of 3 questions over 90 tokens" in text
    assert "2 passages of 40 tokens and a question" in text
    assert "branches and a join" in text
