"""Flags given by hand that contradict what is stored, or that nothing would read, are refused."""

import sys

import jax
import pytest
import tiny
from adapters import random_adapters

from pd_jax.cli import given, parse
from pd_jax.config import LoraConfig
from pd_jax.errors import InputError
from pd_jax.evaluation import EvaluateFlags, evaluate
from pd_jax.files import fingerprint, load_config, save_adapter, write_params
from pd_jax.params import init_params
from pd_jax.training import FinetuneFlags, PretrainFlags, finetune, pretrain


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    base = tiny.model_directory(folder / "base")
    config = load_config(base)
    write_params(base, init_params(config, jax.random.key(0)), config)
    lora = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    save_adapter(
        folder / "adapter", random_adapters(config, lora), lora, config, base=str(base), base_print=fingerprint(base)
    )
    biased = tiny.model_directory(folder / "biased", sibling_bias=True)
    config = load_config(biased)
    write_params(biased, init_params(config, jax.random.key(0)), config)
    tiny.squad(folder / "squad.json")
    tiny.documents(folder / "web.jsonl")
    return folder


def test_what_was_given():
    assert given(PretrainFlags()) == {}
    assert given(PretrainFlags(lora_r=64)) == {"lora_r": 64}
    assert given(parse(PretrainFlags, ["--lora-r", "16", "--seed", "3"])) == {"lora_r": 16, "seed": 3}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "adapter", "--lora-r", "64"], "--lora-r 64 was given, but .*adapter has 4; leave it out"),
        (["--adapter", "adapter", "--lora-r", "16"], "--lora-r 16 was given, but .*adapter has 4; leave it out"),
        (["--adapter", "adapter", "--use-lora", "--lora-alpha", "9"], "--lora-alpha 9.0 was given, but .* has 8"),
        (["--adapter", "adapter", "--lora-dropout", "0.5"], "--lora-dropout 0.5 was given, but .* has 0.0"),
        (["--adapter", "adapter", "--lora-target-modules", "q_proj"], "--lora-target-modules q_proj was given, but"),
        (["--lora-r", "64"], "--lora-r is for --use-lora, which is not here"),
        (["--lora-target-modules", "q_proj"], "--lora-target-modules is for --use-lora, which is not here"),
        (["--mix-shares", "1", "2", "3"], "--mix-shares is for --visibility mix, which is not here"),
        (["--sibling-bias-lr", "0.1"], "--sibling-bias-lr is for --sibling-bias, which is not here"),
        (["--model-name", "biased", "--no-sibling-bias"], "--sibling-bias False was given, but .*biased has True"),
        (["--pair-indices", "1", "2"], r"pair_indices \[1, 2\] was asked for, but .* trained with \[2, 4, 6\]"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_training(files, tmp_path, stage, argv, message):
    flags, run, data = (
        (PretrainFlags, pretrain, "web.jsonl") if stage == "pretrain" else (FinetuneFlags, finetune, "squad.json")
    )
    argv = ["--model-name", "base", "--dataset-name", data, *argv]
    argv = [str(files / a) if (files / a).exists() else a for a in argv]
    with pytest.raises(InputError, match=message):
        run(parse(flags, [*argv, "--output-dir", str(tmp_path / "out"), "--batch-size", "8"]))
    assert not list(tmp_path.iterdir())


def test_evaluation(tmp_path):
    with pytest.raises(InputError, match=r"--max-new-tokens changes nothing of --from .*results\.json; leave it out"):
        evaluate(parse(EvaluateFlags, ["--from", str(tmp_path / "results.json"), "--max-new-tokens", "5"]))


def test_demo(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["demo", "--temperature", "0.5"])
    with pytest.raises(SystemExit):
        runpy.run_path("scripts/demo.py", run_name="__main__")
    assert "--temperature 0.5 is for --do-sample" in capsys.readouterr().err
