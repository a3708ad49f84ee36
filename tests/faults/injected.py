"""Faults on purpose: a program that dies, or finds the disk full, at a change to its files that can be chosen.

    python tests/faults/injected.py SIGNAL PATTERN SCRIPT ARGUMENTS ...

runs a script of ours and sends it a signal (9 is SIGKILL) once, before its first change to a file whose "event path"
matches PATTERN.
"""  # fmt: skip

import errno
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MAKING = ("open", "os.mkdir", "os.link", "os.symlink")  # what takes room
OTHER = ("os.rename", "os.remove", "os.rmdir", "os.truncate")


class Killed(BaseException):
    """What a kill is to code that may tidy up no more."""


def changes(event: str, args: tuple) -> str | None:
    """The path that an event is about to change, if it is one that changes files."""
    if event not in (*MAKING, *OTHER) or (event == "open" and not (args[2] or 0) & WRITING):
        return None
    path = args[1] if event == "os.rename" else args[0]
    return None if isinstance(path, int) else os.fsdecode(path)


_armed: Callable[[str, str], None] | None = None
_installed = False


def _hook(event: str, args: tuple) -> None:
    if _armed is not None and (path := changes(event, args)) is not None:
        _armed(event, path)


def arm(what: Callable[[str, str], None] | None) -> None:
    """From here on `what(event, path)` is asked before every change to a file; an audit hook cannot be taken back."""
    global _armed, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _armed = what


@contextmanager
def at_change(number: int, fault: str, under: Path) -> Generator[None]:
    """The `number`-th change to a file under `under`, from 1, and every one after it, fails. "killed": with `Killed`,
    nothing is changed any more. "full": what takes room fails with ENOSPC."""
    count, mine = 0, threading.get_ident()

    def asked(event: str, path: str) -> None:
        nonlocal count
        inside = not os.path.isabs(path) or path.startswith(f"{under}{os.sep}")  # relative: below a directory's handle
        if threading.get_ident() != mine or not inside or (fault == "full" and event in OTHER):
            return
        count += 1
        if count >= number:
            raise Killed if fault == "killed" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    arm(asked)
    try:
        yield
    finally:
        arm(None)


def strike_at(number: int, pattern: str) -> None:
    def asked(event: str, path: str) -> None:
        if re.search(pattern, f"{event} {path}"):
            arm(None)
            os.kill(os.getpid(), number)

    arm(asked)


if __name__ == "__main__":
    strike_at(int(sys.argv[1]), sys.argv[2])
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    runpy.run_path(sys.argv[0], run_name="__main__")
