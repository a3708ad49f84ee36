"""TensorBoard's event files, written by whoever has something to say.

Not with tensorboardX's SummaryWriter: its thread dies of a full disk, and whoever adds to its queue waits for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]

from pd_jax.machines import naming


class EventFile:
    """A new file in `directory`. What earlier files say of `first` and later steps is hidden."""

    def __init__(self, directory: Path, first: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.file = directory, EventsWriter(str(directory / "events"))
        self._write(first, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def _write(self, step: int, **what: Any) -> None:
        with naming(self.directory):
            self.file.write_event(Event(step=step, wall_time=time.time(), **what))
            self.file.flush()

    def close(self) -> None:
        with naming(self.directory):
            self.file.close()
