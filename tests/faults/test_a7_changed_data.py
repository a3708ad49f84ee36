"""A run is not resumed on another file under the same path: a position would mean other rows."""

import dataclasses
import json

import pytest
import tiny
from runs import finetune_flags, pretrain_flags

from pd_jax.data import prints
from pd_jax.data.prints import data_prints
from pd_jax.files import check_data
from pd_jax.training.stages import finetune, pretrain


def test_prints(tmp_path, monkeypatch):
    path = tmp_path / "data" / "x.jsonl"
    path.parent.mkdir()
    path.write_text("abc" * 100)
    names = (str(path), str(path.parent), None, "nobody/nothing")
    seen = [data_prints(names)]
    assert set(seen[0]) == {str(path), str(path.parent)}  # of the hub's nothing is known offline
    assert data_prints(names) == seen[0]
    path.write_text("abd" * 100)  # the same size
    seen.append(data_prints(names))
    (path.parent / "y").write_text("")
    assert data_prints(names)[str(path)] == seen[1][str(path)]
    assert data_prints(names)[str(path.parent)] != seen[1][str(path.parent)]
    assert all(seen[0][name] != seen[1][name] for name in seen[0])
    monkeypatch.setattr(prints, "WHOLE", 10)
    monkeypatch.setattr(prints, "PIECE", 4)
    before = data_prints(names)[str(path)]
    path.write_text("abd" * 99 + "abe")  # where a sample looks
    assert data_prints(names)[str(path)] != before


def test_only_what_is_known_of_both_is_compared(tmp_path):
    run = {"flags": {}, "base": None, "finished": False}
    check_data(tmp_path, {"x": "1"})
    (tmp_path / "run.json").write_text(json.dumps(run))  # of an older pd_jax
    check_data(tmp_path, {"x": "1"})
    (tmp_path / "run.json").write_text(json.dumps(run | {"data": {"x": "10 bytes, sha256 a"}}))
    check_data(tmp_path, {"y": "1"})
    with pytest.raises(ValueError, match=r"a run on x as it was then \(10 bytes, sha256 a\), and it has changed"):
        check_data(tmp_path, {"x": "9 bytes, sha256 b"})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_whose_data_changed(tmp_path, one_device, stage):
    data, out = tmp_path / "data.json", tmp_path / "out"
    write = tiny.documents if stage == "pretrain" else tiny.squad
    run, flags = (pretrain, pretrain_flags) if stage == "pretrain" else (finetune, finetune_flags)
    write(data)
    flags = flags(out, dataset_name=str(data), random_init=True, eval_dataset_name=None, max_steps=2, save_steps=1)
    run(flags)
    record = json.loads((out / "run.json").read_text())
    assert list(record["data"]) == [str(data)]
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))
    write(data, 41)
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=r"data\.json as it was then .*, and it has changed"):
        run(flags)
    assert sorted(out.rglob("*")) == before
    write(data)
    run(dataclasses.replace(flags, logging_steps=7))
    assert json.loads((out / "run.json").read_text())["finished"]
