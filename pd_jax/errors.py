"""The one exception for what a user can mend, and checks of values that every part shares.

The scripts print an `InputError` as one line; everything else keeps its traceback.
"""

import reprlib
from typing import Any


class InputError(ValueError):
    """Bad input: a flag, a file, a setting, an argument of the API. The message names the thing, its value and the way
    out. It is a `ValueError`, so that callers of the API catch what Python's own functions would raise."""


def check_text(value: Any, name: str) -> str:
    """`value`, if it is text that UTF-8 can write. Raises `InputError`, which begins with `name`."""
    if not isinstance(value, str):
        shown = "null" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
        raise InputError(f"{name} is {shown}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise InputError(f"{name} has {half!r} at character {error.start}, half of a character; remove it") from None
    return value
