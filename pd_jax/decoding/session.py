"""A session: one text read once, then forks and joins over one cache."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal, Unpack

import jax
import numpy as np

from pd_jax.columns import Coordinates
from pd_jax.config import Visibility, check_choice
from pd_jax.data.answers import BranchResult, Columns, Event, Result, Transcript, events, result_of
from pd_jax.data.text import check_ids, tokenise_background, tokenise_samples
from pd_jax.decoding.prompts import Prompt, branch_limits, make_prompt
from pd_jax.decoding.sampling import SamplingOptions, SamplingParams
from pd_jax.decoding.steps import BLOCK, PIECE, enlarge, extend, prefill
from pd_jax.errors import InputError, check_text, check_whole, shown
from pd_jax.layout import Branch, Sample, TokenSample, Turn, bucket, members, place_texts

SMALLEST_BLOCK = 64  # tokens; the smallest bucket of what is read at once behind the background
Text = str | Sequence[int]  # or token ids
Said = tuple[Columns, list[Transcript]]


class Session:
    """A background that is read once, and what is asked about it; `ParallelDecoder.session` makes one.

    A fork answers prompts side by side, in branches that see what is before them as their visibility says. In a join
    the trunk goes on: behind the last column, with a prompt of its own, having seen all branches. They come in any
    order, and nothing that was said is read again. Options are the fields of `SamplingParams`; max_new_tokens may be 0
    (what is read then says nothing). The first fork draws what `generate` draws.

    What can be refused is refused before anything compiles, as `InputError`, and leaves the session as it was. A stream
    that is left, or overtaken by another call, ends there: what it has said stays said.
    """

    def __init__(self, decoder: Any, background: Text, visibility: Visibility, chat_markup: bool, room: int) -> None:
        check_choice("visibility", visibility, Visibility)
        if check_whole(room, "room") < 1:
            raise InputError(f"room is {room}; it must be 1 token or more")
        if isinstance(background, str):
            check_text(background, "the background")
            background = tokenise_background(decoder.tokenizer, background, chat_markup)
        if not isinstance(background, Sequence):
            raise InputError(f"the background is {shown(background)}; pass a text or a list of token ids")
        check_ids(background, decoder.config.vocab_size, "the background")
        self._decoder, self._chat_markup = decoder, chat_markup  # a ParallelDecoder, whose file imports this one
        self._visibility = visibility
        self._said, self._under_way = TokenSample(tuple(background), (), visibility), None
        self._sizes: dict[str, set[int]] = {"tokens": set(), "branches": set()}
        nothing = replace(self._said, branches=[Branch(())])  # says nothing, and so its end is nobody's concern
        prompt = make_prompt([nothing], [[0]], decoder.align, visibility)
        self._start = prompt.tokens.shape[1]
        decoder.check(prompt, 1, self._start + room)
        read = partial(prefill, prompt=prompt, room=room)
        step = next(decoder.decode(read, prompt, [[0]], SamplingParams(), visibility, BLOCK, self._larger))
        self._cache = step.state.cache
        self.reset()

    @property
    def sample(self) -> TokenSample:
        """Everything that was read and said so far, as `ParallelDecoder.layout` takes it."""
        if self._under_way is None:
            return self._said
        turn, transcripts = self._under_way
        said = [replace(text, answer=tuple(t.ids)) for text, t in zip(members(turn), transcripts, strict=True)]
        return self._with(said[0] if isinstance(turn, Branch) else said)

    def reset(self, to: str = "background") -> None:
        """Forget all forks and joins; the background's part of the cache stays."""
        check_choice("to", to, Literal["background"])
        self._said, self._under_way = replace(self._said, branches=(), later=()), None
        self._cache = replace(self._cache, slot=np.int32(len(self._said.background)))

    def fork(
        self, prompts: Sequence[Text], *, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Result:
        """Answer prompts side by side. prefill_tokens of the result are those that were read for it."""
        *_, (_, branches) = self._ask(self._branches(prompts), SamplingParams.of(params, options), BLOCK)
        return result_of(branches, self._read)

    def join(
        self, prompt: Text, *, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> BranchResult:
        """Let the trunk go on: a prompt, and what the model says behind it."""
        (text,) = self._branches([prompt])
        *_, (_, branches) = self._ask(text, SamplingParams.of(params, options), BLOCK)
        return branches[0].result()

    def stream_fork(
        self, prompts: Sequence[Text], *, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[Event]:
        """`fork`, column by column."""
        return events(self._ask(self._branches(prompts), SamplingParams.of(params, options), 1))

    def stream_join(
        self, prompt: Text, *, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[Event]:
        """`join`, column by column, as events of one branch."""
        (text,) = self._branches([prompt])
        return events(self._ask(text, SamplingParams.of(params, options), 1))

    def _branches(self, prompts: Any) -> Sequence[Branch]:
        """Texts, or runs of token ids, as branches; `Sample` and `tokenise_samples` refuse everything else."""
        ids = isinstance(prompts, Sequence) and all(isinstance(p, Sequence) and not isinstance(p, str) for p in prompts)
        sample = TokenSample((), [*map(Branch, prompts)]) if ids else Sample("", prompts, None, self._chat_markup)
        return tokenise_samples([sample], self._decoder.tokenizer, self._decoder.config.vocab_size)[0].branches

    def _with(self, turn: Turn) -> TokenSample:
        said = self._said
        if said.branches or said.later or isinstance(turn, Branch):
            return replace(said, later=(*said.later, turn))
        return replace(said, branches=turn)

    def _larger(self, size: int) -> int:
        """The slots of a cache that has grown once: four times as many behind the background."""
        return 4 * size - 3 * self._start

    def _grown(self, needed: int) -> int:
        size = self._cache.size
        while size < needed:
            size = self._larger(size)
        return size

    def _size(self, kind: str, needed: int, waste: int) -> int:
        """A static size for `needed`: one that is in use and at most `waste` times too large, or else a new one."""
        sizes = self._sizes[kind]
        size = min((size for size in sizes if needed <= size <= waste * needed), default=needed)
        sizes.add(size)
        return size

    def _unread(self, whole: Prompt) -> Prompt:
        """What of a row the cache does not hold: the new prompts, and what was said last in the turn before."""
        place = jax.tree.map(lambda x: np.asarray(x)[0], whole.coordinates)
        held = jax.tree.map(lambda x: np.asarray(x)[0, : int(self._cache.slot)], self._cache.coordinates)

        def key(where: Coordinates) -> np.ndarray:
            return np.asarray(where.column, np.int64) << 32 | np.asarray(where.branch)

        new = np.flatnonzero(place.valid & ~np.isin(key(place), key(held)[held.valid]))
        if self._visibility == "isolated":
            # First what the turn before said last, then branch by branch: siblings are then pieces that nobody sees.
            places = chain(*place_texts(self._said, self._decoder.align))
            later = place.column[new] >= max(text.end() for text in places)
            new = new[np.lexsort((place.column[new], place.branch[new], later))]
        self._read = len(new)
        size = bucket(len(new), SMALLEST_BLOCK)
        tokens = self._size("tokens", size if size <= PIECE else -(-size // PIECE) * PIECE, waste=4)
        more = self._size("branches", whole.last.shape[1], waste=8) - whole.last.shape[1]

        def cut(array: Any) -> np.ndarray:
            return np.pad(np.asarray(array)[:, new], ((0, 0), (0, tokens - len(new))))

        def widen(array: np.ndarray) -> np.ndarray:
            return np.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)))

        rest = {name: widen(getattr(whole, name)) for name in whole._fields[2:]}
        found = np.zeros(len(place.valid), np.int32)
        found[new] = np.arange(len(new))
        rest["last"] = found[rest["last"]]
        return Prompt(cut(whole.tokens), jax.tree.map(cut, whole.coordinates), **rest)

    def _ask(self, turn: Turn, params: SamplingParams, every: int) -> Iterator[Said]:
        self._said, self._under_way = self.sample, None
        decoder, asked, visibility = self._decoder, self._with(turn), self._visibility
        limits = branch_limits([asked], params.max_new_tokens, least=0)
        prompt = self._unread(make_prompt([asked], limits, decoder.align, visibility))
        slot, width = int(self._cache.slot), len(members(turn))
        read = slot + prompt.tokens.shape[1]
        most = read + width * int(prompt.limit.max()) + prompt.last.shape[1]  # should no branch end early
        decoder.check(prompt, 1, self._grown(most) - self._cache.size)
        if read > self._cache.size:
            with decoder.on_mesh():
                self._cache = enlarge(self._cache, self._grown(read))
        begin = partial(extend, prompt=prompt, cache=replace(self._cache, slot=np.int32(slot), width=np.int32(width)))
        for step in decoder.decode(begin, prompt, limits, params, visibility, every, self._larger):
            said = self._under_way = turn, step.transcripts[0]
            self._cache = step.state.cache
            yield step.columns, step.transcripts[0]
            if self._under_way is not said:
                return  # overtaken
