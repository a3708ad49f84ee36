"""The house: imports run one way, wings are entered through their door, the core stays small.

`python tests/test_house.py` prints the lines of code of every part.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A file imports from lower floors, and a wing also from itself.
FLOORS = (
    ("errors",),
    ("config", "machines", "cli"),
    ("layout",),
    ("columns", "params", "data", "tasks"),
    ("mesh",),
    ("attention", "cpu", "lora"),
    ("model",),
    ("loss", "files"),
    ("watching",),
    ("decoding",),
    ("training",),
    ("evaluation", "planning", "benchmarks", "jobs", "replay"),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
CORE = {"attention", "decoding", "training"}  # beside the files at the top
CORE_LINES = 3000
OPEN_WINGS = {"data", "tasks", "watching"}  # folders of independent files, each imported by its own name

FILES = sorted(
    path for folder in ("pd_jax", "scripts", "convert") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def part_of(path: Path) -> str:
    """The file at the top, or the wing, that a file of pd_jax belongs to; "" for pd_jax itself and for scripts."""
    inside = path.relative_to(ROOT).parts
    return "" if inside[0] != "pd_jax" or inside[1] == "__init__.py" else inside[1].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports from pd_jax, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pd_jax":
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "pd_jax"]
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of pd_jax that a file imports from."""
    return {module.split(".")[1] if "." in module else name for module, name in imports_of(path)} - {""}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_one_way(path):
    own = part_of(path)
    upward = {
        part for part in parts_imported(path) if own and part != own and FLOOR.get(part, -1) >= FLOOR.get(own, -1)
    }
    assert own == "" or own in FLOOR, f"{path} stands on no floor"
    assert upward == set()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nobody_imports_what_is_private(path):
    assert [name for _, name in imports_of(path) if name.startswith("_") and not name.startswith("__")] == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_wings_are_entered_through_their_door(path):
    inner = [
        module
        for module, _ in imports_of(path)
        if module.count(".") > 1 and module.split(".")[1] not in {part_of(path), *OPEN_WINGS}
    ]
    assert inner == []


def test_imports_have_no_circle():
    """Between files, in a wing too; what is imported while types are checked only does not count."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.parts[-1] == "__init__.py" or "pd_jax" not in path.relative_to(ROOT).parts:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = {m if n == "" or f"{m}.{n}" not in modules() else f"{m}.{n}" for m, n in imports_of(path)}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def modules() -> set[str]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_says_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert len(text.splitlines()[0]) > 20


def test_tests_do_not_import_tests():
    paths = (ROOT / "tests").rglob("*.py")
    wrong = [
        str(path.relative_to(ROOT))
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_")
    ]
    assert wrong == []


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    text = path.read_text(encoding="utf-8")
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in kinds
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def lines_by_part() -> dict[str, int]:
    """Lines of code of pd_jax: "core" for the files at the top, and every wing."""
    totals: dict[str, int] = {}
    for path in FILES:
        inside = path.relative_to(ROOT).parts
        if inside[0] == "pd_jax":
            part = inside[1] if len(inside) > 2 else "top level"
            totals[part] = totals.get(part, 0) + code_lines(path)
    return totals


def core_lines() -> int:
    return sum(lines for part, lines in lines_by_part().items() if part in CORE | {"top level"})


def test_the_core_stays_small():
    assert 1000 < core_lines() <= CORE_LINES


if __name__ == "__main__":
    for part, lines in lines_by_part().items():
        print(f"{part:12} {lines:5}")
    print(f"{'core':12} {core_lines():5} of at most {CORE_LINES} (top level, {', '.join(sorted(CORE))})")
