"""The one exception for what a user can mend, and checks of values that every part shares.

The scripts print an `InputError` as one line; everything else keeps its traceback.
"""

import operator
import reprlib
from typing import Any


class InputError(ValueError):
    """Bad input: a flag, a file, a setting, an argument of the API. The message names the thing, its value and the way
    out. It is a `ValueError`, so that callers of the API catch what Python's own functions would raise."""


def shown(value: Any) -> str:
    """`value` for a message: short, and on one line."""
    return " ".join(reprlib.repr(value).split())


def check_whole(value: Any, name: str, wanted: str = "a whole number") -> int:
    """`value` as an int, if it is one, numpy's too. Raises `InputError` for floats, infinities and bools."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{name} is {shown(value)}; it must be {wanted}")


def check_text(value: Any, name: str) -> str:
    """`value`, if it is text that UTF-8 can write. Raises `InputError`, which begins with `name`."""
    if not isinstance(value, str):
        what = "null" if value is None else f"{shown(value)} ({type(value).__name__})"
        raise InputError(f"{name} is {what}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise InputError(f"{name} has {half!r} at character {error.start}, half of a character; remove it") from None
    return value
