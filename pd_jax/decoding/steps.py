"""Column decoding on the device: a prefill, then jitted blocks of columns, one token of every branch a step.

Axes as in `pd_jax.model`, and S samples, n branches (padded to a bucket), C cache slots. The cache of a layer is
heads-major, k and v [K*S, C, H]: slots 0..T-1 hold the prefilled row, every decoded column takes the next n slots.
Beside it stand the coordinates of its slots, never a mask: who sees whom is `columns.column_mask`, as in training.

The first answer token of a branch comes from the prefill's logits at its last prompt token. What a branch emits is fed
once, at its own coordinate, and seen from the next column on; an end-of-sequence token is not emitted.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from pd_jax.attention import make_attention
from pd_jax.columns import Coordinates, column_mask, rope_tables, sibling_mask
from pd_jax.config import ModelConfig, RowVisibility
from pd_jax.cpu import attend_in_pieces, pieces_are_faster, times
from pd_jax.decoding.prompts import Prompt
from pd_jax.decoding.sampling import Controls, Method, distribution, draw
from pd_jax.mesh import CACHE_KS_C_H
from pd_jax.model import block, head, rms_norm
from pd_jax.params import PROJECTIONS, Params
from pd_jax.watching.sight import watching

BROKEN = -2  # in the place of a token
BLOCK = 32  # columns decoded per jitted call; also the first cache size, in columns
PIECE = 256  # tokens that are read at once against a cache; the scores of all its slots are in memory


@dataclass(frozen=True)
class Program:
    """Everything that a compiled program is specialised for, beside the shapes of its arrays."""

    config: ModelConfig
    visibility: RowVisibility
    method: Method


@struct.dataclass
class Cache:
    """What tokens have left for those after them: C slots of S samples."""

    layers: list[tuple[Array, Array]]  # k and v of every layer, each [K*S, C, H]
    coordinates: Coordinates  # [S, C], of the slots
    slot: Array  # int32 scalar, the first free slot
    width: Array  # int32 scalar, slots that a column takes

    @property
    def size(self) -> int:
        """C"""
        return self.coordinates.valid.shape[1]


@struct.dataclass
class State:
    """Decoding between two columns: S samples, n branches."""

    cache: Cache
    count: Array  # int32 scalar, columns chosen so far
    token: Array  # int32 [S, n], chosen last and not fed yet
    live: Array  # bool [S, n], there is such a token
    done: Array  # bool [S, n], no more will be chosen
    branch: Array  # int32 [S, n], this and the next four as in `Prompt`
    first: Array  # int32 [S, n]
    forced: Array  # int32 [S, n, W]
    forced_count: Array  # int32 [S, n]
    limit: Array  # int32 [S, n]
    key: Array | None  # random keys [S, n]; None when nothing is sampled
    seen: Array | None  # bool [S, n, V], the branch's own tokens; None when nothing is penalised


# --- weights
@partial(jax.jit, static_argnames=("name", "dtype"))
def _layers_of(stack: Array, name: str, dtype: str) -> list[Array]:
    """The weights [L, ...] of one kind as a list of L, projections as matrices [out, in]."""
    if name in PROJECTIONS:
        inputs = math.prod(stack.shape[1 : 1 + len(PROJECTIONS[name].summed)])
        stack = stack.reshape(stack.shape[0], inputs, -1).swapaxes(1, 2)
    return [weight.astype(dtype) for weight in stack]


def unstack(params: Params, dtype: str = "float32") -> Params:
    """Weights for decoding: a list of layers (XLA copies slices of a stack in every step), kernels as [out, in].

    With 4 to 16 rows a CPU multiplies matrices stored as [out, in] up to 1.8 times as fast. They are used as they are:
    kernels with the heads apart, or transposed in the program, are copied in every step. The stacks leave `params` on
    the way, so that two copies of all weights never exist.
    """
    stacks = params.pop("layers")
    kinds = {name: _layers_of(stacks.pop(name), name, dtype) for name in list(stacks)}
    layers = [dict(zip(kinds, weights, strict=True)) for weights in zip(*kinds.values(), strict=True)]
    return {name: jnp.asarray(weight, dtype) for name, weight in params.items()} | {"layers": layers}


def _linear(x: Array, name: str, layer: Params, head_dim: int) -> Array:
    """`model.project` with a matrix of `unstack`."""
    y = times(x.reshape(*x.shape[:2], -1), layer[name])
    return y.reshape(*y.shape[:2], -1, head_dim) if name in ("q", "k", "v") else y


def _logits(weights: Params, hidden: Array) -> Array:
    """float32 [S, n, V] from hidden states [S, n, D]."""
    return times(hidden, head(weights).astype(hidden.dtype), jnp.float32)


# --- one forward: of whole rows, of tokens behind a cache, of one column
def _heads_first(array: Array) -> Array:
    """New k or v [S, T, K, H] in the cache's order, [K*S, T, H]: one axis of heads and samples, the heads outside.

    With two axes XLA:CPU merges them for the product; for one branch it then writes the cache twice, and so copies it.
    """
    s, t, heads, h = array.shape
    return array.transpose(2, 0, 1, 3).reshape(heads * s, t, h)


def _over_heads(cache: Array) -> Array:
    """[K*S, C, H] split over the kv heads, where there is a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return cache
    return jax.lax.with_sharding_constraint(cache, CACHE_KS_C_H)


def cached_attention(
    q: Array, k: Array, v: Array, mask: Array, siblings: Array, sibling_bias: Array | None, filled: Array
) -> Array:
    """`attention.dense_attention` for a few queries over a heads-major cache, the branches folded into the GQA rows.

    q [S, n, N, H], k and v [K*S, C, H], mask and siblings [S, n, C], sibling_bias [N] or None -> [S, n, N, H]. filled:
    int32 scalar; no query sees a slot from there on.
    """
    s, n, _, h = q.shape
    heads, slots = k.shape[0] // s, k.shape[1]
    folded = q.reshape(s, n, heads, -1, h).transpose(2, 0, 1, 3, 4)  # [K, S, n, G, H]
    if pieces_are_faster(n * folded.shape[3]):
        out = attend_in_pieces(folded, k, v, mask, siblings, sibling_bias, filled)
    else:
        rows = folded.reshape(heads * s, -1, h)
        scores = jnp.einsum("brh,bch->brc", rows, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(*folded.shape[:4], slots) / math.sqrt(h)
        if sibling_bias is not None:
            scores += jnp.where(siblings[None, :, :, None], sibling_bias.reshape(heads, 1, 1, -1, 1), 0.0)
        scores = jnp.where(mask[None, :, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("brc,bch->brh", weights.reshape(heads * s, -1, slots), v).reshape(folded.shape)
    return out.transpose(1, 2, 0, 3, 4).reshape(q.shape)


def encode(
    weights: Params, program: Program, tokens: Array, coordinates: Coordinates, attend: Any = None
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Tokens [S, T] at once, as rows with the training attention unless another is given: hidden states [S, T, D], and
    k and v [S, T, K, H] of every layer."""
    config = program.config
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    attend = make_attention(coordinates, program.visibility) if attend is None else attend
    kept: list[tuple[Array, Array]] = []

    def attend_and_keep(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        kept.append((k, v))
        return attend(q, k, v, sibling_bias)

    x = weights["embed"][tokens]
    for layer in weights["layers"]:
        x = block(
            config,
            layer,
            x,
            rope=rope,
            attend=attend_and_keep,
            linear=partial(_linear, layer=layer, head_dim=config.head_dim),
        )
    return rms_norm(x, weights["norm"], config.rms_norm_eps), kept


def read(weights: Params, program: Program, tokens: Array, here: Coordinates, cache: Cache) -> tuple[Cache, Array]:
    """Tokens [S, T] with coordinates `here` behind what a cache holds: the cache with them in the slots from its first
    free one on (which is left as it is), and hidden states [S, T, D]."""
    coordinates = jax.tree.map(
        lambda all_, new: jax.lax.dynamic_update_slice(all_, new, (0, cache.slot)), cache.coordinates, here
    )
    mask = column_mask(here, coordinates, program.visibility, cache.slot + jnp.arange(tokens.shape[1]))
    siblings = sibling_mask(here, coordinates)
    old, layers = iter(cache.layers), []

    def attend(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        # Written first, attended then: the other way round XLA copies the cache.
        k, v = (
            _over_heads(jax.lax.dynamic_update_slice(past, _heads_first(new), (0, cache.slot, 0)))
            for past, new in zip(next(old), (k, v), strict=True)
        )
        layers.append((k, v))
        return cached_attention(q, k, v, mask, siblings, sibling_bias, cache.slot + tokens.shape[1])

    hidden, _ = encode(weights, program, tokens, here, attend)
    return dataclasses.replace(cache, layers=layers, coordinates=coordinates), hidden


def feed(weights: Params, program: Program, state: State) -> tuple[State, Array]:
    """One column: feed `state.token` where `state.live`; float32 logits [S, n, V] for the tokens after it."""
    # A dead branch is fed too, for its static place; its slot is invalid, so it sees itself and nobody sees it.
    kind = state.cache.coordinates.visibility  # of a mix: every slot of a row has that of its sample
    here = Coordinates(
        branch=state.branch,
        column=state.first + state.count - 1,
        segment=jnp.zeros_like(state.token),
        valid=state.live,
        prompt=jnp.zeros_like(state.live),
        visibility=None if kind is None else jnp.broadcast_to(kind[:, :1], state.token.shape),
    )
    cache, hidden = read(weights, program, state.token, here, state.cache)
    cache = dataclasses.replace(cache, slot=cache.slot + cache.width)
    return dataclasses.replace(state, cache=cache), _logits(weights, hidden)


# --- the loop
def choose(program: Program, controls: Controls, state: State, scores: Array) -> tuple[State, Array]:
    """The next token of every branch, from its logits [S, n, V]; and what was drawn, int32 [S, n], else -1."""
    scores = distribution(program.method, controls, scores, state.seen)
    token = draw(scores, state.key, state.count - state.forced_count)
    ended = jnp.any(token[..., None] == controls.eos, axis=-1)
    silent = state.done
    if state.forced.shape[-1]:
        is_forced = state.count < state.forced_count
        forced = jax.lax.dynamic_index_in_dim(state.forced, state.count, axis=-1, keepdims=False)
        token, ended, silent = jnp.where(is_forced, forced, token), ended & ~is_forced, silent | is_forced
    live = ~state.done & ~ended
    count = state.count + 1
    seen = state.seen
    if seen is not None:
        s, n = token.shape
        seen = seen.at[jnp.arange(s)[:, None], jnp.arange(n), token].max(live)
    after = dataclasses.replace(
        state,
        token=jnp.where(live, token, 0),
        live=live,
        done=state.done | ended | (count >= state.limit),
        count=count,
        seen=seen,
    )
    return after, jnp.where(silent, -1, token)


@partial(jax.jit, static_argnames=("size", "axis"))
def _grow(array: Array, size: int, axis: int) -> Array:
    return jnp.pad(array, [(0, size - n if a == axis else 0) for a, n in enumerate(array.shape)])


def begin(
    weights: Params, program: Program, controls: Controls, prompt: Prompt, hidden: Array, cache: Cache
) -> tuple[State, Array]:
    """The state behind a prompt with hidden states [S, T, D], and the logits [S, n, V] at its last tokens."""
    where, (s, n) = prompt.coordinates, prompt.last.shape
    seen = None
    if program.method.penalise:
        row = where.branch - prompt.branch[:, :1]  # below 0 and from n on are other turns' tokens, and the background
        own = where.valid & where.prompt & (row >= 0)
        place = jnp.arange(s)[:, None], jnp.maximum(row, 0), prompt.tokens
        seen = jnp.zeros((s, n, program.config.vocab_size), bool).at[place].max(own)

    key = None
    if program.method.do_sample:
        # Named: under vmap, other generators draw otherwise than one by one, and a branch's stream must be its own.
        keys = jax.vmap(partial(jax.random.key, impl="threefry2x32"))(controls.seed)
        key = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, prompt.stream)

    state = State(
        cache=cache,
        count=jnp.int32(0),
        token=jnp.zeros((s, n), jnp.int32),
        live=jnp.zeros((s, n), bool),
        done=prompt.limit == 0,
        key=key,
        seen=seen,
        **{name: getattr(prompt, name) for name in ("branch", "first", "forced", "forced_count", "limit")},
    )
    ends = jnp.take_along_axis(hidden, prompt.last[..., None], axis=1)  # [S, n, D]
    return state, _logits(weights, ends)


def start(weights: Params, program: Program, controls: Controls, prompt: Prompt, room: int) -> tuple[State, Array]:
    """Run the rows once, into a cache with room for `room` columns; the logits [S, n, V] at their last tokens."""
    t, n = prompt.tokens.shape[1], prompt.last.shape[1]
    hidden, kept = encode(weights, program, prompt.tokens, prompt.coordinates)
    layers = jax.tree.map(lambda array: _over_heads(_grow(_heads_first(array), t + n * room, 1)), kept)
    coordinates = jax.tree.map(lambda array: _grow(array, t + n * room, 1), prompt.coordinates)
    return begin(weights, program, controls, prompt, hidden, Cache(layers, coordinates, jnp.int32(t), jnp.int32(n)))


def go_on(weights: Params, program: Program, controls: Controls, prompt: Prompt, cache: Cache) -> tuple[State, Array]:
    """As `start`, behind what a cache holds in the slots before its first free one; the others are forgotten. The
    prompt is read in pieces of PIECE tokens, and its PAD takes no slots."""
    (s, t), where = prompt.tokens.shape, prompt.coordinates
    size = min(t, PIECE)
    old = cache.coordinates
    old = dataclasses.replace(old, valid=old.valid & (jnp.arange(cache.size) < cache.slot))

    def piece(cache: Cache, part: tuple[Array, Coordinates]) -> tuple[Cache, Array]:
        cache, hidden = read(weights, program, *part, cache)
        return dataclasses.replace(cache, slot=cache.slot + size), hidden

    parts = jax.tree.map(lambda x: x.reshape(s, -1, size).swapaxes(0, 1), (prompt.tokens, where))
    after, hidden = jax.lax.scan(piece, dataclasses.replace(cache, coordinates=old), parts)
    after = dataclasses.replace(after, slot=cache.slot + jnp.max(jnp.sum(where.valid, axis=1)))
    return begin(weights, program, controls, prompt, hidden.swapaxes(0, 1).reshape(s, t, -1), after)


def first_tokens(
    program: Program, controls: Controls, prompt: Prompt, begun: tuple[State, Array]
) -> tuple[State, Array]:
    """The first token of every branch, from its logits; BROKEN where they are not finite."""
    state, token = choose(program, controls, *begun)
    return state, jnp.where(jnp.isfinite(begun[1]).all(-1) | (prompt.limit == 0), token, BROKEN)


@partial(jax.jit, static_argnames=("program", "room"))
def prefill(weights: Params, controls: Controls, prompt: Prompt, *, program: Program, room: int) -> tuple[State, Array]:
    """`start`, and the first token of every branch."""
    return first_tokens(program, controls, prompt, start(weights, program, controls, prompt, room))


@partial(jax.jit, static_argnames=("program",), donate_argnames=("cache",))
def extend(
    weights: Params, controls: Controls, prompt: Prompt, cache: Cache, *, program: Program
) -> tuple[State, Array]:
    """`go_on`, and the first token of every branch. The cache is donated and returned in the state."""
    return first_tokens(program, controls, prompt, go_on(weights, program, controls, prompt, cache))


@partial(jax.jit, static_argnames=("program",), donate_argnames=("state",))
def decode_block(
    weights: Params, controls: Controls, state: State, ended: Array, until: Array, *, program: Program
) -> tuple[State, Array]:
    """Columns until `until` of them are chosen or every branch is done: the state, and int32 [BLOCK, S, n].

    `ended` [S, n] are the branches for which the host wants no more. The state is donated and returned: the cache stays
    in place.
    """
    before = state.count

    def going(carry: tuple[State, Array]) -> Array:
        return (carry[0].count < until) & ~jnp.all(carry[0].done)

    def column(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, out = carry
        index = state.count - before
        state, scores = feed(weights, program, state)
        state, token = choose(program, controls, state, scores)
        return state, out.at[index].set(token)

    out = jnp.full((BLOCK, *state.token.shape), -1, jnp.int32)
    return jax.lax.while_loop(going, column, (dataclasses.replace(state, done=state.done | ended), out))


def enlarge(cache: Cache, slots: int) -> Cache:
    """A cache of `slots` slots, of which the old one is left empty. Layer by layer: they never exist together."""
    layers = cache.layers
    for i, (k, v) in enumerate(layers):
        layers[i] = _grow(k, slots, 1), _grow(v, slots, 1)
    # The coordinates on the host: so small that another program is not worth it.
    old = cache.coordinates
    coordinates = jax.tree.map(lambda x: jax.device_put(np.pad(x, ((0, 0), (0, slots - x.shape[1])))), old)
    return dataclasses.replace(cache, coordinates=coordinates)


@partial(jax.jit, static_argnames=("program",))
def row_logits(weights: Params, tokens: Array, coordinates: Coordinates, *, program: Program) -> Array:
    """float32 [S, T, V]: every token's logits in one forward."""
    return _logits(weights, encode(weights, program, tokens, coordinates)[0])


@partial(jax.jit, static_argnames=("program",))
def row_attention(weights: Params, tokens: Array, coordinates: Coordinates, *, program: Program) -> Array:
    """`sight.attention_mass` of the weights of decoding."""
    attend, seen = watching(coordinates, program.visibility)
    encode(weights, program, tokens, coordinates, attend)
    return jnp.stack(seen, axis=1)


def cache_bytes(config: ModelConfig, *, samples: int, tokens: int, branches: int, columns: int, dtype: Any) -> int:
    """Bytes of the k and v of `samples` rows of `tokens` prefilled tokens and `columns` columns of `branches`."""
    slots = samples * (tokens + branches * columns)
    per_slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return slots * per_slot * jnp.dtype(dtype).itemsize
