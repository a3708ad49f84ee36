"""The benchmarks run, at sizes that say nothing, and report every contender that this machine has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "benchmark.py")


def report(*arguments: str) -> str:
    """A process of its own: the script keeps itself to few cores."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention():
    shape = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--branches", "4"]
    text = report("attention", "--tokens", "96", *shape, "--repeat", "1", "--no-model")
    assert text.count("96 tokens, forward") == 2
    for name in ("causal", "dense", "chunked"):
        assert text.count(f"\n{name} ") == 2
    assert "skipped: attention backend 'splash' cannot run here: it needs a TPU" in text


@pytest.mark.slow
def test_decode(tmp_path):
    sizes = ["--branches", "1", "2", "--background", "16", "--new-tokens", "3", "--repeat", "1"]  # a 29M model
    report("decode", *sizes, "--no-transformers", "--output", str(tmp_path / "d.json"))
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert {(r["contender"], r["branches"]) for r in rows} == {
        (name, n) for name in ("columns", "isolated", "one by one") for n in (1, 2)
    }
    assert all(r["column_ms"] > 0 for r in rows)
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
