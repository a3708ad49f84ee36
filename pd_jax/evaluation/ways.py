"""The ways of answering that an evaluation compares, each a row of its table.

A row is named by its way of answering, or WAY=MODEL: that way with a model of its own, say a control beside the model
under test. Every row gets the same prompt token ids, dtype, device, end-of-sequence set and number of new tokens, and
decodes greedily. The hf rows are plain transformers; the others are ours.
"""

import functools
import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_jax.config import Align, Visibility
from pd_jax.data.squad import Context, to_tokens
from pd_jax.errors import InputError
from pd_jax.evaluation.baselines import Decoded, Transformers, check_weights
from pd_jax.evaluation.flags import EvaluateFlags
from pd_jax.layout import Branch, TokenSample

HF_ROWS = ("hf-sequential", "hf-batched", "hf-one-prompt")
OUR_ROWS = ("sequential", "isolated", "prompts", "columns")
ROWS = (*HF_ROWS, *OUR_ROWS)
SERIAL_ROWS = ("hf-sequential", "hf-one-prompt", "sequential")  # one answer after the other

Row = Callable[[Sequence[Context], int, int | None], Decoded]  # contexts, max_new_tokens, turns -> answers


def way(name: str) -> str:
    """The way of answering of row `name`."""
    return name.partition("=")[0]


def decoded_as(name: str, align: Align) -> tuple[Visibility, Align]:
    """Visibility and alignment of one of our rows; `align` is that of the rows prompts and columns."""
    how = way(name)
    return (how, align) if how == "prompts" or how == "columns" else ("isolated", "ragged")


def answer_in_columns(
    decoder: Any,
    visibility: str,
    align: str,
    serial: bool,
    contexts: Sequence[Context],
    max_new_tokens: int,
    turns: int | None = None,
) -> Decoded:
    """Our rows: all branches of all contexts at once, or (`serial`) one question at a time."""
    decoder.visibility, decoder.align = visibility, align
    samples = []
    for context in contexts:
        sample = to_tokens(context, decoder.tokenizer, decoder.eos_ids[0])
        samples.append(TokenSample(sample.background, [Branch(branch.prompt) for branch in sample.branches]))
    if not serial:
        groups = [samples]
    else:
        groups = [[TokenSample(s.background, [branch])] for s in samples for branch in s.branches[:turns]]
    results = [decoder.generate(group, max_new_tokens=max_new_tokens) for group in groups]
    steps = [max(result.columns for result in group) for group in results]
    answers = iter([branch for group in results for result in group for branch in result.branches])
    per_context = [[next(answers) for _ in (s.branches[:turns] if serial else s.branches)] for s in samples]
    return Decoded(
        ids=[[list(branch.token_ids) for branch in row] for row in per_context],
        ended=[[branch.finish_reason == "eos" for branch in row] for row in per_context],
        forwards=sum(steps),
        slots=sum(n * sum(len(s.branches) for s in group) for n, group in zip(steps, groups, strict=True)),
        prefill_tokens=sum(result.prefill_tokens for group in results for result in group),
    )


def torch_device() -> str:
    """The name that torch has for JAX's device ("tpu": none)."""
    import jax

    return "cuda" if jax.default_backend() == "gpu" else jax.default_backend()


def _hf_obstacle() -> str | None:
    """Why the hf rows cannot run here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'pd_jax[hf]')"
    device = torch_device()
    if device != "cpu":
        import torch

        if device != "cuda" or not torch.cuda.is_available():
            return f"torch cannot use the {device} that jax uses (JAX_PLATFORMS=cpu compares both on the CPU)"
    return None


def choose_rows(flags: EvaluateFlags) -> tuple[list[str], list[str]]:
    """(the rows to run, lines about those that cannot). Raises `ValueError` when a row asked for lacks its model."""
    unknown = [name for name in flags.rows if way(name) not in ROWS or name.endswith("=")]
    if unknown:
        raise InputError(f"--rows {' '.join(unknown)}: no such row; choose from {' '.join(ROWS)}, or ROW=MODEL")
    models = dict.fromkeys(HF_ROWS, ("--base-model", flags.base_model))
    models |= dict.fromkeys(("isolated", "prompts", "columns"), ("--ft-model", flags.ft_model))
    models["sequential"] = ("--sequential-model or --ft-model", flags.sequential_model or flags.ft_model)
    for name in flags.rows:
        if name in ROWS and models[name][1] is None:
            raise InputError(f"row {name} needs {models[name][0]}")
    names = [name for name in dict.fromkeys(flags.rows or ROWS) if name not in ROWS or models[name][1] is not None]
    names.sort(key=lambda name: ROWS.index(way(name)))
    notes = []
    obstacle = _hf_obstacle() if any(way(name) in HF_ROWS for name in names) else None
    if obstacle is not None:
        notes.append(f"the hf rows are skipped: {obstacle}")
        names = [name for name in names if way(name) not in HF_ROWS]
    if not names:
        raise InputError("; ".join(["nothing to run: give --base-model (hf rows) or --ft-model (our rows)", *notes]))
    if flags.against is not None and flags.against not in names:
        raise InputError(f"--against {flags.against} is not one of the rows that run: {' '.join(names)}")
    return names, notes


@dataclass(frozen=True)
class Source:
    """Where a row's weights are: a model directory and perhaps an adapter that belongs to it."""

    model: Path
    adapter: Path | None = None

    def fingerprint(self) -> list[str]:
        from pd_jax.files import fingerprint

        return [fingerprint(path) for path in (self.model, self.adapter) if path is not None]


def find_sources(names: Sequence[str], flags: EvaluateFlags) -> dict[str, Source]:
    """The source of every row, found and checked before anything is loaded."""
    from pd_jax.files import find_model

    def source(path: str) -> Source:
        directory = find_model(path, flags.local_files_only)
        if not (directory / "adapter_config.json").is_file():
            return Source(directory)
        if flags.ft_base_model is None:
            raise InputError(f"{path} is a LoRA adapter; pass the model it belongs to as --ft-base-model")
        return Source(find_model(flags.ft_base_model, flags.local_files_only), directory)

    sources = {}
    for name in names:
        own = name.partition("=")[2]
        if way(name) in HF_ROWS:
            sources[name] = Source(find_model(own or str(flags.base_model), flags.local_files_only))
            check_weights(sources[name].model)
        else:
            control = flags.sequential_model if name == "sequential" else None
            sources[name] = source(own or str(control or flags.ft_model))
    if flags.ft_base_model is not None and not any(source.adapter for source in sources.values()):
        raise InputError(
            f"--ft-base-model {flags.ft_base_model} is given, but --ft-model {flags.ft_model} is no adapter"
        )
    return sources


def loader(flags: EvaluateFlags, tokenizer: Any, eos_ids: Sequence[int]) -> Callable[[str, Source], Row]:
    """A function that makes rows. It holds one model at a time, so that their peaks of memory can be told apart."""
    held: dict[Any, Any] = {}

    def decoder(source: Source) -> Any:
        from pd_jax.decoding import ParallelDecoder

        made = ParallelDecoder.from_pretrained(
            source.model, source.adapter, flags.dtype, pair_indices=flags.pair_indices, local_files_only=True
        )
        made.eos_ids = tuple(eos_ids)
        return made

    def load(name: str, source: Source) -> Row:
        how = way(name)
        hf = how in HF_ROWS
        if (hf, source) not in held:
            held.clear()
            gc.collect()
            made = (
                Transformers(source.model, tokenizer, eos_ids, flags.dtype, torch_device()) if hf else decoder(source)
            )
            held[hf, source] = made
        model = held[hf, source]
        if hf:
            return getattr(model, how.removeprefix("hf-").replace("-", "_"))
        settings = decoded_as(name, flags.align or model.config.align or "left")
        return functools.partial(answer_in_columns, model, *settings, how == "sequential")

    return load
