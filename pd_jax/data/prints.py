"""What identifies a data set, so that a run is not resumed on another one under the same name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

WHOLE = 4 << 30  # bytes: larger files are hashed at PIECES places
PIECES, PIECE = 256, 1 << 20


def data_prints(names: Iterable[str | None], local_files_only: bool = False) -> dict[str, str]:
    """By name: the size and the sha256 of a local file (of very large ones, of many places), both of all files of a
    local directory, or the revision of a hub data set. A name of which nothing can be known is left out."""
    prints = {name: _print(name, local_files_only) for name in names if name is not None}
    return {name: text for name, text in prints.items() if text is not None}


def _print(name: str, local_files_only: bool) -> str | None:
    path = Path(name)
    if path.is_file():
        return _file_print(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        text = "\n".join(f"{p.relative_to(path)} {_file_print(p)}" for p in files)
        return f"{len(files)} files, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    try:
        if local_files_only or huggingface_hub.is_offline_mode():
            place = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
            return f"revision {Path(place).name}"
        return f"revision {huggingface_hub.HfApi().dataset_info(name, timeout=30).sha}"
    except (OSError, ValueError):
        return None


def _file_print(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return f"{size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        total = hashlib.sha256()
        for piece in range(PIECES):
            file.seek((size - PIECE) * piece // (PIECES - 1))
            total.update(file.read(PIECE))
    return f"{size} bytes, sha256 of {PIECES} places {total.hexdigest()}"
