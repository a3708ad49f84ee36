"""That the model can be saved is proven before the first step, by the way that it will take."""

import os
import shutil
from types import SimpleNamespace

import jax
import pytest
import tiny
from runs import pretrain_flags

from pd_jax.files import import_model, load_config, load_params, prove_saving, save_model, staging
from pd_jax.params import init_params
from pd_jax.training.stages import pretrain

CONFIG = tiny.config()


def beside_is_forbidden(monkeypatch, allowed):
    """What a parent that cannot be written, or a mount point, is to a program: nothing moves into or out of `allowed`,
    and nothing is made beside it. (A test may run as root, for whom permissions mean nothing.)"""
    real_mkdir, real_rename = os.mkdir, os.replace

    def inside(path):
        path = os.path.abspath(path)
        return path == str(allowed) or path.startswith(f"{allowed}/")

    def mkdir(path, *rest, **more):
        if not inside(path):
            raise PermissionError(13, "Permission denied", str(path))
        real_mkdir(path, *rest, **more)

    def rename(a, b, **more):
        if not (inside(a) and inside(b)):
            raise OSError(18, "Invalid cross-device link", str(a))
        real_rename(a, b, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "rename", rename)


def test_nothing_is_staged_beside_the_directory(tmp_path, monkeypatch):
    base, params = tiny.model_directory(tmp_path / "base"), init_params(CONFIG, jax.random.key(0))
    (tmp_path / "disk" / "out").mkdir(parents=True)
    beside_is_forbidden(monkeypatch, tmp_path / "disk" / "out")
    prove_saving(tmp_path / "disk" / "out", 1)
    save_model(tmp_path / "disk" / "out", params, CONFIG, base)
    assert load_params(tmp_path / "disk" / "out", CONFIG)
    assert not [p for p in (tmp_path / "disk" / "out").iterdir() if p.name.startswith(".")]


def test_through_a_link(tmp_path):
    base, params = tiny.model_directory(tmp_path / "base"), init_params(CONFIG, jax.random.key(0))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    save_model(tmp_path / "out", params, CONFIG, base)
    assert (tmp_path / "out").is_symlink()
    assert load_config(tmp_path / "disk") == CONFIG


def test_all_or_nothing(tmp_path):
    for existing in (False, True):
        if existing:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("old")
        with pytest.raises(FileExistsError), staging(tmp_path / "out") as stage:  # noqa: PT012
            (stage / "config.json").mkdir()
            (stage / "config.json").mkdir()
        assert (tmp_path / "out").exists() == existing
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_what_a_kill_leaves_is_no_obstacle(tmp_path):
    """A conversion killed while it wrote can be run again."""
    base = tiny.model_directory(tmp_path / "base")
    save_model(tmp_path / "source", init_params(CONFIG, jax.random.key(0)), CONFIG, base)
    (tmp_path / "out" / ".partial" / "params").mkdir(parents=True)
    import_model(str(tmp_path / "source"), tmp_path / "out")
    assert load_params(tmp_path / "out", CONFIG)


def broken(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "stand_in", "message"),
    [
        ("os.replace", broken(OSError(18, "Invalid cross-device link")), "cannot be written .*cross-device"),
        ("pathlib.Path.write_bytes", broken(OSError(28, "No space left on device")), "cannot be written .*No space"),
        (
            "pathlib.Path.mkdir",
            broken(PermissionError(13, "Permission denied")),
            "cannot be (made|written) .*Permission",
        ),
        ("pathlib.Path.read_bytes", lambda self: b"", "does not give back what was written"),
    ],
)
def test_what_would_fail_at_the_end_fails_now(tmp_path, monkeypatch, place, stand_in, message):
    monkeypatch.setattr(place, stand_in)
    with pytest.raises(ValueError, match=message):
        prove_saving(tmp_path / "out", 1)


def test_room(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"x" * 600)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=400))
    prove_saving(tmp_path / "out", 1000)  # what is there already will be replaced
    with pytest.raises(ValueError, match=r"0\.00 GiB free, and the model and its checkpoints take"):
        prove_saving(tmp_path / "out", 1001)


@pytest.mark.slow
def test_a_run_without_room_writes_nothing(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**4))
    with pytest.raises(ValueError, match="GiB free, and the model and its checkpoints take"):
        pretrain(pretrain_flags(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
