"""What goes wrong with disks, said with the file's name; and files that are written whole or not at all."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Generator[None]:
    """An `OSError` of the block names `path`: those of writing to an open file name nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """All or nothing: what was at `path` stays until the new content is whole. The directory is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.partial")
    try:
        with naming(stage):
            stage.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(stage, path)
    except OSError:
        stage.unlink(missing_ok=True)
        raise
