"""A bad row in a stream ends the run with the step before it saved; the rerun with --skip-bad-rows goes on behind."""

import dataclasses
import json

import pytest
import tiny
from runs import curve, finetune_flags, pretrain_flags

from pd_jax.data import pipeline
from pd_jax.data.fineweb import load_documents, segments
from pd_jax.data.text import BadRows
from pd_jax.training.stages import finetune, pretrain


def documents(path, count, bad, long=1):
    """`count` long documents; those in `bad` have no text."""
    rows = [{"text": None if i in bad else f"{i} {tiny.TEXTS[i % 2]} " * long} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(path, bad):
    rows = segments(load_documents(path, streaming=True), tiny.tokenizer(), 8, 319, name=path, bad=bad)
    settings = pipeline.RowSettings(length=16, align="left", pad_id=0, seed=0)
    return pipeline.pretrain_batches(rows, settings, branch_count=2, rows_per_step=1, bad=bad)


def test_the_count_of_skipped_rows_is_part_of_the_position(tmp_path):
    path = documents(tmp_path / "x.jsonl", 120, {3, 70, 119})
    whole = stream(path, bad := BadRows(skip=True))
    batches = list(whole)
    assert bad.count == 3
    first = stream(path, BadRows(skip=True))
    for _ in range(10):
        next(first)
    again = stream(path, bad := BadRows(skip=True))
    again.set_state(json.loads(json.dumps(first.get_state())))
    rest = list(again)
    assert bad.count == 3
    assert [b["tokens"].tolist() for b in rest] == [b["tokens"].tolist() for b in batches[10:]]


@pytest.mark.slow
def test_a_stream_with_a_bad_row(tmp_path, one_device, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "SHUFFLE_WINDOW", 64)  # else the whole file is read before the first step
    web = documents(tmp_path / "web.jsonl", 200, {150}, 3)
    flags = pretrain_flags(
        tmp_path / "out", dataset_name=web, streaming=True, seq_length=32, max_steps=10**4, save_steps=10**5
    )
    with pytest.raises(ValueError, match=r"web\.jsonl': row 150: its text is null.*--skip-bad-rows"):
        pretrain(flags)
    [saved] = (int(p.name) for p in (tmp_path / "out" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved > 10
    assert curve(tmp_path / "out")[-1][0] == saved
    with pytest.raises(ValueError, match="row 150"):  # without the flag it dies there again, and loses nothing
        pretrain(flags)
    assert (tmp_path / "out" / "checkpoints" / str(saved)).is_dir()
    capsys.readouterr()
    pretrain(dataclasses.replace(flags, skip_bad_rows=True))
    said = capsys.readouterr().out
    assert f"after step {saved} of" in said
    assert "1 bad rows of the data were skipped" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_bad_question_is_skipped_and_counted(tmp_path, one_device, capsys):
    path = tmp_path / "x.json"
    content = json.loads(tiny.squad(path).read_text())
    content["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["text"] = None
    path.write_text(json.dumps(content))
    flags = finetune_flags(
        tmp_path / "out", random_init=True, dataset_name=str(path), eval_dataset_name=None, max_steps=1
    )
    with pytest.raises(ValueError, match=r"paragraphs\[1\].qas\[0\]: question '1-0': an answer is null"):
        finetune(flags)
    assert not (tmp_path / "out").exists()
    finetune(dataclasses.replace(flags, skip_bad_rows=True))
    assert "1 bad rows of the data were skipped" in capsys.readouterr().out.splitlines()[-1]
