"""Command lines from frozen dataclasses: flags, grouped help, a YAML file of defaults, one-line errors.

    @dataclass(frozen=True)
    class Flags:
        model_name: str = flag("Qwen/Qwen3-4B", "directory or hub id", group="model")

    if __name__ == "__main__":
        run(lambda: main(parse(Flags, description=__doc__)))

Nothing here imports jax: `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from pd_jax.errors import InputError

T = TypeVar("T")


def flag(default: Any, help: str, *, group: str = "options", minimum: float | None = None) -> Any:
    """A dataclass field that is a command-line flag. `minimum` bounds a number from below, inclusively.

    Its annotation is int, float, str, bool or a Literal of strings, or a tuple of one, or any of them `| None`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "minimum": minimum})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class _Kind(typing.NamedTuple):
    """A field's annotation, taken apart; `X | None` counts as X."""

    scalar: type
    many: bool
    choices: tuple[str, ...] | None


def _kind(annotation: Any) -> _Kind:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    many = typing.get_origin(annotation) is tuple
    annotation = typing.get_args(annotation)[0] if many else annotation
    if typing.get_origin(annotation) is typing.Literal:
        return _Kind(str, many, typing.get_args(annotation))
    return _Kind(annotation, many, None)


def _option(name: str) -> str:
    """A field's flag; `from_` is --from, because a field cannot have a keyword's name."""
    return "--" + name.rstrip("_").replace("_", "-")


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _coerce(value: Any, kind: type, many: bool, name: str) -> Any:
    """A YAML value as the field's type; PyYAML reads 1e-4 as text, so text that is a number counts as one."""
    if value is None:
        return None
    if many:
        return tuple(_coerce(v, kind, False, name) for v in (value if isinstance(value, list) else [value]))
    if isinstance(value, bool) == (kind is bool) and not isinstance(value, list | dict):
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            pass
        else:
            if kind is not int or number == float(value):
                return number
    raise InputError(f"{name}: {value!r} in the YAML file is not {kind.__name__}")


def _read_yaml(path: str, fields: dict[str, dataclasses.Field], hints: dict[str, Any]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"--config {path} holds {type(loaded).__name__}; write one `flag: value` a line")
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise InputError(f"--config {path}: unknown key {key!r}{_suggest(name, list(fields))}")
        kind = _kind(hints[name])
        values[name] = _coerce(value, kind.scalar, kind.many, name=f"--config {path}: {key}")
    return values


def parse(flags: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """An instance of the dataclass `flags` from `argv`: defaults < the --config file < flags given by hand.

    Raises `InputError` for an unknown flag or YAML key (with the nearest known one) and for a value out of range.
    """
    hints = typing.get_type_hints(flags)
    fields = {f.name: f for f in dataclasses.fields(flags)}  # ty: ignore[invalid-argument-type]
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict[str, Any] = {"options": parser}
    parser.add_argument("--config", metavar="FILE.yaml", help="a file of defaults; flags given by hand win")
    for name, field in fields.items():
        kind, many, choices = _kind(hints[name])
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = field.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{text} (default: {shown})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices}
            options |= {"nargs": "*", "action": "extend"} if many else {}
            if choices is None:
                options["metavar"] = {int: "N", float: "X"}.get(kind, name.strip("_").split("_")[-1].upper())
        groups[title].add_argument(_option(name), dest=name, **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(f"unrecognized argument {unknown[0]}{_suggest(unknown[0].split('=')[0], known)}")
    values = vars(given)
    path = values.pop("config")
    if path is not None:
        values = _read_yaml(path, fields, hints) | values
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
        choices, minimum = _kind(hints[name]).choices, fields[name].metadata["minimum"]
        wrong = [v for v in (value if isinstance(value, tuple | list) else [value]) if choices and v not in choices]
        if wrong and choices and value is not None:
            raise InputError(f"--{name.replace('_', '-')} {wrong[0]!r} is not one of {', '.join(choices)}")
        numbers = value if isinstance(value, tuple | list) else [value]
        if minimum is not None and value is not None and not all(number >= minimum for number in numbers):
            raise InputError(f"{_option(name)} {value} is below {minimum}, the least that makes sense")
    made = flags(**values)
    object.__setattr__(made, "_given", frozenset(values))
    return made


def given(flags: Any) -> dict[str, Any]:
    """What was given by hand or in the --config file; of flags that were not parsed, what is not their default."""
    parsed = getattr(flags, "_given", ())
    values = {f.name: (getattr(flags, f.name), f.default) for f in dataclasses.fields(flags)}
    return {name: value for name, (value, default) in values.items() if name in parsed or value != default}


# What is no bug becomes one line and an exit code: bad input, the system (disks, permissions, the network), training
# that has diverged, Ctrl-C.
CODES = {InputError: 2, OSError: 2, FloatingPointError: 1, KeyboardInterrupt: 130}


def run(main: Callable[[], None]) -> None:
    """Run a script. Errors in `CODES` become one line on stderr and that exit code, a reader that went away (`| head`)
    exit code 1; every other error is a bug and keeps its traceback."""
    # Threads of ours tokenise already; and nobody is told what runs here, unless asked to.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"} | os.environ
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pd_jax.attention").setLevel(logging.INFO)  # it says which attention backend was taken
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has nowhere to go
        raise SystemExit(1) from None
    except tuple(CODES) as error:
        text = " ".join(str(error).split()) or "interrupted; the same command run again goes on or begins anew"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(next(code for kind, code in CODES.items() if isinstance(error, kind))) from None
