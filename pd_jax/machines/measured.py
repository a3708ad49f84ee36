"""What `scripts/doctor.py` found on this machine: one report for each kind of device, in the user's cache directory.

Beside the data sheets (`pd_jax.machines.sheets`) this is the one place for what a machine can do.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pd_jax.machines.sheets import Machine, data_sheet


def report_path(device_kind: str) -> Path:
    """Where the report on a jax `device_kind` lies, if there is one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "pd_jax", f"doctor-{re.sub(r'[^A-Za-z0-9]+', '-', device_kind)}.json")


def _last_report(device_kind: str) -> dict[str, Any]:
    """The newest report; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        report = json.loads(report_path(device_kind).read_text(encoding="utf-8"))
        if isinstance(report, dict):
            return report
    return {}


def wrong_backends(device_kind: str) -> dict[str, str]:
    """The attention backends that gave wrong results on this machine, and the words for it."""
    wrong = _last_report(device_kind).get("wrong_backends", [])
    return {name: f"scripts/doctor.py found it WRONG here, see {report_path(device_kind)}" for name in wrong}


def measured(device_kind: str) -> Machine | None:
    """The machine as it was measured here; what was not measured is from its data sheet. None: nothing was."""
    figures = _last_report(device_kind).get("figures", {})
    known = {name: figures[name] for name in ("flops", "bandwidth", "link") if name in figures}
    return replace(data_sheet(device_kind) or Machine(device_kind, 0), **known) if known else None
