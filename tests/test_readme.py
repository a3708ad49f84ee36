"""The commands of the README and of docs: every flag exists, and the stages run in that order on tiny inputs."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pd_jax.benchmarks import AblateFlags, DoctorFlags
from pd_jax.config import SECTION
from pd_jax.evaluation import EvaluateFlags
from pd_jax.planning import PlanFlags
from pd_jax.training import FinetuneFlags, PretrainFlags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line]


COMMANDS = commands(README)
PAGES = {path.stem: commands(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "docs").glob("*.md"))}
STAGES, OTHERS = (
    [shlex.split(line) for line in lines if line.startswith("python ")]
    for lines in (COMMANDS + PAGES["weights"], [line for lines in PAGES.values() for line in lines])
)
FLAGS = {
    "ablate": AblateFlags,
    "doctor": DoctorFlags,
    "pretrain": PretrainFlags,
    "finetune": FinetuneFlags,
    "evaluate": EvaluateFlags,
    "plan": PlanFlags,
}


def test_the_links_of_the_pages_are_there():
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_chinese_readme_has_the_same_commands_and_figures():
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    assert commands(chinese) == COMMANDS
    for text in (README, chinese):
        assert len(text.splitlines()) <= 250

    def tables(text: str) -> list[list[str]]:
        """The figures of the tables."""
        return [re.findall(r"(?<![\w.])\d+\.\d+", line) for line in text.splitlines() if line.startswith("|")]

    assert tables(chinese) == tables(README)


def test_the_first_screen_has_exactly_two_commands_that_install():
    screen = README.splitlines()[:20]
    assert sum(line == "```bash" for line in screen) == 2
    assert [line for line in screen if "pip install" in line] == [c for c in COMMANDS if "pip install" in c]


@pytest.mark.parametrize("command", STAGES + OTHERS, ids=lambda c: " ".join(c[1:4]))
def test_every_flag_exists(command):
    from pd_jax.cli import parse

    script, argv = Path(command[1]), command[2:]
    if script.stem in FLAGS:
        flags = FLAGS[script.stem]
    elif script.stem == "benchmark":
        (flags, _), argv = runpy.run_path(str(ROOT / script))["COMMANDS"][argv[0]], argv[1:]
    else:
        flags = runpy.run_path(str(ROOT / script))["Flags"]
    parse(flags, [str(ROOT / a) if a.startswith("configs/") else a for a in argv])


def test_the_api_reference_is_made(tmp_path):
    [command] = [shlex.split(line) for line in COMMANDS if line.startswith("pdoc ")]
    out = tmp_path / "api"
    argv = [str(out) if a == "./api" else a for a in command]
    subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, check=True, capture_output=True)
    page = (out / "pd_jax" / "decoding.html").read_text(encoding="utf-8")
    assert "Answers many prompts over one background at once" in page  # the class's docstring
    assert all((out / "pd_jax" / f"{name}.html").is_file() for name in ("layout", "columns", "watching/sight"))


@pytest.mark.slow
def test_the_stages_run_in_order(tmp_path):
    """As they stand there, but for the hub's model and data, and small sizes."""
    base = tiny.model_directory(tmp_path / "base", head_dim=64, pair_indices=(8, 16, 24), num_attention_heads=2)
    web, squad = str(tiny.documents(tmp_path / "web.jsonl")), str(tiny.squad(tmp_path / "squad.json"))
    export = tmp_path / "hf"
    small = {
        "pretrain": ["--dataset-name", web, "--max-steps", "2", "--branch-count", "2", "--seq-length", "8"],
        "finetune": ["--dataset-name", squad, "--max-length", "160", "--max-steps", "2"],
        "evaluate": ["--dataset-name", squad, "--max-eval-samples", "2", "--max-new-tokens", "3", "--rows", "columns"],
        "demo": ["--max-new-tokens", "3"],
        "visualize": [],
        "hf_to_flax": [],
        "flax_to_hf": [],
    }
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}

    def run(*argv: str) -> str:
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"
        return done.stdout

    # A base with weights, made by the same scripts: one step from random weights, then Hugging Face's format.
    first = ["--random-init", "--model-name", str(base), "--output-dir", "seed", *small["pretrain"]]
    run(str(ROOT / "scripts/pretrain.py"), *first)
    run(str(ROOT / "convert/flax_to_hf.py"), "--checkpoint", "seed", "--output", str(export))
    stock = shutil.copytree(export, tmp_path / "stock")  # without our settings, as the hub has it
    content = json.loads((stock / "config.json").read_text(encoding="utf-8"))
    (stock / "config.json").write_text(json.dumps({key: content[key] for key in content if key != SECTION}))
    ran: set[str] = set()
    for command in STAGES:
        script = Path(command[1])
        if script.stem not in small or any("configs/" in a for a in command):
            continue
        model = str(stock if "--pair-indices" in command else export)
        argv = [a.replace("Qwen/Qwen3-0.6B", model) for a in command[2:] if a != "--streaming"]
        output = run(str(ROOT / script), *argv, *small[script.stem])
        ran.add(script.stem)
        if script.stem == "evaluate":
            assert "columns" in output
    assert ran == set(small)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "replay.html").is_file()
    assert (tmp_path / "pictures" / "mask.svg").is_file()
