"""One row of the table answers every context, is timed, and goes on where it was stopped.

What a row answered is appended to its `predictions-ROW.jsonl`, context by context.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from pd_jax.data.squad import Context
from pd_jax.errors import InputError
from pd_jax.evaluation.baselines import Decoded
from pd_jax.evaluation.results import Record, Settings
from pd_jax.evaluation.ways import Answerer, Conditions, Way, torch_device
from pd_jax.machines import PeakMemory, naming, write_whole

# Measuring ------------------------------------------------------------------------------------------------------------


@cache
def _compilations() -> list[str]:
    """A list that grows by one or more entries whenever JAX traces or compiles something."""
    import jax

    events: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return events


def measure(run: Callable[[], Any], repeats: int) -> tuple[Any, float | None]:
    """What `run` returns and the median seconds of `repeats` runs. A run in which something compiled is a warm-up."""
    result, seconds, elapsed = None, [], 0.0
    for _ in range(repeats + 2):  # at most two warm-ups
        compiled, start = len(_compilations()), time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        if not repeats:
            return result, None
        if len(_compilations()) == compiled:
            seconds.append(elapsed)
        if len(seconds) == repeats:
            break
    return result, statistics.median(seconds or [elapsed])


def _peak_of(way: Way) -> PeakMemory:
    """Of the accelerator, else of this process."""
    return PeakMemory("process" if torch_device() == "cpu" else "torch" if way.hf else "jax")


# Predictions on disk --------------------------------------------------------------------------------------------------


def read_predictions(path: Path, settings: Settings) -> list[Record]:
    """The records that an interrupted run left at `path`; a last line that was cut off is dropped.

    Raises `InputError` when they were made with other `settings`, naming those that differ, and for a file of anything
    else.
    """
    lines: list[Any] = []
    if path.is_file():
        with suppress(ValueError, RecursionError):
            for line in path.read_bytes().split(b"\n"):
                lines.append(json.loads(line))
    made = lines[0] if lines else settings
    if not isinstance(made, dict) or any(
        not isinstance(x, dict) or Record.__annotations__.keys() - x for x in lines[1:]
    ):
        raise InputError(f"{path} holds something else than predictions; use another --output-dir, or delete the file")
    differ = [f"{key} {made.get(key)!r} (now {value!r})" for key, value in settings.items() if made.get(key) != value]
    if differ:
        raise InputError(f"{path} was made with {', '.join(differ)}; use another --output-dir, or delete the file")
    return lines[1:]


def _line(record: Record | Settings) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


# Answering ------------------------------------------------------------------------------------------------------------


def run_row(
    way: Way,
    load: Callable[[], Answerer],
    contexts: Sequence[Context],
    tokenizer: Any,
    *,
    conditions: Conditions,
    settings: Settings,
    path: Path,
    advance: Callable[[int], None],
) -> list[Record]:
    """Answer all `contexts`, going on behind the records at `path`: one record a context, appended as it is made."""
    size, limit, repeats = conditions.batch_size, conditions.max_new_tokens, conditions.repeats
    records = read_predictions(path, settings)
    if len(records) < len(contexts):
        records = records[: len(records) // size * size]  # batches are answered whole
    advance(len(records))
    if len(records) == len(contexts):
        return records
    answer = load()
    write_whole(path, "".join(map(_line, [settings, *records])))
    if repeats and way.hf:
        answer(contexts[:1], 2, 1)  # torch's warm-up; `measure` sees to ours
    with naming(path), path.open("a", encoding="utf-8") as file:
        for start in range(len(records), len(contexts), size):
            batch = contexts[start : start + size]
            with _peak_of(way) as memory:
                decoded, seconds = measure(partial(answer, batch, limit, None), repeats)
            first_token_seconds = None
            if repeats:
                first = partial(answer, batch[:1] if way.serial else batch, 1, 1)
                first_token_seconds = measure(first, repeats)[1]
            made = _records(batch, decoded, way.serial, tokenizer)
            for record in made:
                record["seconds"] = seconds and seconds / len(batch)
                record["first_token_seconds"] = first_token_seconds
                record["peak_bytes"] = memory.peak
            records += made
            file.writelines(map(_line, made))
            file.flush()
            advance(len(batch))
    return records


def _records(contexts: Sequence[Context], decoded: Decoded, serial: bool, tokenizer: Any) -> list[Record]:
    """What was said and computed; what it took is not filled in yet."""
    records: list[Record] = []
    for context, ids, ended in zip(contexts, decoded.ids, decoded.ended, strict=True):
        steps = [len(answer) + end for answer, end in zip(ids, ended, strict=True)]
        records.append(
            {
                "ids": [question.id for question in context.questions],
                "answers": [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids],
                "ended": ended,
                "tokens": sum(map(len, ids)),
                "columns": sum(steps) if serial else max(steps),
                "forwards": decoded.forwards / len(contexts),
                "slots": decoded.slots / len(contexts),
                "prefill_tokens": decoded.prefill_tokens / len(contexts),
                "seconds": None,
                "first_token_seconds": None,
                "peak_bytes": None,
            }
        )
    return records
