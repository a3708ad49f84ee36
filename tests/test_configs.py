"""The files beside the code: every YAML file of flags is read, and tools have one version everywhere."""

import re
from pathlib import Path

import pytest

from pd_jax.cli import parse
from pd_jax.evaluation import EvaluateFlags
from pd_jax.training import FinetuneFlags, PretrainFlags

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_names_its_command(path):
    stage = path.stem.split("-")[0]
    flags = {"pretrain": PretrainFlags, "finetune": FinetuneFlags, "evaluate": EvaluateFlags}[stage]
    assert parse(flags, ["--config", str(path)]) != flags()
    assert f"python scripts/{stage}.py --config configs/{path.name}" in path.read_text()


def test_there_is_one_for_every_stage():
    assert {path.stem.split("-")[0] for path in CONFIGS} == {"pretrain", "finetune", "evaluate"}


def test_commits_are_checked_with_the_tools_of_the_constraints():
    root = Path(__file__).parents[1]
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (root / "constraints.txt").read_text(), re.M))
    hooks = re.findall(r"ruff==(\S+)\]", (root / ".pre-commit-config.yaml").read_text())
    assert hooks == [pinned["ruff"]] * 2
