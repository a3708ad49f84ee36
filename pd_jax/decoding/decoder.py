"""ParallelDecoder: samples become rows, rows are decoded column by column (`decoding.steps`), ids become text."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from pd_jax.columns import Coordinates
from pd_jax.config import MIX, VISIBILITIES, Align, Dtype, ModelConfig, RowVisibility, Visibility, check_choice
from pd_jax.data.answers import Columns, Event, Result, Transcript, events, result_of
from pd_jax.data.text import check_ids, tokenise_samples
from pd_jax.decoding.prompts import SMALLEST_ROW, Prompt, branch_limits, make_prompt, row_visibility
from pd_jax.decoding.sampling import Method, SamplingOptions, SamplingParams
from pd_jax.decoding.session import Session
from pd_jax.decoding.steps import (
    BLOCK,
    BROKEN,
    Program,
    State,
    cache_bytes,
    decode_block,
    enlarge,
    prefill,
    row_attention,
    row_logits,
    unstack,
)
from pd_jax.errors import InputError, check_whole
from pd_jax.files import check_rows, find_model, load_adapter, load_config, load_eos_ids, load_params, load_tokenizer
from pd_jax.layout import Layout, Sample, TokenSample, bucket, build_layout
from pd_jax.lora import merge_weight
from pd_jax.mesh import check_model, decoding_shardings, param_shardings
from pd_jax.params import Params

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """A call between two blocks of columns."""

    columns: Columns  # the newest
    transcripts: list[list[Transcript]]  # of every branch of every sample; always the same ones, which grow
    state: State


def _check_settings(dtype: str, visibility: str | None, align: str | None) -> None:
    check_choice("dtype", dtype, Dtype)
    check_choice("visibility", visibility or "columns", Visibility)
    check_choice("align", align or "left", Align)


def _check_mesh(config: ModelConfig, mesh: Mesh | None) -> None:
    if mesh is None:
        return
    if mesh.size != mesh.shape["tensor"]:
        raise InputError(
            f"the mesh {dict(mesh.shape)} splits rows or hidden dimensions; decoding splits heads only: "
            "use make_mesh(1, 1, -1)"
        )
    check_model(config, mesh)


def _free_bytes(device: jax.Device) -> float:
    """Infinity where the device does not tell, as a CPU."""
    memory = device.memory_stats() or {}
    return memory.get("bytes_limit", math.inf) - memory.get("bytes_in_use", 0)


class ParallelDecoder:
    """Answers many prompts over one background at once, one column of tokens a step.

    `params` as in `pd_jax.params`, of `config` (or as `unstack` has left them); `eos_ids` end a branch. dtype: of
    weights, activations and cache. visibility and align: None takes those of the training, others are said in one line;
    a sample's own visibility wins. mesh, of `pd_jax.mesh.make_mesh(1, 1, -1)`: weights and cache are split over its
    devices by heads, mlp and vocabulary. Raises `InputError` for a setting that is not known and for a mesh that does
    not divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Any,
        eos_ids: Sequence[int],
        *,
        dtype: Dtype = "float32",
        visibility: Visibility | None = None,
        align: Align | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        _check_settings(dtype, visibility, align)
        _check_mesh(config, mesh)
        self.config, self.tokenizer, self.eos_ids = config, tokenizer, tuple(eos_ids)
        self.dtype, self.mesh = dtype, mesh
        self.visibility: Visibility = visibility or config.decoded_as[0]
        self.align: Align = align or config.decoded_as[1]
        if config.trained_otherwise(self.visibility, self.align):
            log.warning(
                "trained with visibility %s, align %s; decoding with visibility %s, align %s",
                config.visibility, config.align, self.visibility, self.align,
            )  # fmt: skip
        done = isinstance(params["layers"], list)
        if mesh is not None and not done:
            params = jax.device_put(params, param_shardings(config, mesh))
        self.weights = params if done else unstack({**params, "layers": dict(params["layers"])}, dtype)
        if mesh is not None:
            self.weights = jax.device_put(self.weights, decoding_shardings(config, mesh))
        # A model has more rows than its tokenizer has tokens; the rows beyond were never trained.
        known = check_rows(tokenizer, config.vocab_size)
        self._allowed = jnp.array([i in known for i in range(config.vocab_size)])

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        adapter: str | Path | None = None,
        dtype: Dtype = "float32",
        visibility: Visibility | None = None,
        align: Align | None = None,
        pair_indices: Sequence[int] | None = None,
        local_files_only: bool = False,
        mesh: Mesh | None = None,
    ) -> "ParallelDecoder":
        """From a Hugging Face directory, a hub id or a pd_jax checkpoint; `adapter` is a directory merged into it.

        pair_indices: for weights that do not say with which RoPE pairs they were trained. With a mesh every device
        reads its own part of the weights. Raises `InputError` when something is missing or contradicts what is stored.
        """
        _check_settings(dtype, visibility, align)
        directory = find_model(str(path_or_hub_id), local_files_only)
        extra = None if adapter is None else find_model(str(adapter), local_files_only)
        config = load_config(directory, pair_indices, extra)
        _check_mesh(config, mesh)
        tokenizer = load_tokenizer(directory, config.vocab_size)
        eos_ids = load_eos_ids(directory, tokenizer)
        shardings = None if mesh is None else param_shardings(config, mesh)
        params = load_params(directory, config, jnp.dtype(dtype), shardings=shardings)
        if extra is not None:
            adapters, lora = load_adapter(extra, config, directory)
            for name, part in adapters.items():
                params["layers"][name] = merge_weight(params["layers"][name], part, name, lora)
        settings: dict[str, Any] = {"dtype": dtype, "visibility": visibility, "align": align, "mesh": mesh}
        return cls(config, unstack(params, dtype), tokenizer, eos_ids, **settings)

    def variant(
        self, *, visibility: Visibility | None = None, align: Align | None = None, eos_ids: Sequence[int] | None = None
    ) -> "ParallelDecoder":
        """A decoder over the same weights with other settings; None keeps this one's."""
        _check_settings(self.dtype, visibility, align)
        other = copy.copy(self)
        other.visibility, other.align = visibility or self.visibility, align or self.align
        other.eos_ids = self.eos_ids if eos_ids is None else tuple(eos_ids)
        return other

    def generate(
        self,
        samples: Sequence[Sample | TokenSample],
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Result]:
        """Answer all branches of all samples in one batch; `options` are the fields of `SamplingParams`.

        What a branch draws depends on the seed, the sample and its place in it only: a sample that stands twice in a
        call answers the same twice. Ask with a seed per sample for several answers.

        Raises `InputError` for no samples, a prompt without tokens, a value out of range, a context longer than
        max_position_embeddings, and a cache that does not fit in the device's memory; all before anything compiles.
        """
        asked = self._tokenise(samples)
        *_, step = self._run(asked, SamplingParams.of(params, options), BLOCK)
        return [result_of(branches, len(sample)) for sample, branches in zip(asked, step.transcripts, strict=True)]

    def columns(
        self,
        samples: Sequence[Sample | TokenSample],
        *,
        params: SamplingParams | None = None,
        every: int = BLOCK,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Columns]:
        """Answer all branches of all samples as `generate` does, and give their token ids as they come: the first
        column by itself, then up to `every` (at most BLOCK) at once."""
        for step in self._run(self._tokenise(samples), SamplingParams.of(params, options), every):
            yield step.columns

    def stream(
        self, sample: Sample | TokenSample, *, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[Event]:
        """Answer one sample, column by column, with the arguments, the steps and the answers of `generate`."""
        steps = self._run(self._tokenise([sample]), SamplingParams.of(params, options), 1)
        yield from events((columns, branches) for columns, (branches,), _ in steps)

    def session(
        self,
        background: str | Sequence[int],
        *,
        visibility: Visibility | None = None,
        chat_markup: bool = False,
        room: int = 1024,
    ) -> Session:
        """Read a text or token ids once, to be asked about again and again: see `Session`.

        visibility: as a sample's own. chat_markup: as in `Sample`, of everything that the session is told. room: tokens
        for which the cache has place behind the background before it must grow, which compiles again.
        """
        return Session(self, background, visibility or self.visibility, chat_markup, room)

    def layout(self, samples: Sequence[Sample | TokenSample]) -> Layout:
        """The prompts (and the answers of a `TokenSample`) as rows, one sample a row."""
        return build_layout([[sample] for sample in self._tokenise(samples)], align=self.align)

    def logits(self, layout: Layout | Mapping[str, Any]) -> np.ndarray:
        """float32 [S, T, V] of one forward over `layout`, or over a mapping that has its arrays [S, T].

        Needed are tokens, branch, column, segment and valid; prompt only when the visibility is "prompts". Samples are
        seen as their own visibility says, as the decoder's where they have none.
        """
        return self.on_rows(row_logits, layout)[:, : np.shape(layout["tokens"])[1]]

    def attention(self, layout: Layout | Mapping[str, Any]) -> np.ndarray:
        """Where the tokens of branches look, float32 [S, L, N, 3]: mean shares of their attention on the background,
        the own branch and the siblings, by layer and head, for rows as `logits` takes them.

        All scores of a layer are in memory at once. A row without branches is NaN.
        """
        return self.on_rows(row_attention, layout)

    def sibling_effect(self, layout: Layout | Mapping[str, Any]) -> np.ndarray:
        """How much the siblings change what every branch would say, float32 [S, B]: the mean change of the logits of
        its tokens when siblings are hidden, over the logits' standard deviation; NaN where a row has no such branch.

        0 says that nobody looks: an isolated model gives the same answers. Rows as `logits` takes them.
        """
        arrays = {name: np.asarray(layout[name]) for name in layout.keys()}  # noqa: SIM118, mappings differ
        own = np.full(arrays["tokens"].shape, VISIBILITIES.index("isolated"), np.int32)
        shown, hidden = self.logits(arrays), self.logits(arrays | {"visibility": own})
        change = np.abs(shown - hidden).mean(-1) / shown[arrays["valid"]].std()
        branches = range(1, int(arrays["branch"].max(initial=0)) + 1)
        there = np.stack([arrays["valid"] & (arrays["branch"] == b) for b in branches], axis=1)  # [S, B, T]
        with np.errstate(invalid="ignore"):
            return (np.where(there, change[:, None], 0).sum(-1) / there.sum(-1)).astype(np.float32)

    def on_rows(self, run: Callable[..., Array], layout: Layout | Mapping[str, Any]) -> np.ndarray:
        """What a jitted function (weights, tokens, coordinates, *, program) says of rows as `logits` takes them, padded
        to a bucket: `steps.row_logits`, or another that looks into a forward (`pd_jax.replay` does)."""
        given = set(layout.keys())
        shape = np.shape(layout["tokens"])
        arrays = {name: np.asarray(layout[name]) for name in ("tokens", "branch", "column", "segment", "valid")}
        check_ids(arrays["tokens"], self.config.vocab_size, "the layout's tokens")
        kind = np.asarray(layout["visibility"]) if "visibility" in given else np.full(shape, -1)
        kind = np.where(kind < 0, VISIBILITIES.index(self.visibility), kind).astype(np.int32)
        visibility: RowVisibility = VISIBILITIES[kind.flat[0]] if kind.size and (kind == kind.flat[0]).all() else MIX
        if "prompt" not in given and visibility in ("prompts", MIX):
            raise InputError(f"the layout has no array 'prompt', which visibility {visibility!r} needs")
        arrays |= {"visibility": kind, "prompt": np.asarray(layout["prompt"]) if "prompt" in given else kind < 0}
        width = ((0, 0), (0, bucket(shape[1], SMALLEST_ROW) - shape[1]))
        arrays = {name: np.pad(array, width) for name, array in arrays.items()}
        program = Program(self.config, visibility, Method())
        with self.on_mesh():
            return np.asarray(run(self.weights, arrays["tokens"], Coordinates.of(arrays, visibility), program=program))

    def on_mesh(self) -> AbstractContextManager:
        """Programs are compiled for the mesh; entered for every call alone, a generator would leak it to its user."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _tokenise(self, samples: Sequence[Sample | TokenSample]) -> list[TokenSample]:
        return tokenise_samples(samples, self.tokenizer, self.config.vocab_size)

    def _run(self, samples: Sequence[TokenSample], params: SamplingParams, every: int) -> Iterator[Step]:
        """Answer the branches of all samples, from one prefill of all their texts."""
        if any(sample.later or any(len(branch.answer) for branch in sample.branches) for sample in samples):
            raise InputError(
                "a branch has an answer already, or there are later turns; decoding starts behind the first prompts: "
                "leave them out, or ask in a session"
            )
        limits = branch_limits(samples, params.max_new_tokens)
        prompt = make_prompt(samples, limits, self.align, self.visibility)
        (s, t), n = prompt.tokens.shape, prompt.last.shape[1]
        most = t + n * bucket(int(prompt.limit.max()), BLOCK)
        self.check(prompt, s, most)

        def begin(*arrays: Any, program: Program) -> tuple[State, Array]:
            return prefill(*arrays, prompt, program=program, room=BLOCK)

        visibility = row_visibility(samples, self.visibility)
        larger = lambda size: min(4 * size - 3 * t, most)  # noqa: E731
        yield from self.decode(begin, prompt, limits, params, visibility, every, larger)

    def check(self, prompt: Prompt, samples: int, slots: int) -> None:
        """Raise `InputError` for what cannot be decoded with a cache of so many slots, before anything compiles."""
        check_ids(self.eos_ids, self.config.vocab_size, "eos_ids")
        longest, most = int((prompt.first + prompt.limit).max()), self.config.most_columns
        if longest > most:
            raise InputError(
                f"background, prompts and max_new_tokens take {longest} columns, the model has "
                f"max_position_embeddings {most}; shorten the background or lower max_new_tokens"
            )
        devices = self.weights["embed"].devices()
        needed = cache_bytes(self.config, samples=samples, tokens=slots, branches=0, columns=0, dtype=self.dtype)
        needed //= len(devices)
        log.info("cache of %d rows x %d slots: %.1f MiB", samples, slots, needed / 2**20)
        free = _free_bytes(next(iter(devices)))
        if needed > free:
            raise InputError(
                f"the cache takes {needed / 2**30:.1f} GiB, the device has {free / 2**30:.1f} GiB left; pass fewer "
                "samples at a time, shorten the background or lower max_new_tokens"
            )

    def decode(
        self,
        begin: Callable[..., tuple[State, Array]],
        prompt: Prompt,
        limits: Sequence[Sequence[int]],
        params: SamplingParams,
        visibility: RowVisibility,
        every: int,
        larger: Callable[[int], int],
    ) -> Iterator[Step]:
        """Begin by `prefill` or `extend`, then decode up to `every` columns (at most BLOCK) at once. `larger` says of
        the slots of a cache that is full how many it gets."""
        if not 1 <= check_whole(every, "every") <= BLOCK:
            raise InputError(f"every is {every}; it must be 1 to {BLOCK} columns")
        # A branch must end in the column in which its stop string does: its siblings would see what comes after.
        every = 1 if params.stop else every
        program = Program(self.config, visibility, params.method())
        controls = params.controls(self.eos_ids, self._allowed, len(limits), len(prompt.tokens))
        decode = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        transcripts = [[Transcript(decode, self.eos_ids, limit, params.stop) for limit in row] for row in limits]
        with self.on_mesh():
            state, token = begin(self.weights, controls, program=program)
        columns = np.asarray(token)[None]
        for r, b in np.argwhere(columns[0] == BROKEN):
            raise InputError(
                f"sample {r}, branch {b}: the logits behind its prompt are NaN or infinite; the weights or the adapter "
                f"are damaged, or dtype {self.dtype} is too narrow for them"
            )
        start, width, branches = int(state.cache.slot), int(state.cache.width), prompt.last.shape[1]
        count = 0  # columns chosen; all but the last have been fed
        while True:
            for column, chosen in enumerate(columns, start=count):
                for r, row in enumerate(transcripts):
                    for b, transcript in enumerate(row):
                        if chosen[r, b] >= 0:
                            transcript.push(int(chosen[r, b]), column)
            yield Step(Columns(count, columns), transcripts, state)
            count += len(columns)
            ended = np.ones(prompt.last.shape, bool)
            for r, row in enumerate(transcripts):
                ended[r, : len(row)] = [t.finish_reason is not None for t in row]
            if ended.all():
                return
            if start + (count - 1) * width + branches > (size := state.cache.size):
                with self.on_mesh():
                    state = replace(state, cache=enlarge(state.cache, larger(size)))
            until = min(count + every, (state.cache.size - branches - start) // width + 2)  # what can be fed, and one
            with self.on_mesh():
                state, block = decode_block(self.weights, controls, state, ended, np.int32(until), program=program)
            columns = np.asarray(block)[: until - count]
