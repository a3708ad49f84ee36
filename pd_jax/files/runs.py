"""Who writes an output directory, alone; and of a training run what it is: run.json, with which the same command goes
on."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from pd_jax.errors import InputError
from pd_jax.files.checks import COUNT, FLAG, OBJECT, TEXT, check_fields, read_json
from pd_jax.files.saving import LOCK, check_new, left_in, staging
from pd_jax.machines import write_whole

Base = dict[str, str]  # the name and the fingerprint of the model that adapters belong to

log = logging.getLogger(__name__)

# Flags that may differ when a run is resumed: they do not change what is learned.
FREE_ON_RESUME = {
    "logging_steps", "save_steps", "eval_steps", "keep", "mesh", "attention", "local_files_only", "output_dir",
    "profile", "skip_bad_rows", "workers", "coordinator_address", "num_processes", "process_id",
}  # fmt: skip


@contextmanager
def claim(output: Path) -> Generator[None]:
    """Hold `output` alone while a block runs, by a lock that dies with its process; of several processes of one run the
    first holds it. A directory in which nothing was left is removed again.

    Raises `InputError` naming host and process when another holds it, and for one that cannot be made.
    """
    if jax.process_index() != 0 or (output.exists() and not output.is_dir()):
        yield
        return
    lock, path = None, output / LOCK
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        assert lock is not None
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise InputError(f"{output} is in use by {holder}; wait for it, or use another directory") from None
    except OSError as error:
        if lock is None and not output.is_dir():
            raise InputError(f"the directory {output} cannot be made ({error}); choose another") from None
        if lock is not None:
            log.warning("%s cannot be locked (%s); start only one run in it", output, error)
    else:
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            lock.close()  # its holder has just ended and removed it
            with claim(output):
                yield
            return
        lock.truncate(0)
        with suppress(OSError):  # the lock holds without it, too
            os.write(lock.fileno(), f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                output.rmdir()
            lock.close()


@contextmanager
def making(output: Path) -> Generator[Path]:
    """`staging` of a conversion, alone in `output`, in which nothing may be."""
    with claim(output):
        check_new(output)
        with staging(output) as stage:
            yield stage


def check_output(output: Path, flags: dict[str, Any]) -> bool:
    """True when this run is new or to be continued, False when it has finished. Writes nothing.

    Raises `InputError` for a directory that holds something else, or a run with other flags.
    """
    path = output / "run.json"
    if not path.is_file():
        if output.exists() and (not output.is_dir() or left_in(output)):
            raise InputError(f"--output-dir {output} holds files of something else; choose an empty or a new directory")
        return True
    run = read_run(output)
    changed = [
        f"--{name.replace('_', '-')} {flags.get(name)} (was {run['flags'].get(name)})"
        for name in sorted(set(flags) | set(run["flags"]))
        if name not in FREE_ON_RESUME and flags.get(name) != run["flags"].get(name)
    ]
    if changed:
        raise InputError(f"--output-dir {output} holds a run with other flags: {', '.join(changed)}; use another one")
    return not run["finished"]


def read_run(output: Path) -> dict[str, Any]:
    """run.json, its keys checked."""
    path = output / "run.json"
    kinds = {"flags": OBJECT, "base": OBJECT, "data": OBJECT, "finished": FLAG}
    run = read_json(path, kinds=kinds)
    missing = [key for key in ("flags", "finished") if run.get(key) is None]
    base = run.setdefault("base", None)
    run["data"] = run.get("data") or {}
    check_fields(f"{path}: data", run["data"], dict.fromkeys(run["data"], TEXT))
    if base is not None:
        check_fields(f"{path}: base", base, {"name": TEXT, "fingerprint": TEXT})
        missing += [f"base.{key}" for key in ("name", "fingerprint") if base.get(key) is None]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; restore the file, or use another --output-dir")
    return run


def keep_metrics(path: Path, last: int) -> None:
    """Drop the lines of metrics.jsonl behind step `last`, and one that a kill cut short at its end; all or nothing.

    Raises `InputError` for a line that holds anything else than the metrics of a step.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, LookupError, TypeError, RecursionError):
            step = None
        if isinstance(step, int) and COUNT.fits(step):
            kept += [line] if step <= last else []
        elif number < len(lines) or line.endswith(b"}"):
            raise InputError(f"{path}: line {number} has no step; mend the line or remove it")
    write_whole(path, b"".join(line + b"\n" for line in kept))


def check_base(output: Path, base: Base) -> None:
    """Raise `InputError` when the LoRA run in --output-dir was started on other weights than `base`."""
    stored = (read_run(output)["base"] if (output / "run.json").is_file() else None) or base
    if stored["fingerprint"] != base["fingerprint"]:
        raise InputError(
            f"--output-dir {output} holds a run on {stored['name']} with fingerprint "
            f"{stored['fingerprint'][:12]}, and the files of {base['name']} have {base['fingerprint'][:12]}; "
            "restore that base, or use another --output-dir"
        )


def check_data(output: Path, prints: Mapping[str, str]) -> None:
    """Raise `InputError` when the run in --output-dir was started on other data: a position in them would mean other
    rows. `prints` are those of `data.prints` by the name of the data."""
    stored = read_run(output)["data"] if (output / "run.json").is_file() else {}
    for name, print_ in prints.items():
        if stored.get(name, print_) != print_:
            raise InputError(
                f"--output-dir {output} holds a run on {name} as it was then ({stored[name][:40]}), and it has changed "
                f"({print_[:40]}); restore it, or use another --output-dir"
            )


def write_run(
    output: Path, flags: dict[str, Any], base: Base | None, data: Mapping[str, str], *, finished: bool
) -> None:
    """run.json: the resolved flags, the base of a LoRA run, the prints of the data, and whether the run is over."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run.json")  # every process has read the one before, or is done
    output.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        run = {"flags": flags, "base": base, "data": dict(data), "finished": finished}
        write_whole(output / "run.json", json.dumps(run, indent=2) + "\n")
