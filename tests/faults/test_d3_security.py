"""Nothing that is read is run, nothing that is read leads out of its directory, nothing is told to anybody."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from sources import make_source

from pd_jax.cli import flag, parse
from pd_jax.errors import InputError
from pd_jax.evaluation.report import _html_table
from pd_jax.files import find_source, load_config, load_params

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("pd_jax", "scripts", "convert") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "pty"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


def found(path: Path) -> list[str]:
    """What a source file does that could run what it reads."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            out += [name for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            out += [name for name in [ast.unparse(node.func)] if name in CALLS]
            out += [word.arg for word in node.keywords if word.arg in KEYWORDS]
    return out


def test_no_file_runs_what_it_reads(tmp_path):
    assert {path.name: found(path) for path in SOURCES if found(path)} == {}
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom os import system\nos.system('x')\nyaml.load(f)\nf(trust_remote_code=True)\n")
    assert len(found(bad)) == 4


def test_a_model_directory_s_code_is_not_run(tmp_path):
    """`auto_map` asks for the code beside it; transformers would ask, we do not even look."""
    source = make_source(tmp_path / "model")
    tiny.tokenizer().save_pretrained(source)
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        content["auto_map"] = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"]}
        (source / name).write_text(json.dumps(content))
    from pd_jax.files import load_tokenizer

    assert load_config(source, ()).vocab_size == 64
    assert len(load_tokenizer(source)) == 320


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "sub/part.safetensors", "", ".", "..", "a\0b"]
)
def test_an_index_names_files_of_its_directory_only(tmp_path, name):
    source = make_source(tmp_path / "model")
    (source / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="which is no file of its directory"):
        load_params(source, load_config(source, ()))


def test_an_adapter_s_base_is_a_model_or_refused(tmp_path):
    """A name from a file is looked up like one from the command line: never run, never written to."""
    (tmp_path / "adapter").mkdir()
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "/etc"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    model, adapter = find_source(str(tmp_path / "adapter"), None, True)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(model, (), adapter)


def test_yaml_builds_no_objects(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Flags:
        name: str = flag("a", "text")

    path = tmp_path / "flags.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch %s']\n" % (tmp_path / "ran"))
    with pytest.raises(InputError, match="not valid YAML"):
        parse(Flags, ["--config", str(path)])
    assert not (tmp_path / "ran").exists()


def test_what_a_model_says_is_text_in_the_report():
    said = "<script>alert('x')</script> & \"q\""
    page = _html_table(said, [said], [[said]])
    assert "<script>" not in page
    assert page.count(html.escape(said)) == 3


def test_nobody_is_told():
    """The hub's libraries send usage figures unless they are told not to; whoever wants that sets the variable."""
    program = "import os; from pd_jax.cli import run; run(lambda: print(os.environ['HF_HUB_DISABLE_TELEMETRY']))"
    plain = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    for environment, told in ((plain, "1"), (plain | {"HF_HUB_DISABLE_TELEMETRY": "0"}, "0")):
        said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert said.stdout.strip() == told
    addresses = [url for path in SOURCES for url in re.findall(r"urlopen|requests\.|socket\.create", path.read_text())]
    assert addresses == ["urlopen"]  # SQuAD's official file, where the hub cannot be reached
