"""The output directory of a training run: run.json says what runs there, so that the same command goes on with it."""

import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from pd_jax.errors import InputError

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
    run = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"--{name.replace('_', '-')} {flags.get(name)} (was {run['flags'].get(name)})"
        for name in sorted(set(flags) | set(run["flags"]))
        if name not in FREE_ON_RESUME and flags.get(name) != run["flags"].get(name)
    ]
    if changed:
        raise InputError(f"--output-dir {output} holds a run with other flags: {', '.join(changed)}; use another one")
    return not run["finished"]


def check_base(output: Path, base: Base) -> None:
    """Raise `InputError` when the LoRA run in --output-dir was started on other weights than `base`."""
    path = output / "run.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["base"] if path.is_file() else base
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
