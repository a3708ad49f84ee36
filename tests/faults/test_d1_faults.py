"""Faults of a machine while a command of ours runs: one row each, and what must hold afterwards.

The command says one line and ends with exit code 2 (Ctrl-C: 130), nothing that is complete is lost, nothing that is not
looks complete; and the same command run again makes what an undisturbed one makes. These are the rows that need
processes, signals and file systems; `test_d1_every_write` tries every single write, `test_d1_checkpoints` every file of
a checkpoint.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import mounts
import pytest
import tiny
from injected import arm
from runs import ROOT

from pd_jax.files import claim, load_config, save_model, write_params
from pd_jax.jobs import open_answers
from pd_jax.params import init_params

COMMANDS = ("answer", "evaluate", "hf_to_flax", "flax_to_hf", "pretrain")
QUICK = COMMANDS[:-1]


def make_inputs(folder: Path) -> Path:
    """A tiny model in both formats, documents, questions and a job."""
    (folder / "models").mkdir(parents=True)
    source = tiny.model_directory(folder / "models" / "hf", num_hidden_layers=1, vocab_size=320, pair_indices=())
    config = load_config(source)
    params = init_params(config, jax.random.key(1))
    save_model(folder / "models" / "columns", params, config, source)
    write_params(source, params, config)
    tiny.documents(folder / "web.jsonl")
    tiny.squad(folder / "squad.json", 4)
    rows = [{"id": str(i), "background": f"Tower {i}.", "branches": ["How?", "Why?"]} for i in range(60)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "in")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What the quick commands make when nothing happens, by name."""
    out = {name: tmp_path_factory.mktemp(name) for name in QUICK}
    for name, folder in out.items():
        assert mounts.run(mounts.arguments(name, inputs, folder))[0] == 0
    return {name: mounts.made(name, folder) for name, folder in out.items()}


def assert_one_line(code: int, said: str, expected: int = 2) -> None:
    assert code == expected, said
    assert "Traceback" not in said
    assert len(re.findall(r"^error: ", said, re.MULTILINE)) == 1, said


# Disks and the network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounted(inputs):
    """What `mounts` says."""
    alone = ["unshare", "-Urmn", "--"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount file systems of their own")
    argv = [*alone, sys.executable, str(Path(mounts.__file__)), str(inputs)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(x.removeprefix(mounts.MARK)) for x in done.stdout.splitlines() if x.startswith(mounts.MARK)]
    return {row["row"]: row for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read-only", "no room", "room runs out"])
@pytest.mark.parametrize("name", COMMANDS)
def test_disks(mounted, name, fault):
    found, said = mounted[f"{name}, {fault}"], mounted[f"{name}, {fault}"]["said"]
    if name in ("pretrain", "hf_to_flax") and fault == "room runs out":
        # Threads of orbax may print what stopped them before our line, or not: it is a race of theirs.
        said = said[said.index("error: ") :]
    assert_one_line(found["code"], said)
    whole = ("evaluation/predictions-isolated.jsonl", "evaluation/results.json")  # each, though the report is not there
    kept = {"answer": ("answers.jsonl.partial",), "evaluate": whole}.get(name, ("run/",))
    assert [path for path in found["left"] if not path.startswith((*kept, "full"))] == []
    if fault != "room runs out":
        assert [path for path in found["left"] if path != "full"] == []
    assert found["again"] == 0, found["made"]
    assert found["made"] == mounted[f"{name}, undisturbed"]["made"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "questions", "documents"])
def test_no_network(mounted, name):
    found = mounted[f"{name}, no network"]
    assert_one_line(found["code"], found["said"])
    assert found["left"] == []
    assert found["seconds"] < 120


# Kills and Ctrl-C -----------------------------------------------------------------------------------------------------

PLACES = {  # the change before which it happens
    "answer": r"answers\.jsonl\.partial$",
    "evaluate": r"os.rename .*results\.json$",
    "hf_to_flax": r"os.rename .*flax/params$",
    "flax_to_hf": r"open .*\.partial/config\.json$",
}


def doomed(pattern: str, argv: list[str], number: int = signal.SIGKILL) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tests" / "faults" / "injected.py"), str(int(number)), pattern, *argv]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate()[0].decode()
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_killed(inputs, whole, tmp_path, name):
    pattern = PLACES[name] if name != "answer" else r"open .*/\.answers\.jsonl\.partial$"
    code, said = doomed(pattern, mounts.arguments(name, inputs, tmp_path))
    assert code == -signal.SIGKILL, said
    complete = {"answer": "answers.jsonl", "evaluate": "evaluation/results.json"}.get(name, "*/config.json")
    assert not list(tmp_path.glob(complete))
    assert mounts.run(mounts.arguments(name, inputs, tmp_path))[0] == 0
    assert mounts.made(name, tmp_path) == whole[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_interrupted(inputs, whole, tmp_path, name):
    once = iter([signal.SIGINT])

    def strike(event: str, path: str) -> None:
        if re.search(PLACES[name], f"{event} {path}") and (number := next(once, None)):
            signal.raise_signal(number)

    arm(strike)
    try:
        assert_one_line(*mounts.run(mounts.arguments(name, inputs, tmp_path)), expected=130)
    finally:
        arm(None)
    assert next(once, None) is None  # it was struck
    assert mounts.run(mounts.arguments(name, inputs, tmp_path))[0] == 0
    assert mounts.made(name, tmp_path) == whole[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_training_run_killed_while_its_model_is_written(inputs, tmp_path, name):
    """Three kills in one run; what it makes in the end is bit for bit what an undisturbed one makes."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert doomed("nowhere", mounts.arguments(name, inputs, alone))[0] == 0
    argv = mounts.arguments(name, inputs, run)
    for pattern in (r"os.rename .*checkpoints/8$", r"open .*\.partial/config\.json$", r"os.rename .*run/config\.json$"):
        code, said = doomed(pattern, argv)
        assert code == -signal.SIGKILL, said
        assert not (run / "run" / "config.json").exists()
    code, said = doomed("nowhere", argv)
    assert code == 0, said
    assert "resuming" in said
    assert mounts.made(name, run) == mounts.made(name, alone)


@pytest.mark.slow
def test_a_training_run_interrupted_goes_on(inputs, tmp_path):
    """Ctrl-C after some steps: the step is finished and saved, and the same command goes on, bit for bit."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert doomed("nowhere", mounts.arguments("finetune", inputs, alone))[0] == 0
    code, said = doomed(r"os.rename .*checkpoints/8$", mounts.arguments("finetune", inputs, run), number=signal.SIGINT)
    assert code != -signal.SIGINT, said
    assert "Traceback" not in said
    assert not (run / "run" / "config.json").exists()
    code, said = doomed("nowhere", mounts.arguments("finetune", inputs, run))
    assert code == 0, said
    assert "resuming" in said
    assert mounts.made("finetune", run) == mounts.made("finetune", alone)


# Two at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "evaluate" else []) for n in QUICK])
def test_two_at_once(inputs, tmp_path, name):
    outputs = {"answer": "answers.jsonl", "evaluate": "evaluation", "hf_to_flax": "flax", "flax_to_hf": "hf"}
    out = tmp_path / outputs[name]
    with contextlib.ExitStack() as first:
        if name == "answer":
            first.enter_context(open_answers(out, {}))
        else:
            first.enter_context(claim(out))
        code, said = mounts.run(mounts.arguments(name, inputs, tmp_path))
        assert_one_line(code, said)
        assert "in use by host" in said or "being written by another process" in said
    assert mounts.run(mounts.arguments(name, inputs, tmp_path))[0] == (2 if name == "answer" else 0)
