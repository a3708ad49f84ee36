"""What every reader of files checks: that JSON is a JSON object, and that the arrays found are those expected."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pd_jax.errors import InputError


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` naming the file when it is absent or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}{advice}") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


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


def raise_collected(where: Path, errors: list[str], shown: int = 20) -> None:
    """Raise one `InputError` for `errors`, if there are any."""
    if errors:
        more = f"; and {len(errors) - shown} more" if len(errors) > shown else ""
        raise InputError(f"{where}: " + "; ".join(errors[:shown]) + more)
