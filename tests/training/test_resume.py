import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import jax
import numpy as np
import pytest
from runs import ROOT, curve, finetune_flags, launch, metrics, pretrain_flags, wait_for

from pd_jax.files import load_adapter, load_config, load_params
from pd_jax.lora import merge
from pd_jax.machines import on_tpu_vm, start_processes
from pd_jax.training.stages import finetune, pretrain

SAVING = {"save_steps": 4, "keep": 9}


@pytest.fixture
def devices(monkeypatch):
    """`devices(n)`: from here on jax has n devices."""
    present = jax.devices()
    return lambda count: monkeypatch.setattr(jax, "devices", lambda: present[:count])


@cache
def whole_run() -> Path:
    """A run of 12 steps that nothing disturbed, on one device."""
    output = Path(mkdtemp(prefix="pd_jax-")) / "whole"
    process = launch(pretrain_flags(output, **SAVING))
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return output


def cut_off(output: Path, step: int) -> None:
    """In `output`: what a kill soon after checkpoint `step` of `whole_run` leaves behind."""
    output.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(whole_run() / name, output)
    run = json.loads((output / "run.json").read_text())
    run["flags"]["output_dir"] = str(output)
    (output / "run.json").write_text(json.dumps(run | {"finished": False}))
    shutil.copytree(whole_run() / "checkpoints", output / "checkpoints")
    for folder in (output / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    (output / "metrics.jsonl").write_text("\n".join(lines[: step + 2]) + lines[step + 2][:30])  # a line cut short


def saved_steps(output: Path) -> list[str]:
    folder = output / "checkpoints"
    return sorted((p.name for p in folder.iterdir() if p.name.isdigit()), key=int) if folder.is_dir() else []


def assert_same_end(output: Path) -> None:
    """Curve and weights are those of `whole_run`, bit for bit."""
    assert curve(output) == curve(whole_run())
    config = load_config(output)
    weights = (load_params(folder, config) for folder in (output, whole_run()))
    jax.tree.map(np.testing.assert_array_equal, *weights)


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_killed_during_saves_it_continues_bit_for_bit(tmp_path):
    """kill -9 three times, each time while a checkpoint is being written."""
    output = tmp_path / "cut"
    flags = pretrain_flags(output, save_steps=1, keep=9)
    for kills in range(3):
        process = launch(flags)
        done = len(saved_steps(output))

        def saving(done=done, kills=kills) -> bool:
            unfinished = any((output / "checkpoints").glob("*tmp*")) if (output / "checkpoints").is_dir() else False
            return len(saved_steps(output)) > done + kills and unfinished

        wait_for(saving, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (output / "config.json").exists()
    again = launch(flags)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert "resuming" in said
    assert_same_end(output)


@pytest.mark.slow
def test_a_killed_stream_continues_bit_for_bit(tmp_path):
    flags = partial(pretrain_flags, streaming=True, **SAVING)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = launch(flags(whole))
    assert process.wait() == 0, process.communicate()[0]
    killed = launch(flags(cut))
    wait_for(lambda: bool(saved_steps(cut)), killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = launch(flags(cut))
    assert again.wait() == 0, again.communicate()[0]
    assert curve(cut) == curve(whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_resume(tmp_path):
    process = launch(pretrain_flags(tmp_path / "run", max_steps=2000))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file() and len(metrics(tmp_path / "run")) > 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "stopped by SIGTERM" in said
    assert "run the same command to resume" in said
    last = metrics(tmp_path / "run")[-1]
    assert saved_steps(tmp_path / "run") == [str(last["step"])]
    ranked = tmp_path / "run" / "checkpoints" / str(last["step"]) / "metrics" / "metrics"
    assert json.loads(ranked.read_text())["loss"] == pytest.approx(last["loss"])


@pytest.mark.slow
def test_resumed_on_other_devices_it_continues_up_to_rounding(tmp_path, devices):
    cut_off(tmp_path / "run", 4)
    devices(2)
    pretrain(pretrain_flags(tmp_path / "run", **SAVING, mesh=(1, 1, 2)))
    np.testing.assert_allclose(curve(tmp_path / "run"), curve(whole_run()), rtol=1e-4)


# ---------------------------------------------------------------- disks


@pytest.mark.slow
@pytest.mark.parametrize("part", ["*", "state", "metrics"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, devices, capsys, part):
    """Files cut to half their size; the step is saved again on the way."""
    cut_off(tmp_path / "run", 8)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in [p for folder in (checkpoints / "8").glob(part) for p in (folder, *folder.rglob("*"))]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    devices(1)
    pretrain(pretrain_flags(tmp_path / "run", **SAVING))
    said = capsys.readouterr().out
    assert "warning: checkpoint 8 is unreadable" in said
    assert "after step 4 of 12" in said
    assert "could not be saved" not in said
    assert saved_steps(tmp_path / "run") == ["4", "8", "12"]
    assert (checkpoints / "8.damaged").is_dir()
    np.testing.assert_allclose(curve(tmp_path / "run"), curve(whole_run()), rtol=1e-4)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """No file may grow beyond 40 kB, which a checkpoint does and nothing else: saves fail, with a warning each."""
    output = tmp_path / "run"
    cut_off(output, 4)
    size = 40_000
    full = launch(
        pretrain_flags(output, **SAVING), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    )
    said = full.communicate()[0]
    assert full.returncode == 2, said
    assert "could not be saved" in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1  # orbax's threads say more
    assert saved_steps(output) == ["4"]
    assert not (output / "config.json").exists()
    again = launch(pretrain_flags(output, **SAVING))
    assert again.wait() == 0, again.communicate()[0]
    assert_same_end(output)


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    process = launch(pretrain_flags(tmp_path / "run", learning_rate=1e30, save_steps=1))
    said = process.communicate()[0]
    assert process.returncode == 1, said
    [error] = [line for line in said.splitlines() if line.startswith("error:")]
    step = len(metrics(tmp_path / "run")) + 1
    assert f"the loss of step {step} is" in error
    assert "its gradient nan" in error
    assert f'"global_next_index": {step - 1}' in error
    assert f"the last good checkpoint is {step - 1}" in error
    assert saved_steps(tmp_path / "run")[-1] == str(step - 1)
    assert "Traceback" not in said


# ---------------------------------------------------------------- LoRA


@pytest.mark.slow
def test_a_lora_run_from_pretraining_to_export(tmp_path, devices, monkeypatch):
    """Adapters are continued by finetuning and merged on export; they know their base and refuse another one."""
    devices(1)
    base, other, first, second = (tmp_path / name for name in ("base", "other", "first", "second"))
    pretrain(pretrain_flags(base, max_steps=2, save_steps=100))
    lora = {"model_name": str(base), "random_init": False, "use_lora": True, "lora_r": 2, "learning_rate": 1e-2}
    pretrain(pretrain_flags(first, **lora, save_steps=8))
    size = sum(path.stat().st_size for path in (first / "checkpoints" / "8").rglob("*"))
    assert size < 0.5 * sum(path.stat().st_size for path in (base / "params").rglob("*"))
    run = json.loads((first / "run.json").read_text())
    peft = json.loads((first / "adapter_config.json").read_text())
    assert run["base"]["name"] == peft["base_model_name_or_path"] == str(base)
    assert run["base"]["fingerprint"] == peft["pd_jax"]["base_fingerprint"]

    tuning = {"model_name": str(base), "adapter": str(first), "learning_rate": 3e-3, "epochs": 4}
    finetune(finetune_flags(second, **tuning))
    fresh = tmp_path / "fresh"
    finetune(finetune_flags(fresh, **tuning | {"adapter": None, "use_lora": True, "lora_r": 2}))
    assert metrics(second)[0]["loss"] < metrics(fresh)[0]["loss"] - 0.1

    command = [sys.executable, "convert/flax_to_hf.py", "--checkpoint", str(second), "--output", str(tmp_path / "hf")]
    subprocess.run(command, cwd=ROOT, check=True)
    config = load_config(base)
    merged = merge(load_params(base, config), *load_adapter(second, config, base))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "hf", load_config(tmp_path / "hf")), merged)

    shutil.copytree(base, other)
    hf = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(hf | {"initializer_range": 0.5}))
    with pytest.raises(ValueError, match=r"first was trained on .*base with fingerprint .* and .*other has"):
        finetune(finetune_flags(tmp_path / "third", **tuning | {"model_name": str(other)}))
    shutil.copy(other / "config.json", base / "config.json")
    (first / "run.json").write_text(json.dumps(run | {"finished": False}))
    with pytest.raises(ValueError, match=r"holds a run on .*base with fingerprint .*; restore that base"):
        pretrain(pretrain_flags(first, **lora, save_steps=8))


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("chips", "runtime", "platforms", "expected"),
    [
        (["accel0"], True, None, True),
        (["vfio/0"], True, "tpu,cpu", True),
        (["vfio/vfio", "null"], True, None, False),
        (["accel0"], False, None, False),
        (["accel0"], True, "cpu", False),
    ],
)
def test_a_tpu_vm_is_known_by_its_chips_and_their_runtime(tmp_path, monkeypatch, chips, runtime, platforms, expected):
    for chip in chips:
        (tmp_path / chip).parent.mkdir(exist_ok=True)
        (tmp_path / chip).touch()
    monkeypatch.setattr("pd_jax.machines.processes.find_spec", lambda name: object() if runtime else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert on_tpu_vm(tmp_path) == expected


@pytest.mark.parametrize(("tasks", "pod", "joins"), [("2", False, True), ("1", False, False), ("1", True, True)])
def test_processes_find_one_another_under_slurm_and_on_a_pod(monkeypatch, tasks, pod, joins):
    calls = []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setattr("pd_jax.machines.processes.on_tpu_vm", lambda: pod)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    start_processes(None, None, None)
    assert calls == [()] * joins
    with pytest.raises(ValueError, match="--process-id None: give all three"):
        start_processes("node0:1", 2, None)


def run_two(flags, stop=None) -> list[str]:
    """Two processes of four devices each; what they said. `stop(processes)` may end them early."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [
        launch(flags(coordinator_address=f"localhost:{port}", num_processes=2, process_id=i), devices=4)
        for i in range(2)
    ]
    if stop is not None:
        stop(together)
    said = [process.communicate()[0] for process in together]
    assert [process.returncode for process in together] == [0, 0], said
    return said


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """2 x 4 devices, stopped by SIGTERM to one process, and resumed by one process: the curve of 1 x 8 devices."""
    one, two = tmp_path / "one", tmp_path / "two"
    sharded = partial(pretrain_flags, batch_size=4, mesh=(2, 2, 2), max_steps=40, save_steps=1000)
    alone = launch(sharded(one), devices=8)
    assert alone.wait() == 0, alone.communicate()[0]

    def stop(processes) -> None:
        wait_for(lambda: (two / "metrics.jsonl").is_file() and len(metrics(two)) > 3, processes[0])
        processes[1].send_signal(signal.SIGTERM)

    said = run_two(partial(sharded, two), stop)
    assert "stopped by SIGTERM" in said[0]
    assert "step 1/40" not in said[1]
    [step] = saved_steps(two)
    assert 3 < int(step) < 40
    np.testing.assert_allclose(curve(two), curve(one)[: int(step)], rtol=1e-4)
    again = launch(sharded(two), devices=8)
    assert again.wait() == 0, again.communicate()[0]
    np.testing.assert_allclose(curve(two), curve(one), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_write_one_model(tmp_path, lora):
    """Finetuning with a validation loss: both processes take part in writing, and what they write can be loaded."""
    changes = {"batch_size": 8, "mesh": (1, 8, 1), "random_init": True, "save_steps": 1, "epochs": 2}
    tuning = partial(finetune_flags, **changes, use_lora=lora, lora_r=2)
    run_two(partial(tuning, tmp_path / "two"))
    alone = launch(tuning(tmp_path / "one"), devices=8)
    assert alone.wait() == 0, alone.communicate()[0]
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)
    assert "validation_loss" in metrics(tmp_path / "two")[-1]
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    assert not list(tmp_path.glob(".*"))
