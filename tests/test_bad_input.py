"""Bad input as a user meets it: one line that says what is wrong, exit code 2, and nothing written."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
TRAIN = ["--max-steps", "1", "--batch-size", "8"]  # the tests have 8 devices


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Good inputs, and what is wrong with the others by name."""
    folder = tmp_path_factory.mktemp("inputs")
    base = tiny.model_directory(folder / "base")

    def copy(name: str, *without: str) -> Path:
        shutil.copytree(base, folder / name)
        for file in without:
            (folder / name / file).unlink()
        return folder / name

    copy("no-config", "config.json")
    copy("no-tokenizer", "tokenizer.json")
    (copy("damaged") / "tokenizer.json").write_text("{}")
    plain = copy("plain") / "config.json"
    plain.write_text(json.dumps({k: v for k, v in json.loads(plain.read_text()).items() if k != "pd_jax"}))
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "run.yaml").write_text("branch_cuont: 3\n")
    (folder / "latin.yaml").write_bytes(b"seed: 1 # caf\xe9\n")
    tiny.documents(folder / "web.jsonl")
    tiny.squad(folder / "squad.json")
    (folder / "not-squad.json").write_text('{"rows": []}')
    (folder / "no-questions.json").write_text(
        json.dumps({"data": [{"title": "", "paragraphs": [{"context": "x", "qas": []}]}]})
    )
    return {path.name: str(path) for path in folder.iterdir()}


def pretrain(model: str = "base", *more: str) -> list[str]:
    return ["pretrain", "--model-name", f"@{model}", "--random-init", "--dataset-name", "@web.jsonl", *TRAIN, *more]


def finetune(data: str, *more: str) -> list[str]:
    return ["finetune", "--model-name", "@base", "--random-init", "--dataset-name", f"@{data}", *TRAIN, *more]


def demo(model: str, *questions: str) -> list[str]:
    return ["demo", "--model-name", f"@{model}", "--background", "A tower.", "--questions", *questions]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (pretrain("no-config"), "has no config.json"),
        (pretrain("no-tokenizer"), "has no tokenizer"),
        (pretrain("damaged"), "its tokenizer cannot be read"),
        (pretrain("adapter"), "is a LoRA adapter; pass its base"),
        (pretrain("plain", "--pair-indices", "16"), "outside 1..8"),
        (pretrain("base", "--branch-cuont", "3"), "did you mean --branch-count?"),
        (pretrain("base", "--config", "@run.yaml"), "unknown key 'branch_cuont' (did you mean branch_count?)"),
        (pretrain("base", "--config", "@latin.yaml"), "is not valid YAML"),
        (pretrain("base", "--attention", "splash"), "it needs a TPU, this is cpu"),
        (pretrain("base", "--attention", "flash"), "invalid choice: 'flash'"),
        (pretrain("base", "--streaming", "--branch-count", "10000"), "the data end before the first step"),
        (finetune("not-squad.json"), "not-squad.json"),
        (finetune("no-questions.json"), "questions"),
        (finetune("squad.json", "--max-length", "16"), "no context"),
        (finetune("squad.json", "--max-eval-samples", "2"), "--max-eval-samples"),
        (
            ["evaluate", "--ft-model", "@base", "--dataset-name", "@squad.json", "--max-new-tokens", "32768"],
            "max_position_embeddings 32768; shorten the context or lower --max-new-tokens",
        ),
        (demo("base", ""), "--questions has an empty one"),
        (demo("base"), "belong together"),
        (demo("adapter", "How high?"), "pass it as --base-model"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(a.strip("-@") for a in (x[0], *x[-2:])),
)
def test_bad_input(files, tmp_path, monkeypatch, capsys, command, message):
    script, *arguments = [files.get(a[1:], a) if a.startswith("@") else a for a in command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())
