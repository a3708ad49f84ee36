"""The output directory of a training run: run.json says what runs there, so that the same command goes on with it."""

import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from pd_jax.errors import InputError
from pd_jax.files.checks import COUNT, FLAG, OBJECT, TEXT, check_fields, read_json

Base = dict[str, str]  # the name and the fingerprint of the model that adapters belong to

# Flags that may differ when a run is resumed: they do not change what is learned.
FREE_ON_RESUME = {
    "logging_steps", "save_steps", "eval_steps", "keep", "mesh", "attention", "local_files_only", "output_dir",
    "profile", "skip_bad_rows", "workers", "coordinator_address", "num_processes", "process_id",
}  # fmt: skip


def check_output(output: Path, flags: dict[str, Any]) -> bool:
    """True when this run is new or to be continued, False when it has finished. Writes nothing.

    Raises `InputError` for a directory that holds something else, or a run with other flags.
    """
    path = output / "run.json"
    if not path.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
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
    kinds = {"flags": OBJECT, "base": OBJECT, "finished": FLAG}
    run = read_json(path, kinds=kinds)
    missing = [key for key in ("flags", "finished") if run.get(key) is None]
    base = run.setdefault("base", None)
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
    stage = path.with_name(f".{path.name}")
    stage.write_bytes(b"".join(line + b"\n" for line in kept))
    stage.replace(path)


def check_base(output: Path, base: Base) -> None:
    """Raise `InputError` when the LoRA run in --output-dir was started on other weights than `base`."""
    stored = (read_run(output)["base"] if (output / "run.json").is_file() else None) or base
    if stored["fingerprint"] != base["fingerprint"]:
        raise InputError(
            f"--output-dir {output} holds a run on {stored['name']} with fingerprint "
            f"{stored['fingerprint'][:12]}, and the files of {base['name']} have {base['fingerprint'][:12]}; "
            "restore that base, or use another --output-dir"
        )


def write_run(output: Path, flags: dict[str, Any], base: Base | None, *, finished: bool) -> None:
    """run.json: the resolved flags, the base of a LoRA run, and whether the run is over."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run.json")  # every process has read the one before, or is done
    output.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        stage = output / ".run.json"
        run = {"flags": flags, "base": base, "finished": finished}
        stage.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        stage.replace(output / "run.json")
