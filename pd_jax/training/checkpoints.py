"""Training checkpoints: what a run leaves in its output directory to go on from."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from pd_jax.files import digest, root_cause
from pd_jax.training.step import State
from pd_jax.watching.monitor import say


class Checkpoints:
    """Training states under `directory`: written in the background, whole or not at all; the newest `keep` and the one
    with the lowest loss stay. Used as a context: leaving it waits for the save in flight, which is lost otherwise."""

    def __init__(self, directory: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        policies = ocp.training.preservation_policies
        # BestN keeps the end of the sorted list: descending, the end is the lowest loss.
        best = policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1)
        kept: Any = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self.directory = directory.absolute()
        for path in self.directory.glob("[0-9]*/metrics/metrics"):
            try:
                json.loads(path.read_text(encoding="utf-8"))  # orbax reads all of them and stops at one that it cannot
            except (OSError, ValueError) as error:
                self._set_aside(int(path.parts[-3]), error)
        self.orbax = ocp.training.Checkpointer(
            str(self.directory), preservation_policy=kept, cleanup_tmp_directories=True
        )

    def _set_aside(self, step: int, error: Exception) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again."""
        say(f"warning: checkpoint {step} is unreadable ({root_cause(error)}); it is now {step}.damaged")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged")  # every process has seen it
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / f"{step}.damaged", ignore_errors=True)
            (self.directory / str(step)).rename(self.directory / f"{step}.damaged")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait(self.orbax.close)

    def save(self, step: int, state: State, data: Any, loss: float) -> None:
        """Start to save `state` and the JSON position `data`. A failed earlier save is reported and does not end the
        run: the checkpoint before it is still there."""
        try:
            about: Any = {"data": data, "digest": digest(state)}
            self.orbax.save_checkpointables_async(
                step, {"state": state}, metrics={"loss": loss}, custom_metadata=about, force=True
            )
        except Exception as error:
            say(f"warning: checkpoint {step} could not be saved ({root_cause(error)}); the run goes on")

    def wait(self, finish: Any = None) -> None:
        """Until the save in flight has ended; one that failed is reported."""
        try:
            (finish or self.orbax.wait)()
        except Exception as error:
            say(f"warning: the last checkpoint could not be saved ({root_cause(error)})")

    def newest(self, target: State) -> tuple[State, Any, int] | None:
        """(state, data, step) of the newest checkpoint that can be read into `target`; damaged ones are set aside."""
        for step in reversed(self.steps()):
            try:
                state = self.orbax.load_checkpointables(step, {"state": target})["state"]
                metadata: Any = self.orbax.checkpointables_metadata(step).custom_metadata
                if metadata.get("digest") not in (None, digest(state)):  # an older one has none
                    raise OSError("it is not what was saved: bits have changed on the disk")
                return state, metadata["data"], step
            except Exception as error:
                self._set_aside(step, error)
                self.orbax.reload()
        return None

    def steps(self) -> list[int]:
        return [int(checkpoint.step) for checkpoint in self.orbax.checkpoints]
