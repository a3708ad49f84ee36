"""The ways of answering that an evaluation compares, and the rows of its table: a way with the model that answers.

A row is asked for by its way, or as WAY=MODEL: that way with a model of its own, say a control beside the model under
test. Every row gets the same prompt token ids, dtype, device, end-of-sequence set and number of new tokens, and decodes
greedily. The hf ways are plain transformers; the others are ours.
"""

import functools
import gc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd_jax.config import Align, Dtype, ModelConfig, Visibility
from pd_jax.data.squad import Context, to_tokens
from pd_jax.errors import InputError
from pd_jax.evaluation.baselines import Decoded, Transformers, check_weights
from pd_jax.layout import TokenSample, unanswered

if TYPE_CHECKING:
    from pd_jax.decoding import ParallelDecoder
    from pd_jax.files import ModelSource

Answerer = Callable[[Sequence[Context], int, int | None], Decoded]  # contexts, max_new_tokens, turns -> answers


@dataclass(frozen=True)
class Way:
    """A way of answering."""

    name: str
    words: str  # what it does, for the report
    visibility: Visibility | None = None  # that we decode with; None: transformers answers
    serial: bool = False  # one answer after the other

    @property
    def hf(self) -> bool:
        return self.visibility is None

    def align(self, config: ModelConfig, asked: Align | None) -> Align:
        """The alignment that we decode with; `asked` is for prompts and columns, else it is that of the training."""
        return "ragged" if self.visibility == "isolated" else asked or config.decoded_as[1]


WAYS = {
    way.name: way
    for way in (
        Way("hf-sequential", "transformers, one question after the other", serial=True),
        Way("hf-batched", "transformers, all questions as one padded batch, the context copied for each"),
        Way("hf-one-prompt", "transformers, all questions in one prompt, answered in turn", serial=True),
        Way("sequential", "one question after the other, each alone with the context", "isolated", serial=True),
        Way("isolated", "all questions of a context at once, none sees another", "isolated"),
        Way("prompts", "all questions of a context at once, each sees what the others ask", "prompts"),
        Way("columns", "all questions of a context at once, each sees what the others ask and answer", "columns"),
    )
}


@dataclass(frozen=True)
class RowSpec:
    """A row of the table."""

    name: str  # as it was asked for and as the table shows it: WAY or WAY=MODEL
    way: Way
    model: str  # that answers: directory or hub id


@dataclass(frozen=True)
class Conditions:
    """What all rows answer under."""

    max_new_tokens: int  # tokens an answer, at most
    batch_size: int  # contexts answered at once
    repeats: int  # timed runs of each batch; 0: answers only
    dtype: Dtype  # of weights and activations
    align: Align | None  # of prompts and columns; None: as each model was trained, else left
    pair_indices: tuple[int, ...] | None  # RoPE pairs of our rows, if none are stored


def torch_device() -> str:
    """The name that torch has for JAX's device ("tpu": none)."""
    import jax

    return "cuda" if jax.default_backend() == "gpu" else jax.default_backend()


# Which rows -----------------------------------------------------------------------------------------------------------


def default_models(base: str | None, ft: str | None, sequential: str | None) -> dict[str, str | None]:
    """By way: the model of a row that names none. From --base-model, --ft-model, --sequential-model."""
    models = {name: base if way.hf else ft for name, way in WAYS.items()}
    return models | {"sequential": sequential or ft}


def _flags_of(way: Way) -> str:
    """The flags that give a way its model."""
    return "--base-model" if way.hf else "--sequential-model or --ft-model" if way.serial else "--ft-model"


def parse_rows(asked: Sequence[str], models: Mapping[str, str | None]) -> list[RowSpec]:
    """The rows `asked` for as WAY or WAY=MODEL, in the table's order; none: all that `models` allow.

    Raises `InputError` for a way that does not exist, and when a row asked for lacks its model.
    """
    parts = {name: name.partition("=") for name in asked or WAYS}
    unknown = [name for name, (way, equals, own) in parts.items() if way not in WAYS or (equals and not own)]
    if unknown:
        raise InputError(f"--rows {' '.join(unknown)}: no such row; choose from {' '.join(WAYS)}, or ROW=MODEL")
    specs = []
    for name, (way, _, own) in parts.items():
        model = own or models[way]
        if model is not None:
            specs.append(RowSpec(name, WAYS[way], model))
        elif asked:
            raise InputError(f"row {name} needs {_flags_of(WAYS[way])}")
    order = list(WAYS.values())
    return sorted(specs, key=lambda spec: order.index(spec.way))


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


def choose_rows(asked: Sequence[str], models: Mapping[str, str | None]) -> tuple[list[RowSpec], list[str]]:
    """(the rows to run, lines about those that cannot); see `parse_rows`. Raises `InputError` when none is left."""
    specs, notes = parse_rows(asked, models), []
    obstacle = _hf_obstacle() if any(spec.way.hf for spec in specs) else None
    if obstacle is not None:
        notes.append(f"the hf rows are skipped: {obstacle}")
        specs = [spec for spec in specs if not spec.way.hf]
    if not specs:
        raise InputError("; ".join(["nothing to run: give --base-model (hf rows) or --ft-model (our rows)", *notes]))
    return specs, notes


# Their models ---------------------------------------------------------------------------------------------------------


def find_sources(specs: Sequence[RowSpec], adapted: str | None, local_files_only: bool) -> "dict[RowSpec, ModelSource]":
    """Where every row's weights are, found and checked before anything is loaded.

    `adapted` is the model that adapters belong to, if not the one that they name. Raises `InputError` when it is given
    and there is no adapter, and for a model that cannot be found or read.
    """
    from pd_jax.files import ADAPTER_CONFIG, ModelSource, find_model, find_source

    sources = {}
    for spec in specs:
        directory = find_model(spec.model, local_files_only)
        if spec.way.hf:
            check_weights(directory)
            sources[spec] = ModelSource(directory)
        else:
            base = adapted if (directory / ADAPTER_CONFIG).is_file() else None
            sources[spec] = find_source(spec.model, base, local_files_only, flag="--ft-base-model")
    if adapted is not None and not any(source.adapter for source in sources.values()):
        ours = " ".join(dict.fromkeys(spec.model for spec in specs if not spec.way.hf))
        raise InputError(f"--ft-base-model {adapted} is given, but there is no adapter among our rows' models: {ours}")
    return sources


# Answering ------------------------------------------------------------------------------------------------------------


def answer_in_columns(
    decoder: "ParallelDecoder", serial: bool, contexts: Sequence[Context], max_new_tokens: int, turns: int | None = None
) -> Decoded:
    """Our rows: all branches of all contexts at once, or (`serial`) one question at a time."""
    samples = [unanswered(to_tokens(context, decoder.tokenizer, decoder.eos_ids[0])) for context in contexts]
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


class Models:
    """The models of all rows. It holds one at a time, so that their peaks of memory can be told apart."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], conditions: Conditions) -> None:
        self._tokenizer, self._eos_ids, self._conditions = tokenizer, eos_ids, conditions
        self._held: dict[Any, Any] = {}

    def _read(self, hf: bool, source: "ModelSource") -> Any:
        from pd_jax.decoding import ParallelDecoder

        if (hf, source) not in self._held:
            self._held.clear()
            gc.collect()
            conditions = self._conditions
            self._held[hf, source] = (
                Transformers(source.model, self._tokenizer, self._eos_ids, conditions.dtype, torch_device())
                if hf
                else ParallelDecoder.from_pretrained(
                    source.model,
                    source.adapter,
                    dtype=conditions.dtype,
                    pair_indices=conditions.pair_indices,
                    local_files_only=True,
                )
            )
        return self._held[hf, source]

    def decoder(self, way: Way, source: "ModelSource") -> "ParallelDecoder":
        """Of one of our rows."""
        model = self._read(False, source)
        align = way.align(model.config, self._conditions.align)
        return model.variant(visibility=way.visibility, align=align, eos_ids=self._eos_ids)

    def answerer(self, way: Way, source: "ModelSource") -> Answerer:
        if not way.hf:
            return functools.partial(answer_in_columns, self.decoder(way, source), way.serial)
        model = self._read(True, source)
        methods = {"hf-sequential": model.sequential, "hf-batched": model.batched, "hf-one-prompt": model.one_prompt}
        return methods[way.name]
