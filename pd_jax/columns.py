"""The column mask and the interleaved 2D RoPE: pure functions of coordinates, for training, prefill and decoding.

News takes two columns. The token in column c is chosen from the logits of its own branch's token in column c-1, and
that token sees its siblings up to column c-2. So what a sibling says in column c can first change a word in column c+2,
and the first answer token sees the siblings' prompts but for what stands in the last prompt column.

Without branch pairs, branches with the same prompt are one branch: exchanging them exchanges their outputs, whatever
the visibility and the bias, so they say the same. "prompts" can use what siblings were asked, never what they answer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from pd_jax.config import MIX, VISIBILITIES, ModelConfig, RowVisibility, check_choice


@struct.dataclass
class Coordinates:
    """Where tokens stand; all of one shape [..., T]."""

    branch: Array  # int32; 0 is the trunk: the background and what joins say
    column: Array  # int32
    segment: Array  # int32, the sample's number in its row; -1 for PAD
    valid: Array  # bool; False for PAD
    prompt: Array  # bool; part of a prompt, a branch's or a join's
    visibility: Array | None = None  # int32, the place of each sample's own in `config.VISIBILITIES`; for "mix" only

    @classmethod
    def of(cls, layout: Any, visibility: RowVisibility = "columns") -> "Coordinates":
        """The coordinates of a `Layout`, or of anything that has its arrays by key, for rows of `visibility`."""
        names = ["branch", "column", "segment", "valid", "prompt"] + ["visibility"] * (visibility == MIX)
        return cls(**{name: layout[name] for name in names})


def column_mask(
    query: Coordinates, key: Coordinates, visibility: RowVisibility = "columns", query_index: Array | None = None
) -> Array:
    """Who sees whom: bool [..., T, S], True where query i may look at key j.

        allowed(i, j) = i == j  or  segment_i == segment_j and valid_i and valid_j
                                    and column_j < column_i and visible(i, j)
        visible: "columns"  always
                 "isolated" branch_j is 0 (the trunk) or branch_i, or branch_i is 0: the trunk sees everybody
                 "prompts"  as isolated, or j is a prompt token
                 "mix"      as the sample's own visibility says, which its coordinates carry

    `query_index` [..., T] is the place of each query among the keys (default: 0..T-1, queries are the keys). PAD sees
    itself only and is seen by nobody. The worked example of `pd_jax.layout`, a background of 8 tokens and prompts of 4,
    3 and 2, "columns":

               B0 .. B7          Q1[0] .. Q1[3]         column
        B0     1 . . . . . . .   . . . . . . . . .      0
        B1     1 1 . . . . . .   . . . . . . . . .      1
        B2     1 1 1 . . . . .   . . . . . . . . .      2
        B3     1 1 1 1 . . . .   . . . . . . . . .      3
        B4     1 1 1 1 1 . . .   . . . . . . . . .      4
        B5     1 1 1 1 1 1 . .   . . . . . . . . .      5
        B6     1 1 1 1 1 1 1 .   . . . . . . . . .      6
        B7     1 1 1 1 1 1 1 1   . . . . . . . . .      7
        Q1[0]  1 1 1 1 1 1 1 1   1 . . . . . . . .      8
        Q2[0]  1 1 1 1 1 1 1 1   . 1 . . . . . . .      8
        Q3[0]  1 1 1 1 1 1 1 1   . . 1 . . . . . .      8
        Q1[1]  1 1 1 1 1 1 1 1   1 1 1 1 . . . . .      9
        Q2[1]  1 1 1 1 1 1 1 1   1 1 1 . 1 . . . .      9
        Q3[1]  1 1 1 1 1 1 1 1   1 1 1 . . 1 . . .      9
        Q1[2]  1 1 1 1 1 1 1 1   1 1 1 1 1 1 1 . .      10
        Q2[2]  1 1 1 1 1 1 1 1   1 1 1 1 1 1 . 1 .      10
        Q1[3]  1 1 1 1 1 1 1 1   1 1 1 1 1 1 1 1 1      11

    And "isolated" for a fork, a join and a fork over a background of two: branches 1 and 2, whose prompts of two and
    one are answered with two and one; the trunk, asked J and saying S; branch 3. It sees what the trunk has made of its
    siblings, and not themselves:

               B0 B1   Q1 Q2 Q1 A1 A2 A1   J  S   Q3 A3      column
        B0     1  .    .  .  .  .  .  .    .  .   .  .       0
        B1     1  1    .  .  .  .  .  .    .  .   .  .       1
        Q1[0]  1  1    1  .  .  .  .  .    .  .   .  .       2
        Q2[0]  1  1    .  1  .  .  .  .    .  .   .  .       2
        Q1[1]  1  1    1  .  1  .  .  .    .  .   .  .       3
        A1[0]  1  1    1  .  1  1  .  .    .  .   .  .       4
        A2[0]  1  1    .  1  .  .  1  .    .  .   .  .       4
        A1[1]  1  1    1  .  1  1  .  1    .  .   .  .       5
        J      1  1    1  1  1  1  1  1    1  .   .  .       6
        S      1  1    1  1  1  1  1  1    1  1   .  .       7
        Q3[0]  1  1    .  .  .  .  .  .    1  1   1  .       8
        A3[0]  1  1    .  .  .  .  .  .    1  1   1  1       9
    """
    check_choice("visibility", visibility, RowVisibility)

    def q(array: Array) -> Array:
        return array[..., :, None]

    def k(array: Array) -> Array:
        return array[..., None, :]

    seen = (q(query.segment) == k(key.segment)) & (q(query.valid) & k(key.valid)) & (k(key.column) < q(query.column))
    own = (k(key.branch) == 0) | (q(query.branch) == 0) | (k(key.branch) == q(query.branch))
    if visibility == MIX:
        assert query.visibility is not None  # `Coordinates.of(layout, "mix")` has it
        columns, prompts = (q(query.visibility) == VISIBILITIES.index(name) for name in ("columns", "prompts"))
        seen &= own | columns | (prompts & k(key.prompt))
    elif visibility != "columns":
        seen &= own | k(key.prompt) if visibility == "prompts" else own
    size = key.column.shape[-1]
    place = jnp.arange(query.column.shape[-1]) if query_index is None else query_index
    return seen | (q(place) == jnp.arange(size))


def sibling_mask(query: Coordinates, key: Coordinates) -> Array:
    """bool [..., T, S]: key j and query i belong to different branches, neither of them the trunk."""
    own, other = query.branch[..., :, None], key.branch[..., None, :]
    return (own != 0) & (other != 0) & (other != own)


def prefix_ends(coordinates: Coordinates) -> tuple[Array, Array]:
    """Visibility "columns" as ranges: query i sees the keys [0, ends_i) of its own sample, and itself.

    ends int32 [..., T] (0 for PAD), and bool [...]: whether the row's tokens stand in column-major order, samples one
    after the other, as `pd_jax.layout` lays them out. Without that order there is no such range.
    """
    valid = coordinates.valid
    index = jnp.broadcast_to(jnp.arange(valid.shape[-1], dtype=jnp.int32), valid.shape)
    last = jax.lax.cummax(jnp.where(valid, index, -1), axis=valid.ndim - 1)
    before = jnp.concatenate([jnp.full_like(last[..., :1], -1), last[..., :-1]], axis=-1)  # the valid token before

    def step(array: Array) -> Array:
        return array - jnp.take_along_axis(array, jnp.maximum(before, 0), axis=-1)

    first = before < 0
    sample, column = step(coordinates.segment), step(coordinates.column)
    ordered = ~valid | first | (sample > 0) | ((sample == 0) & (column >= 0))
    new_column = valid & (first | (sample != 0) | (column != 0))
    ends = jax.lax.cummax(jnp.where(new_column, index, 0), axis=valid.ndim - 1)
    return jnp.where(valid, ends, 0), jnp.all(ordered, axis=-1)


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """RoPE's inv_freq, float32 [head_dim/2] (radians a column), and the factor on cos and sin (1 without YaRN).

    Source: `_compute_yarn_parameters` and `_compute_llama3_parameters` of `transformers.modeling_rope_utils`, and
    Qwen3RotaryEmbedding.
    """
    dim, theta = config.head_dim, config.rope_theta
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequency = (theta ** exponent.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / frequency
    yarn, llama3 = config.yarn, config.llama3
    if llama3 is not None:  # waves that fit into the original length stay, the longest are stretched, between a ramp
        low, span = llama3.low_freq_factor, llama3.high_freq_factor - llama3.low_freq_factor
        turns = llama3.original_max_position_embeddings / (2 * np.float32(math.pi) / plain)
        keep = np.clip((turns - np.float32(low)) / np.float32(span), 0, 1).astype(np.float32)
        return (1 - keep) * plain / np.float32(llama3.factor) + keep * plain, 1.0
    if yarn is None:
        return plain, 1.0

    def correction(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(yarn.beta_fast), correction(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    keep = np.float32(1) - np.clip(ramp, 0, 1).astype(np.float32)
    stretched = np.float32(1) / (np.float32(yarn.factor) * frequency)
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return (stretched * (1 - keep) + plain * keep).astype(np.float32), scale


def rope_tables(config: ModelConfig, branch: Array, column: Array) -> tuple[Array, Array]:
    """cos and sin of the interleaved 2D RoPE, float32 [..., head_dim/2], from int32 coordinates [...].

    The 1st, 3rd, 5th... entry of `config.pair_indices` (1-based frequency indices) turns with `branch_stride * branch`;
    every other pair turns with the column. `()` is exactly transformers' RoPE with position_ids = column.
    """
    inv_freq, scale = inverse_frequencies(config)
    turns_with_branch = np.zeros(config.head_dim // 2, bool)
    turns_with_branch[[p - 1 for p in config.pair_indices[::2]]] = True
    # float32: in bfloat16 a column above 256 has no exact value, and the angle would be off by radians.
    x = config.branch_stride * branch.astype(jnp.float32)[..., None]
    y = column.astype(jnp.float32)[..., None]
    angle = jnp.where(turns_with_branch, x, y) * inv_freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn [..., T, heads, head_dim] by tables [..., T, head_dim/2]: pair p is dimensions p and p + head_dim/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
