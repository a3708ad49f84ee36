"""What a person watches while a run goes on: log lines, a progress bar, metrics.jsonl, TensorBoard files, a trace."""

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pd_jax.files import EventFile, keep_metrics
from pd_jax.machines import naming, peak_flops

console = Console(soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """One line for the person, from process 0 only."""
    if jax.process_index() == 0:
        console.print(text)


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class Monitor:
    """Takes the metrics of every step; logs every `every`-th, the last and those with a validation loss.

    metrics.jsonl has one object a logged step. A resumed run continues it: lines behind the step that it resumes from
    are dropped first, so that no step is repeated and none is lost. Process 0 writes.
    """

    def __init__(
        self, output: Path, *, first: int, steps: int, every: int, schedule: Callable[[Any], Any], flops: float
    ) -> None:
        """`first` is the step that the run resumes from, `flops` what a full step takes."""
        self.steps, self.every, self.schedule = steps, every, schedule
        self.path, self.step_flops = output / "metrics.jsonl", flops
        self.peak, origin = peak_flops()
        self.peak *= jax.device_count()
        self.mine = jax.process_index() == 0
        if self.mine:
            say(f"MFU is a share of {self.peak / 1e12:,.2f} TFLOP/s: {jax.device_count()} x {origin}")
            keep_metrics(self.path, first)
            self.file = self.path.open("a", encoding="utf-8")
            self.events = EventFile(output / "tensorboard", first + 1)
        self.first, self.began = first, math.nan
        self.since, self.seen, self.tokens, self.used = time.monotonic(), first, 0.0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not (self.mine and console.is_terminal))
        self.task = self.bar.add_task("training", total=steps, completed=first)

    def __enter__(self) -> "Monitor":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()
        if self.mine:
            with naming(self.path):
                self.file.close()
            self.events.close()

    def __call__(self, step: int, metrics: Mapping[str, Any], validation: tuple[float, float] | None = None) -> None:
        """The metrics of `step`, still on the device; reading them waits for that step. `validation` is a loss and the
        share of attention on siblings. Raises `FloatingPointError` for a loss that is not finite."""
        loss = float(metrics["loss"])
        self.bar.update(self.task, completed=step)
        if step == self.first + 1:
            self.began = time.monotonic()  # its time was that of compilation too
        elif step == self.first + 2 < self.steps:
            seconds = time.monotonic() - self.began
            say(f"a step takes {seconds:.2f} s, all that are left about {duration((self.steps - step) * seconds)}")
        self.tokens += float(metrics["tokens"])
        self.used += float(metrics["used"])
        if not math.isfinite(loss) or not math.isfinite(float(metrics["grad_norm"])):
            raise FloatingPointError(f"the loss of step {step} is {loss}, its gradient {float(metrics['grad_norm'])}")
        if step % self.every and step != self.steps and validation is None:
            return
        now = time.monotonic()
        seconds, steps = now - self.since, step - self.seen
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": float(self.schedule(step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.step_flops * self.used / seconds / self.peak,
            "token_utilisation": self.used / steps,
            "seconds_per_step": seconds / steps,
        }
        if "sibling_bias" in metrics:
            record["sibling_bias_min"], record["sibling_bias_max"] = map(float, metrics["sibling_bias"])
        if validation is not None:
            record["validation_loss"] = validation[0]
            if math.isfinite(validation[1]):
                record["sibling_attention"] = validation[1]
        self.since, self.seen, self.tokens, self.used = now, step, 0.0, 0.0
        if not self.mine:
            return
        with naming(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        self.events.add(step, {name: value for name, value in record.items() if name != "step"})
        left = duration((self.steps - step) * record["seconds_per_step"])
        say(
            f"step {step}/{self.steps}  loss {loss:.4f}  "
            + (f"validation {validation[0]:.4f}  " if validation is not None else "")
            + (f"on siblings {record['sibling_attention']:.1%}  " if "sibling_attention" in record else "")
            + f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            + (
                f"sibling bias {record['sibling_bias_min']:.2f} .. {record['sibling_bias_max']:.2f}  "
                if "sibling_bias_min" in record
                else ""
            )
            + f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.1%}  "
            f"used {record['token_utilisation']:.0%}  left {left}"
        )
