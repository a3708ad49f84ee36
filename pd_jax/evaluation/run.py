"""Run an evaluation: every row answers every context, what it said and took is kept, the table follows from that.

The same command goes on where it was stopped. `results.json` holds every answer and measurement, enough to render the
table and the report again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from pd_jax.cli import given
from pd_jax.config import SECTION
from pd_jax.data.squad import Context, load_squad, select, to_tokens
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError
from pd_jax.evaluation.flags import EvaluateFlags
from pd_jax.evaluation.look import look_once, sight_line
from pd_jax.evaluation.metrics import answer_of, leaks, score, summarize
from pd_jax.evaluation.report import print_table, write_report
from pd_jax.evaluation.results import ContextEntry, DumpEntry, MachineEntry, Metric, Recorded, Results, Settings
from pd_jax.evaluation.rows import read_predictions, run_row
from pd_jax.evaluation.ways import Conditions, Models, RowSpec, choose_rows, default_models, find_sources, torch_device
from pd_jax.machines import write_whole

if TYPE_CHECKING:  # --from renders a table without jax
    from pd_jax.files import ModelSource

# Before anything runs -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the models of all rows have in common."""

    tokenizer: Any  # a fast tokenizer of transformers
    eos_ids: tuple[int, ...]  # token ids that end an answer, of all models together
    most_columns: int  # that every model takes: the fewest max_position_embeddings


def find_shared(sources: "Mapping[RowSpec, ModelSource]", conditions: Conditions) -> tuple[Shared, list[str]]:
    """What all rows share, and lines about rows that decode a model otherwise than it was trained.

    Raises `InputError` for a model that cannot be read, and for tokenizers that differ.
    """
    from pd_jax.files import load_config, load_eos_ids, load_tokenizer, read_config_json

    notes, most, tokenizers = [], [], {}
    otherwise: dict[str, list[str]] = {}
    for spec, source in sources.items():
        way = spec.way
        plain = way.hf and SECTION not in read_config_json(source.model)
        pairs = () if plain else None if way.hf else conditions.pair_indices
        config = load_config(source.model, pairs, source.adapter)
        most.append(config.most_columns)
        tokenizers[source.model] = load_tokenizer(source.model, config.vocab_size)
        if way.visibility is not None:
            align = way.align(config, conditions.align)
            if config.visibility is None and way.visibility != "isolated":
                notes.append(
                    f"{source.adapter or source.model} has no column settings: row {spec.name} shows it branches that "
                    "it has never learned to tell apart"
                )
            if config.trained_otherwise(way.visibility, align):
                trained = f"{source.adapter or source.model} was trained with visibility {config.visibility}, align"
                otherwise.setdefault(f"{trained} {config.align}", []).append(f"{spec.name} ({way.visibility}, {align})")
    notes += [f"{trained}; other rows: {', '.join(rows)}" for trained, rows in otherwise.items()]
    first, tokenizer = next(iter(tokenizers.items()))
    for directory, other in tokenizers.items():
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{directory} and {first} have different tokenizers; rows that are compared must share one"
            )
    eos_ids = sorted({i for directory, own in tokenizers.items() for i in load_eos_ids(directory, own)})
    for directory in {source.model for spec, source in sources.items() if spec.way.hf}:
        pairs = read_config_json(directory).get(SECTION, {}).get("pair_indices")
        if pairs:
            notes.append(
                f"{directory} was trained with RoPE pairs {pairs} on the branch axis; transformers turns every pair "
                "with the column, so the hf rows show it without its 2D RoPE"
            )
    return Shared(tokenizer, tuple(eos_ids), min(most)), notes


def check_lengths(contexts: Sequence[Context], shared: Shared, max_new_tokens: int) -> None:
    """Raise `InputError` when a context, its longest question and the answer take more columns than a model has."""
    for context in contexts:
        sample = to_tokens(context, shared.tokenizer, 0)
        columns = len(sample.background) + sample.prompt_columns + max_new_tokens
        if columns > shared.most_columns:
            raise InputError(
                f"question {context.questions[0].id}: its context, the longest question about it and --max-new-tokens "
                f"{max_new_tokens} take {columns} columns, the model has max_position_embeddings "
                f"{shared.most_columns}; shorten the context or lower --max-new-tokens"
            )


def settings_of(
    sources: "Mapping[RowSpec, ModelSource]", contexts: list[Context], conditions: Conditions, eos_ids: Sequence[int]
) -> dict[RowSpec, Settings]:
    """What the answers and measurements of every row depend on."""
    from pd_jax.files import fingerprint

    data = hashlib.sha256(repr(contexts).encode()).hexdigest()
    once = cache(fingerprint)  # the weights of several rows are read once
    pairs = None if conditions.pair_indices is None else list(conditions.pair_indices)
    settings: dict[RowSpec, Settings] = {}
    for spec, source in sources.items():
        settings[spec] = {
            "row": spec.name,
            "weights": [once(path) for path in source if path is not None],
            "data": data,
            "eos_ids": list(eos_ids),
            "device": torch_device(),
            "max_new_tokens": conditions.max_new_tokens,
            "batch_size": conditions.batch_size,
            "repeats": conditions.repeats,
            "dtype": conditions.dtype,
        }
        if not spec.way.hf:
            settings[spec] |= {"align": conditions.align, "pair_indices": pairs}
    return settings


# What is written ------------------------------------------------------------------------------------------------------


def _machine() -> MachineEntry:
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


def _describe(context: Context, metric: Metric) -> ContextEntry:
    return {
        "title": context.title,
        "text": context.text,
        "questions": [
            {"id": q.id, "question": q.text, "answers": list(q.answers), "leaks": leaks(context, index, metric)}
            for index, q in enumerate(context.questions)
        ],
    }


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def dump(results: Results) -> list[DumpEntry]:
    """One entry a question: gold answers, and what the reference row (baseline) and our columns (parallel) said."""
    rows, metric = results["rows"], results["flags"]["metric"]
    baseline, parallel = results["summary"]["reference"], "columns" if "columns" in rows else list(rows)[-1]
    entries: list[DumpEntry] = []
    for c, context in enumerate(results["contexts"]):
        for b, question in enumerate(context["questions"]):
            said = {name: answer_of(records[c]["answers"][b]) for name, records in rows.items()}
            scores = {name: score(said[name], question["answers"], metric) for name in (baseline, parallel)}
            entries.append(
                {
                    "title": context["title"],
                    "context": context["text"],
                    **question,
                    "baseline": said[baseline],
                    "baseline_row": baseline,
                    "baseline_em": scores[baseline][0],
                    "baseline_f1": scores[baseline][1],
                    "parallel": said[parallel],
                    "parallel_row": parallel,
                    "parallel_em": scores[parallel][0],
                    "parallel_f1": scores[parallel][1],
                    "predictions": said,
                }
            )
    return entries


def load_results(path: Path, against: str | None = None) -> Results:
    """A results.json, its summary computed anew, against another row if asked. Raises `InputError` if it is not one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if against is not None and against not in results["rows"]:
            raise InputError(f"--against {against} is not a row of {path}: {' '.join(results['rows'])}")
        results["flags"]["against"] = against or results["flags"]["against"]
        results["summary"] = summarize(results)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"--from {path} is not a results.json of this script ({error!r})") from None
    return results


# The whole ------------------------------------------------------------------------------------------------------------


def _publish(results: Results, directory: Path, dump_file: str | None, console: Console, skipped: str = "") -> Results:
    """Write the report and the dump, print the table."""
    write_report(results, directory / "report.html")
    if dump_file is not None:
        write_json(Path(dump_file), dump(results))
    print_table(results["summary"], console)
    for name, sight in results.get("sight", {}).items():
        console.print(sight_line(name, sight), soft_wrap=True, markup=False)
    console.print(f"written: {directory}/report.html, results.json, predictions-ROW.jsonl{skipped}", soft_wrap=True)
    return results


def evaluate(flags: EvaluateFlags) -> Results:
    """Run an evaluation (with `from_` only render one), write its files, print its table; results.json's content.

    Raises `InputError` for a model, a data set or a combination of them that cannot be evaluated, before any row runs.
    """
    console = Console()
    if flags.from_ is not None:
        path, ignored = Path(flags.from_), sorted(given(flags).keys() - {"from_", "against", "dump_file"})
        if ignored:
            raise InputError(f"--{ignored[0].replace('_', '-')} changes nothing of --from {path}; leave it out")
        return _publish(load_results(path, flags.against), path.parent, flags.dump_file, console)
    from pd_jax.files import claim, prove_saving

    with claim(Path(flags.output_dir)):
        prove_saving(Path(flags.output_dir), 0)
        return _evaluate(flags, console)


def _evaluate(flags: EvaluateFlags, console: Console) -> Results:
    # Rows and their models
    specs, notes = choose_rows(flags.rows, default_models(flags.base_model, flags.ft_model, flags.sequential_model))
    names = [spec.name for spec in specs]
    if flags.against is not None and flags.against not in names:
        raise InputError(f"--against {flags.against} is not one of the rows that run: {' '.join(names)}")
    sources = find_sources(specs, flags.ft_base_model, flags.local_files_only)
    conditions = Conditions(
        max_new_tokens=flags.max_new_tokens,
        batch_size=flags.batch_size,
        repeats=flags.repeats,
        dtype=flags.dtype,
        align=flags.align,
        pair_indices=flags.pair_indices,
    )
    shared, more = find_shared(sources, conditions)
    notes += more

    # Questions
    bad = BadRows(flags.skip_bad_rows)
    contexts = load_squad(flags.dataset_name, flags.dataset_split, flags.local_files_only, bad)
    drawn = None if flags.first_samples else flags.seed
    contexts = select(contexts, flags.max_branches, flags.min_questions, flags.max_eval_samples, drawn)
    check_lengths(contexts, shared, conditions.max_new_tokens)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    settings = settings_of(sources, contexts, conditions, shared.eos_ids)
    paths = {spec: Path(flags.output_dir) / f"predictions-{spec.name.replace('/', '_')}.jsonl" for spec in specs}
    for spec in specs:
        read_predictions(paths[spec], settings[spec])  # refuse before anything is run

    # Answers
    models, rows, sight = Models(shared.tokenizer, shared.eos_ids, conditions), {}, {}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for spec in specs:
            rows[spec.name] = run_row(
                spec.way,
                partial(models.answerer, spec.way, sources[spec]),
                contexts,
                shared.tokenizer,
                conditions=conditions,
                settings=settings[spec],
                path=paths[spec],
                advance=partial(progress.advance, progress.add_task(spec.name, total=len(contexts))),
            )
            if spec.way.visibility in ("prompts", "columns"):
                sight[spec.name] = look_once(
                    partial(models.decoder, spec.way, sources[spec]),
                    contexts,
                    conditions.max_new_tokens,
                    settings=settings[spec],
                    path=paths[spec].with_name(f"sight-{spec.name.replace('/', '_')}.json"),
                )

    # Files
    recorded: Recorded = {
        "flags": dataclasses.asdict(flags),
        "machine": _machine(),
        "notes": notes,
        "settings": {spec.name: settings[spec] for spec in specs},
        "contexts": [_describe(context, flags.metric) for context in contexts],
        "rows": rows,
        "sight": sight,
    }
    results: Results = {**recorded, "summary": summarize(recorded)}
    write_json(Path(flags.output_dir) / "results.json", results)
    return _publish(results, Path(flags.output_dir), flags.dump_file, console, bad.summary())
