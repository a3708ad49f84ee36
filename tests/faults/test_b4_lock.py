"""Two runs in one output directory: the second is refused and names the first; the lock dies with its process."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from runs import ROOT, launch, pretrain_flags, wait_for

from pd_jax.files import check_output, claim

HOLD = """
import sys, time
from pathlib import Path
from pd_jax.files import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(output):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_second_is_refused_until_the_first_has_died(tmp_path, number):
    first = hold(tmp_path / "out")
    who = rf"out is in use by host {socket.gethostname()}, process {first.pid}; wait for it, or use another"
    with pytest.raises(ValueError, match=who), claim(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / ".lock").exists()
    first.send_signal(number)
    first.wait()
    assert check_output(tmp_path / "out", {})  # what a kill leaves is no obstacle
    with claim(tmp_path / "out"):
        assert f"process {os.getpid()}" in (tmp_path / "out" / ".lock").read_text()
    assert not (tmp_path / "out").exists()


def test_in_one_process_too(tmp_path):
    with claim(tmp_path), pytest.raises(ValueError, match="is in use by host"), claim(tmp_path):
        pass
    with claim(tmp_path):
        (tmp_path / "kept").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_other_processes_of_a_run_do_not_ask(tmp_path, monkeypatch):
    with claim(tmp_path):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with claim(tmp_path):
            pass
        monkeypatch.undo()
        assert (tmp_path / ".lock").exists()


def test_an_error_inside_is_not_swallowed_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path / "a" / "out"):
        raise KeyError
    assert not (tmp_path / "a" / "out").exists()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory .*file/out cannot be made"), claim(tmp_path / "file" / "out"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claim(tmp_path):
        pass
    assert "cannot be locked" in caplog.text


@pytest.mark.slow
def test_two_runs_at_once(tmp_path):
    flags = pretrain_flags(tmp_path / "out", max_steps=10**5)
    first = launch(flags)
    wait_for(lambda: (tmp_path / "out" / "metrics.jsonl").is_file(), first)
    began = time.monotonic()
    second = launch(flags)
    said = second.communicate()[0]
    assert second.returncode == 2, said
    assert f"is in use by host {socket.gethostname()}, process {first.pid}" in said.splitlines()[-1]
    assert time.monotonic() - began < 60
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert "run the same command to resume" in first.communicate()[0]
