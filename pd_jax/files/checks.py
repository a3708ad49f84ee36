"""What every reader of files checks: that JSON holds what it should, and that the arrays found are those expected."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pd_jax.errors import InputError


class Kind(NamedTuple):
    """What the value of a key may be."""

    says: str
    fits: Callable[[Any], bool]


COUNT = Kind("a whole number, 1 or more", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1)
NUMBER = Kind("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("text", lambda v: isinstance(v, str))
TEXTS = Kind("a list of texts", lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v))
COUNTS = Kind("a list of whole numbers", lambda v: isinstance(v, list) and all(map(COUNT.fits, v)))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))


def read_json(path: Path, advice: str = "", kinds: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `kinds` says what keys may hold, where they are there and not null.

    Raises `InputError` naming the file when it is absent or holds anything else, and the key of a wrong value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}{advice}") from None
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object")
    check_fields(path, content, kinds or {})
    return content


def check_fields(where: Path | str, content: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise `InputError` naming every key of `content` that is neither null nor of its kind."""
    errors = [
        f"{key} is {json.dumps(content[key])[:80]}, not {kind.says}"
        for key, kind in kinds.items()
        if content.get(key) is not None and not kind.fits(content[key])
    ]
    raise_collected(where, errors)


def finite(array: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity in floats of 2 or 4 bytes: by their bits, as fast as they are read."""
    exponent = np.array(np.inf, array.dtype).view(f"u{array.dtype.itemsize}")
    return not np.any((array.view(exponent.dtype) & exponent) == exponent)


def differences(found: Mapping[str, Any], expected: Mapping[str, Sequence[int]], source: str) -> list[str]:
    """A line for every array that is missing, unknown or of another shape than `source` says.

    `found` has anything with a shape by name, `expected` the shapes.
    """
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is unknown" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name].shape)}, {source} {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ),
    ]


def raise_collected(where: Path | str, errors: list[str], shown: int = 20) -> None:
    """Raise one `InputError` for `errors`, if there are any."""
    if errors:
        more = f"; and {len(errors) - shown} more" if len(errors) > shown else ""
        raise InputError(f"{where}: " + "; ".join(errors[:shown]) + more)


def check_agreement(asked: Mapping[str, Any], stored: Mapping[str, Any], where: Path) -> None:
    """Raise `InputError` for a flag `asked` for by hand that contradicts what is `stored` in `where`."""
    for name, value in stored.items():
        if name in asked and asked[name] != value:
            shown = " ".join(map(str, asked[name])) if isinstance(asked[name], tuple) else asked[name]
            raise InputError(f"--{name.replace('_', '-')} {shown} was given, but {where} has {value}; leave it out")


def check_needed(asked: Mapping[str, Any], needed: str, there: Any, *names: str) -> None:
    """Raise `InputError` for a flag of `names` that was `asked` for in vain, because `needed` is not there."""
    ignored = [name for name in names if name in asked and not there]
    if ignored:
        raise InputError(f"--{ignored[0].replace('_', '-')} is for {needed}, which is not here; leave it out")
