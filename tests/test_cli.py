import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pd_jax.cli import flag, parse, run
from pd_jax.data import pipeline


@dataclass(frozen=True)
class Flags:
    branch_count: int = flag(16, "branches a sample", group="data", minimum=1)
    learning_rate: float = flag(4e-4, "peak learning rate", group="optimiser")
    use_lora: bool = flag(False, "train adapters only")
    pair_indices: tuple[int, ...] | None = flag(None, "1-based frequency indices")
    names: tuple[str, ...] = flag(("q", "v"), "module names")
    mode: Literal["left", "right"] = flag("left", "alignment")


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_yaml_then_flags(tmp_path):
    path = write(tmp_path, "branch-count: 4\nlearning_rate: 1e-4\nuse-lora: true\npair_indices: [2, 4]\n")
    assert parse(Flags, []) == Flags()
    assert parse(Flags, ["--config", path]) == Flags(4, 1e-4, True, (2, 4))
    assert parse(Flags, ["--config", path, "--branch-count", "8", "--no-use-lora"]) == Flags(8, 1e-4, False, (2, 4))


def test_an_empty_list_is_a_value():
    assert parse(Flags, ["--pair-indices"]).pair_indices == ()


def test_a_flag_of_several_values_may_be_given_again():
    assert parse(Flags, ["--pair-indices", "1", "2", "--pair-indices", "3"]).pair_indices == (1, 2, 3)
    assert parse(Flags, ["--pair-indices", "1"]).pair_indices == (1,)  # the default is replaced


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--brnch-count", "3"], r"unrecognized argument --brnch-count \(did you mean --branch-count\?\)"),
        (["--branch", "3"], "unrecognized argument --branch"),
        (["--branch-count", "0"], "--branch-count 0 is below 1"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(Flags, argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("branch_cuont: 3", r"unknown key 'branch_cuont' \(did you mean branch_count\?\)"),
        ("branch_count: 2.5", "2.5 in the YAML file is not int"),
        ("branch_count: many", "'many' in the YAML file is not int"),
        ("use_lora: 1", "1 in the YAML file is not bool"),
        ("mode: middle", "--mode 'middle' is not one of left, right"),
        ("branch_count: 0", "--branch-count 0 is below 1"),
        ("[1, 2]", "holds list"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(Flags, ["--config", write(tmp_path, text)])


def test_bad_values_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Flags, ["--branch-count", "three"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --branch-count: invalid int value: 'three'")


def test_what_a_user_can_mend_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: print(parse(Flags, ["--mod", "left"])))
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized argument --mod (did you mean --mode?)\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device", "/x/y"), 2, "error: [Errno 28] No space left on device: '/x/y'\n"),
        (ConnectionError("two\nlines"), 2, "error: two lines\n"),
        (FloatingPointError("nan"), 1, "error: nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command run again goes on or begins anew\n"),
    ],
)
def test_what_the_system_says_is_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Also a `ValueError` that Python raises inside pd_jax, as `zip(strict=True)` does."""
    monkeypatch.setattr("pd_jax.data.pipeline.pack", lambda lengths, capacity: [*zip([1], [], strict=True)])
    with pytest.raises(ValueError, match="zip"):
        run(lambda: print(pipeline.finetune_rows([3], 8, 1, 0)))
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda: print(int("x")))


def test_every_error_of_ours_is_an_input_error():
    root = Path(__file__).parents[1]
    files = [path for folder in ("pd_jax", "scripts", "convert") for path in (root / folder).rglob("*.py")]
    wrong = [str(path) for path in files if "raise ValueError" in path.read_text(encoding="utf-8")]
    assert files
    assert wrong == []


@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate", "demo", "answer", "quickstart", "visualize"])
def test_help_is_grouped_and_does_not_wait_for_jax(script):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_path('scripts/{script}.py', run_name='__main__')"
    code = f"import atexit, sys\natexit.register(lambda: print('JAX' if 'jax' in sys.modules else 'NONE'))\n{code}"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "--output-dir" in done.stdout or script in ("demo", "answer")
    assert done.stdout.endswith("NONE\n")


def test_a_reader_that_goes_away_is_no_traceback():
    program = "from pd_jax.cli import run; run(lambda: [print('x' * 1000) for _ in range(1000)])"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
