"""The doctor calls what is wrong WRONG, `auto` attention heeds it, and a machine that works gets no complaint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pd_jax import files
from pd_jax.attention import chunked, make_attention
from pd_jax.attention.select import _announce
from pd_jax.benchmarks import DoctorFlags, checks, doctor, examine
from pd_jax.benchmarks.doctor import PARTS, Finding, Ward
from pd_jax.columns import column_mask
from pd_jax.decoding import steps
from pd_jax.machines import data_sheet, measured, report_path, wrong_backends

SCRIPT = Path(__file__).parents[2] / "scripts" / "doctor.py"
KIND = "cpu"


def chosen(caplog) -> list[str]:
    """What `auto` says that it takes for rows of three tiles."""
    coordinates = checks.rows(384)
    q, k, v = (jnp.ones((*coordinates.column.shape, 1, 8)) for _ in "qkv")
    _announce.cache_clear()  # other tests have heard it
    caplog.clear()
    with caplog.at_level("INFO", logger="pd_jax.attention"):
        jax.eval_shape(make_attention(coordinates), q, k, v)
        jax.eval_shape(make_attention(coordinates, backend="chunked"), q, k, v)  # forced: never refused
    return [record.message for record in caplog.records]


def test_a_broken_backend_is_wrong_and_auto_passes_over_it_until_it_is_mended(tmp_path, monkeypatch, caplog, capsys):
    right = chunked.chunked_attention
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "PARTS", {"attention": PARTS["attention"]})
    assert chosen(caplog) == ["attention: chunked on cpu"]

    def ignores_the_bias(q, k, v, tiles, visibility, sibling_bias=None):
        return right(q, k, v, tiles, visibility)

    monkeypatch.setattr(chunked, "chunked_attention", ignores_the_bias)
    copy = tmp_path / "report.json"
    assert not examine(DoctorFlags(quick=True, output=str(copy)))
    assert "attention 'auto' passes over chunked here from now on" in capsys.readouterr().out
    report = json.loads(copy.read_text())
    assert report == json.loads(report_path(KIND).read_text())
    verdicts = {finding["what"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts == {"chunked: sibling_bias, float32": "WRONG"}
    why = f"chunked: scripts/doctor.py found it WRONG here, see {report_path(KIND)}"
    assert chosen(caplog) == [f"attention: dense on cpu ({why})"]

    mended = {"attention": lambda ward: iter([Finding("attention", "chunked: columns, float32", "")])}
    monkeypatch.setattr(doctor, "PARTS", mended)
    assert examine(DoctorFlags(quick=True))
    assert chosen(caplog) == ["attention: chunked on cpu"]


def test_a_backend_that_breaks_off_is_wrong(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nand a page more")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chunked, "chunked_attention", broken)
    monkeypatch.setattr(doctor, "PARTS", {"attention": PARTS["attention"], "disk": broken})
    assert not examine(DoctorFlags(quick=True))
    report = json.loads(report_path(KIND).read_text())
    assert report["wrong_backends"] == ["chunked"]
    assert {f["figure"] for f in report["findings"]} == {"RuntimeError: no such kernel"}
    assert {f["verdict"] for f in report["findings"]} == {"WRONG"}


def test_where_nothing_is_right_auto_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report_path(KIND).parent.mkdir()
    report_path(KIND).write_text(json.dumps({"wrong_backends": ["dense", "chunked"]}))
    coordinates = checks.rows(384)
    q = jnp.ones((*coordinates.column.shape, 1, 8))
    with pytest.raises(ValueError, match=r"no attention backend is right here: chunked: .*doctor-cpu.json; dense: "):
        make_attention(coordinates)(q, q, q)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"figures": {}}'])
def test_a_report_that_cannot_be_read_says_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report_path(KIND).parent.mkdir()
    report_path(KIND).write_text(text)
    assert wrong_backends(KIND) == {}
    assert measured(KIND) is None


def test_measured_figures_replace_those_of_the_data_sheet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind = "NVIDIA H100 80GB HBM3"
    assert report_path(kind) == tmp_path / "pd_jax" / "doctor-NVIDIA-H100-80GB-HBM3.json"
    report_path(kind).parent.mkdir()
    report_path(kind).write_text(json.dumps({"figures": {"flops": 7e14, "bandwidth": 3e12}}))
    machine, sheet = measured(kind), data_sheet(kind)
    assert (machine.flops, machine.bandwidth) == (7e14, 3e12)
    assert (machine.link, machine.memory) == (sheet.link, sheet.memory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_key_too_many_is_wrong_and_rounding_is_not(monkeypatch, dtype):
    """The last token of the longest row also sees the last of its sample that it must not see."""
    exact = checks.attention_errors("dense", "isolated", dtype, 384, 16)
    assert checks.wrong(exact, dtype) == []
    assert all(3 * error <= checks.ALLOWED[name][dtype == "bfloat16"] for name, error in exact.items())

    coordinates = checks.rows(384)
    row, place = 0, int(coordinates.valid[0].sum()) - 1
    mask, own = column_mask(coordinates, coordinates, "isolated")[row, place], coordinates.segment[row]
    more = int(np.flatnonzero(~np.asarray(mask) & np.asarray(own == own[place]))[-1])
    breaks = [True, False]  # what is checked, and the reference

    def sees_more(query, key, visibility):
        mask = column_mask(query, key, visibility)
        return mask.at[row, place, more].set(True) if breaks.pop(0) else mask

    monkeypatch.setattr("pd_jax.attention.select.column_mask", sees_more)
    assert "out" in checks.wrong(checks.attention_errors("dense", "isolated", dtype, 384, 16), dtype)


def ward() -> Ward:
    return Ward(DoctorFlags(), jax.devices()[0], True, 384, 16, ("float32",), {})


def test_a_sum_that_lost_a_device_is_wrong(monkeypatch):
    [fine] = PARTS["links"](ward())
    assert (fine.what, fine.verdict) == ("a sum over 8 devices", "ok")
    add = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: add(x - 1, axis))
    [lost] = PARTS["links"](ward())
    assert lost.verdict == "WRONG"


@pytest.mark.slow
def test_a_column_that_stands_elsewhere_than_in_the_row_is_wrong(monkeypatch):
    assert [finding.verdict for finding in PARTS["decoding"](ward())] == ["ok"] * 3
    tables = steps.rope_tables

    def shifted(config, branch, column):
        return tables(config, branch, column + (column.shape[-1] < 32))  # where one token of every branch is fed

    monkeypatch.setattr(steps, "rope_tables", shifted)
    other = ward()._replace(head_dim=32)  # what is compiled for one head size stays compiled
    assert [finding.verdict for finding in PARTS["decoding"](other)] == ["WRONG"] * 3


@pytest.mark.slow
def test_a_step_with_a_wrong_backward_pass_is_wrong(monkeypatch):
    assert checks.wrong(checks.step_errors("sibling_bias", "float32", 384, 16), "float32") == []
    right = chunked.chunked_attention
    monkeypatch.setattr(chunked, "chunked_attention", lambda *x: jax.lax.stop_gradient(right(*x)))
    assert checks.wrong(checks.step_errors("sibling_bias", "float32", 384, 16), "float32") == ["gradients"]


@pytest.mark.slow
def test_a_checkpoint_that_comes_back_otherwise_is_wrong(monkeypatch, tmp_path):
    there = ward()._replace(flags=DoctorFlags(quick=True, directory=str(tmp_path)))
    assert "WRONG" not in [finding.verdict for finding in PARTS["disk"](there)]
    read = files.read_checkpoint
    monkeypatch.setattr(
        files, "read_checkpoint", lambda *x: jax.tree.map(lambda y: y.at[(0,) * y.ndim].add(1), read(*x))
    )
    assert "WRONG" in [finding.verdict for finding in PARTS["disk"](there)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script(tmp_path):
    """As a user runs it, on a machine that works."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "2"}
    argv = [sys.executable, SCRIPT, "--quick", "--directory", str(tmp_path)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing WRONG" in done.stdout
    report = json.loads((tmp_path / "pd_jax" / "doctor-cpu.json").read_text())
    assert {finding["part"] for finding in report["findings"]} == {
        "speed", "links", "attention", "decoding", "disk",
    }  # fmt: skip
    assert report["versions"]["jax"] == jax.__version__
    assert report["figures"].keys() == {"flops", "bandwidth", "link"}
    assert report["wrong_backends"] == []


def test_the_exit_code_says_that_something_is_wrong(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "pd_jax.benchmarks.doctor.PARTS", {"disk": lambda ward: iter([Finding("disk", "", "", "WRONG")])}
    )
    assert command("doctor", "--quick") == 1
    monkeypatch.setattr(doctor, "PARTS", {"disk": lambda ward: iter([Finding("disk", "", "")])})
    assert command("doctor", "--quick") == 0
