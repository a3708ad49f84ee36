"""How the next token is drawn: the arguments a caller gives, and pure functions of logits [..., V]."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pd_jax.errors import InputError


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments of `generate`, `stream` and `columns`."""

    max_new_tokens: int | Sequence[Sequence[int]]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]
    stop: Sequence[str]


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn. Cuts apply in the order of transformers: penalty, temperature, top_k, top_p, min_p.

    max_new_tokens: for every branch, or one number per branch of every sample as a nested list. do_sample False takes
    the likeliest token. top_k 0, top_p 1 and min_p 0 cut nothing. repetition_penalty looks at the branch's own prompt
    and answer only. seed: one number, or one per sample. stop: strings that end a branch; its text is cut before them,
    its token_ids are not. Raises `InputError` for a value out of range.
    """

    max_new_tokens: int | Sequence[Sequence[int]] = 32
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "do_sample": (lambda v: isinstance(v, bool), "True or False"),
            "temperature": (lambda v: _real(v) and 0 < v < math.inf, "above 0 (do_sample=False is greedy)"),
            "top_k": (lambda v: _whole(v) and v >= 0, "a whole number, 0 (off) or above"),
            "top_p": (lambda v: _real(v) and 0 < v <= 1, "in (0, 1]"),
            "min_p": (lambda v: _real(v) and 0 <= v <= 1, "in [0, 1]"),
            "repetition_penalty": (lambda v: _real(v) and 0 < v < math.inf, "above 0 (1 is off)"),
            "seed": (
                lambda v: all(_whole(s) and 0 <= s < 2**32 for s in (v if isinstance(v, Sequence) else [v])),
                "a whole number in 0..2**32-1, or one a sample",
            ),
            "stop": (
                lambda v: isinstance(v, list | tuple) and all(isinstance(s, str) and s for s in v),
                "a list of strings that are not empty",
            ),
        }
        for field in fields(self):  # None is the default, and numpy's numbers are Python's
            value = getattr(self, field.name)
            value = field.default if value is None else value
            value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
            right, wanted = rules.get(field.name, (lambda v: True, ""))
            if not right(value):
                raise InputError(f"{field.name} is {value!r}; it must be {wanted}")
            object.__setattr__(self, field.name, value)

    @classmethod
    def of(cls, params: "SamplingParams | None", options: SamplingOptions) -> "SamplingParams":
        """`params`, or those that `options` say. Raises `InputError` when both are given."""
        if params is not None and options:
            raise InputError(f"params and {', '.join(options)} were both given; put everything into params")
        if not isinstance(params, SamplingParams | None):
            raise InputError(f"params is {params!r}; pass SamplingParams(max_new_tokens=32) or the like")
        return cls(**options) if params is None else params

    def method(self) -> "Method":
        truncate = self.do_sample and (self.top_k > 0 or self.top_p < 1)
        return Method(self.do_sample, truncate, self.repetition_penalty != 1)

    def controls(self, eos_ids: Sequence[int], allowed: Array, samples: int, rows: int) -> "Controls":
        if np.ndim(self.seed) and np.size(self.seed) != samples:
            raise InputError(f"seed is for {np.size(self.seed)} samples, not {samples}; give one, or one a sample")
        return Controls(
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
            np.resize(np.asarray(self.seed, np.uint32), rows),
            np.array(eos_ids, np.int32),
            allowed,
        )


@dataclass(frozen=True)
class Method:
    """What a compiled program is specialised for: each flag left out avoids work in every step."""

    do_sample: bool = False
    truncate: bool = False  # top_k or top_p are on: they search the vocabulary for a threshold
    penalise: bool = False  # repetition_penalty is on: which tokens a branch has seen is remembered


class Controls(NamedTuple):
    """The arguments as arrays, so that other values compile nothing."""

    temperature: Any  # float32 scalar
    top_k: Any  # int32 scalar
    top_p: Any  # float32 scalar
    min_p: Any  # float32 scalar
    repetition_penalty: Any  # float32 scalar
    seed: Any  # uint32 [S]
    eos: Any  # int32 [E], the tokens that end a branch
    allowed: Any  # bool [V], what may be chosen


def cut(scores: Array, mass: Array, limit: Array) -> Array:
    """Keep the scores [..., V] above which less than `limit` of `mass` [..., V] lies; the others become -inf.

    With mass 1 this is top_k, with the probabilities top_p; ties stay together. It bisects over the 32 bits of a float:
    on a CPU, sorting 151,936 scores would cost more than the rest of a step.
    """
    bits = jax.lax.bitcast_convert_type(scores + 0.0, jnp.int32)  # + 0.0: -0.0 and 0.0 are a tie
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers that compare as the floats do

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow
        enough = jnp.sum(jnp.where(order > middle, mass, 0.0), axis=-1, keepdims=True) < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    high = jnp.max(order, axis=-1, keepdims=True)
    low = jnp.full_like(high, jnp.iinfo(jnp.int32).min)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold, scores, -jnp.inf)


def distribution(method: Method, controls: Controls, scores: Array, seen: Array | None = None) -> Array:
    """What a token is drawn from: `scores` [..., V] penalised where `seen`, and when sampling scaled and cut."""
    scores = jnp.where(controls.allowed, scores, -jnp.inf)
    if seen is not None:
        penalty = controls.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if not method.do_sample:
        return scores
    scores /= controls.temperature
    if method.truncate:
        top_k = jnp.where(controls.top_k > 0, controls.top_k, scores.shape[-1]).astype(jnp.float32)
        scores = cut(scores, jnp.ones_like(scores), top_k)
        # The probabilities above a rare token may round to 1: infinity keeps it when top_p is off.
        scores = cut(scores, jax.nn.softmax(scores, axis=-1), jnp.where(controls.top_p < 1, controls.top_p, jnp.inf))
    least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(controls.min_p)
    return jnp.where(scores >= least, scores, -jnp.inf)


def draw(scores: Array, key: Array | None, count: Array) -> Array:
    """int32 [S, n] from a `distribution` [S, n, V]: the likeliest, or by the branch's key and count, both [S, n]."""
    if key is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def one(key: Array, count: Array, scores: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, count), scores).astype(jnp.int32)

    return jax.vmap(jax.vmap(one))(key, count, scores)
