"""The one exception for what a user can mend: the scripts print it as one line, everything else keeps its traceback."""


class InputError(ValueError):
    """Bad input: a flag, a file, a setting, an argument of the API. The message names the thing, its value and the way
    out. It is a `ValueError`, so that callers of the API catch what Python's own functions would raise."""
