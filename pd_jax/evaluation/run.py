"""Run an evaluation: every row answers every context, what it said and took is kept, the table follows from that.

What a row answered is appended to `predictions-ROW.jsonl` context by context; the same command goes on where it was
stopped. `results.json` holds every answer and measurement, enough to render the table and the report again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from pd_jax.config import SECTION, read_config_json
from pd_jax.data.squad import Context, load_squad, select, to_tokens
from pd_jax.errors import InputError
from pd_jax.evaluation.baselines import Decoded
from pd_jax.evaluation.flags import EvaluateFlags
from pd_jax.evaluation.metrics import (
    answer_of,
    leaks,
    score,
    summarize,
)
from pd_jax.evaluation.report import print_table, write_report
from pd_jax.evaluation.ways import (
    HF_ROWS,
    SERIAL_ROWS,
    Row,
    choose_rows,
    decoded_as,
    find_sources,
    loader,
    torch_device,
    way,
)

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


def _restart_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def _peak_bytes(name: str, device: str) -> int | None:
    """The most memory used: by the accelerator (JAX counts from the start of the process), else by this process."""
    import jax

    if device != "cpu":
        if way(name) in HF_ROWS:
            return sys.modules["torch"].cuda.max_memory_allocated()
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return None


# Rows -----------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.partial")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)


def read_predictions(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that an interrupted run left at `path`; a last line that was cut off is dropped.

    Raises `ValueError` when they were made with other `settings`, naming those that differ.
    """
    lines: list[dict[str, Any]] = []
    if path.is_file():
        with suppress(json.JSONDecodeError):
            for line in path.read_text(encoding="utf-8").split("\n"):
                lines.append(json.loads(line))
    made = lines[0] if lines else settings
    differ = [f"{key} {made.get(key)!r} (now {value!r})" for key, value in settings.items() if made.get(key) != value]
    if differ:
        raise InputError(f"{path} was made with {', '.join(differ)}; use another --output-dir, or delete the file")
    return lines[1:]


def run_row(
    load: Callable[[], Row],
    contexts: Sequence[Context],
    tokenizer: Any,
    settings: dict[str, Any],
    path: Path,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Answer all `contexts`, going on behind the records at `path`: one record a context, appended as it is made."""
    name, size, limit, repeats = (settings[key] for key in ("row", "batch_size", "max_new_tokens", "repeats"))
    records = read_predictions(path, settings)
    if len(records) < len(contexts):
        records = records[: len(records) // size * size]  # batches are answered whole
    advance(len(records))
    if len(records) == len(contexts):
        return records
    row = load()
    write_text(path, "".join(map(_line, [settings, *records])))
    if repeats and way(name) in HF_ROWS:
        row(contexts[:1], 2, 1)  # torch's warm-up; `measure` sees to ours
    with path.open("a", encoding="utf-8") as file:
        for start in range(len(records), len(contexts), size):
            batch = contexts[start : start + size]
            _restart_peak()
            decoded, seconds = measure(partial(row, batch, limit, None), repeats)
            took = {"seconds": seconds and seconds / len(batch), "first_token_seconds": None}
            took["peak_bytes"] = _peak_bytes(name, settings["device"])
            if repeats:
                first = partial(row, batch[:1] if way(name) in SERIAL_ROWS else batch, 1, 1)
                took["first_token_seconds"] = measure(first, repeats)[1]
            made = [record | took for record in _records(batch, decoded, way(name) in SERIAL_ROWS, tokenizer)]
            records += made
            file.writelines(map(_line, made))
            file.flush()
            advance(len(batch))
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _records(contexts: Sequence[Context], decoded: Decoded, serial: bool, tokenizer: Any) -> list[dict[str, Any]]:
    """What is kept of every context; what a batch took together is shared evenly."""
    records = []
    for context, ids, ended in zip(contexts, decoded.ids, decoded.ended, strict=True):
        steps = [len(answer) + end for answer, end in zip(ids, ended, strict=True)]
        records.append(
            {
                "ids": [question.id for question in context.questions],
                "answers": [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids],
                "ended": ended,
                "tokens": sum(map(len, ids)),
                "columns": sum(steps) if serial else max(steps),
                **{k: getattr(decoded, k) / len(contexts) for k in ("forwards", "slots", "prefill_tokens")},
            }
        )
    return records


# The whole ------------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    """What the figures were measured with."""
    import jax

    def version(package: str) -> str | None:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return None

    packages = ("pd_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "torch")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def dump(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a question: gold answers, and what the reference row (baseline) and our columns (parallel) said."""
    rows = results["rows"]
    baseline, parallel = results["summary"]["reference"], "columns" if "columns" in rows else list(rows)[-1]
    entries = []
    for c, context in enumerate(results["contexts"]):
        for b, question in enumerate(context["questions"]):
            said = {name: answer_of(records[c]["answers"][b]) for name, records in rows.items()}
            entry = {"title": context["title"], "context": context["text"], **question}
            for key, name in (("baseline", baseline), ("parallel", parallel)):
                exact, f1 = score(said[name], question["answers"], results["flags"]["metric"])
                entry |= {key: said[name], f"{key}_row": name, f"{key}_em": exact, f"{key}_f1": f1}
            entries.append({**entry, "predictions": said})
    return entries


def load_results(path: Path, against: str | None = None) -> dict[str, Any]:
    """A results.json, its summary computed anew, against another row if asked. Raises `ValueError` if it is not one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if against is not None and against not in results["rows"]:
            raise InputError(f"--against {against} is not a row of {path}: {' '.join(results['rows'])}")
        results["flags"]["against"] = against or results["flags"]["against"]
        results["summary"] = summarize(results)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"--from {path} is not a results.json of this script ({error!r})") from None
    return results


def _describe(context: Context, metric: str) -> dict[str, Any]:
    """A context as results.json has it."""
    questions = [
        {"id": q.id, "question": q.text, "answers": list(q.answers), "leaks": leaks(context, index, metric)}
        for index, q in enumerate(context.questions)
    ]
    return {"title": context.title, "text": context.text, "questions": questions}


def _prepare(flags: EvaluateFlags) -> tuple[list[str], list[str], dict[str, Any], Any, tuple[int, ...], int]:
    """Row names, notes, the source of every row; what all share: tokenizer, end-of-sequence set, and most columns."""
    from pd_jax.files import load_config, load_eos_ids, load_tokenizer

    names, notes = choose_rows(flags)
    sources = find_sources(names, flags)
    most = []
    otherwise: dict[str, list[str]] = {}
    for name in names:  # refuse what we cannot read
        source = sources[name]
        plain = way(name) in HF_ROWS and SECTION not in read_config_json(source.model)
        pairs = () if plain else None if way(name) in HF_ROWS else flags.pair_indices
        config = load_config(source.model, pairs, source.adapter)
        most.append(config.max_position_embeddings)
        if way(name) not in HF_ROWS and config.visibility is not None and config.align is not None:
            visibility, align = decoded_as(name, flags.align or config.align)
            if (visibility, align) != (config.visibility, config.align):
                trained = f"{source.adapter or source.model} was trained with visibility {config.visibility}, align"
                otherwise.setdefault(f"{trained} {config.align}", []).append(f"{name} ({visibility}, {align})")
    notes += [f"{trained}; other rows: {', '.join(rows)}" for trained, rows in otherwise.items()]
    tokenizers = {source.model: load_tokenizer(source.model) for source in sources.values()}
    first, tokenizer = next(iter(tokenizers.items()))
    for directory, other in tokenizers.items():
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{directory} and {first} have different tokenizers; rows that are compared must share one"
            )
    eos_ids = sorted({i for directory, own in tokenizers.items() for i in load_eos_ids(directory, own)})
    for directory in {sources[name].model for name in names if way(name) in HF_ROWS}:
        pairs = read_config_json(directory).get(SECTION, {}).get("pair_indices")
        if pairs:
            notes.append(
                f"{directory} was trained with RoPE pairs {pairs} on the branch axis; transformers turns every pair "
                "with the column, so the hf rows show it without its 2D RoPE"
            )
    return names, notes, sources, tokenizer, tuple(eos_ids), min(most)


def _check_lengths(contexts: Sequence[Context], tokenizer: Any, max_new_tokens: int, most: int) -> None:
    """Raise `ValueError` when a context, its longest question and the answer take more columns than a model has."""
    for context in contexts:
        sample = to_tokens(context, tokenizer, 0)
        columns = len(sample.background) + sample.prompt_columns + max_new_tokens
        if columns > most:
            raise InputError(
                f"question {context.questions[0].id}: its context, the longest question about it and --max-new-tokens "
                f"{max_new_tokens} take {columns} columns, the model has max_position_embeddings {most}; shorten the "
                "context or lower --max-new-tokens"
            )


def _settings(flags: EvaluateFlags, sources: dict[str, Any], contexts: list[Context], eos_ids: Sequence[int]) -> Any:
    """By row: everything that its answers and measurements depend on; a run goes on only where these agree."""
    shared = {
        "data": hashlib.sha256(repr(contexts).encode()).hexdigest(),
        "eos_ids": list(eos_ids),
        "device": torch_device(),
        **{key: getattr(flags, key) for key in ("max_new_tokens", "batch_size", "repeats", "dtype")},
    }
    pairs = None if flags.pair_indices is None else list(flags.pair_indices)
    prints = {source: source.fingerprint() for source in set(sources.values())}
    return {
        name: {"row": name, "weights": prints[source], **shared}
        | ({} if way(name) in HF_ROWS else {"align": flags.align, "pair_indices": pairs})
        for name, source in sources.items()
    }


def evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """Run an evaluation (with `from_` only render one), write its files, print its table; results.json's content.

    Raises `ValueError` for a model, a data set or a combination of them that cannot be evaluated, before any row runs.
    """
    console = Console()
    if flags.from_ is not None:
        results, directory = load_results(Path(flags.from_), flags.against), Path(flags.from_).parent
    else:
        results, directory = _run(flags, console), Path(flags.output_dir)
        write_json(directory / "results.json", results)
    write_report(results, directory / "report.html")
    if flags.dump_file is not None:
        write_json(Path(flags.dump_file), dump(results))
    print_table(results, console)
    console.print(f"written: {directory}/report.html, results.json, predictions-ROW.jsonl", soft_wrap=True)
    return results


def _run(flags: EvaluateFlags, console: Console) -> dict[str, Any]:
    names, notes, sources, tokenizer, eos_ids, most = _prepare(flags)
    contexts = load_squad(flags.dataset_name, flags.dataset_split, flags.local_files_only)
    contexts = select(contexts, flags.max_branches, flags.min_questions, flags.max_eval_samples)
    _check_lengths(contexts, tokenizer, flags.max_new_tokens, most)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    settings = _settings(flags, sources, contexts, eos_ids)
    paths = {name: Path(flags.output_dir) / f"predictions-{name.replace('/', '_')}.jsonl" for name in names}
    for name in names:
        read_predictions(paths[name], settings[name])  # refuse before anything is run
    load, rows = loader(flags, tokenizer, eos_ids), {}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for name in names:
            advance = partial(progress.advance, progress.add_task(name, total=len(contexts)))
            row = partial(load, name, sources[name])
            rows[name] = run_row(row, contexts, tokenizer, settings[name], paths[name], advance)
    results = {
        "flags": dataclasses.asdict(flags),
        "machine": _machine(),
        "notes": notes,
        "settings": settings,
        "contexts": [_describe(context, flags.metric) for context in contexts],
        "rows": rows,
    }
    return results | {"summary": summarize(results)}
