"""The HTML file of a replay: the template beside this file, with the records inside as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_jax.errors import InputError
from pd_jax.machines import write_whole

TEMPLATE = Path(__file__).with_name("page.html")
# JSON stands inside a <script>, where only these could end it or be read as markup.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One file that shows `records` (see `record`) and asks for nothing from anywhere. Raises `InputError` where it
    cannot be written, and for no records."""
    if not records:
        raise InputError(f"--html {path} would show nothing; no document fits, or there is none")
    data = json.dumps(list(records), ensure_ascii=False, separators=(",", ":")).translate(ESCAPES)
    try:
        write_whole(path, TEMPLATE.read_text(encoding="utf-8").replace("RECORDS", data))
    except OSError as error:
        raise InputError(f"--html {path} cannot be written ({error}); choose another") from None
