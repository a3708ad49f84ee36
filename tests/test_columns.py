import dataclasses
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import SMALL, STORY, WORKED, aligns, samples, stories
from hypothesis import given, settings

from pd_jax.columns import Coordinates, column_mask, rope_tables, rotate, sibling_mask
from pd_jax.config import VISIBILITIES, ModelConfig
from pd_jax.layout import build_layout

CONFIG = ModelConfig(100, 32, 64, 2, 4, 2, 16, rope_theta=1e4, pair_indices=(2, 4, 6))

LITERAL = {  # of SMALL and one PAD
    "columns": """
        1 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0
        1 1 1 1 1 0 0 0 0
        1 1 1 1 1 1 0 0 0
        1 1 1 1 1 0 1 0 0
        1 1 1 1 1 1 1 1 0
        0 0 0 0 0 0 0 0 1""",
    "isolated": """
        1 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0
        1 1 1 0 1 0 0 0 0
        1 1 1 0 1 1 0 0 0
        1 1 0 1 0 0 1 0 0
        1 1 1 0 1 1 0 1 0
        0 0 0 0 0 0 0 0 1""",
    "prompts": """
        1 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0
        1 1 1 1 1 0 0 0 0
        1 1 1 1 1 1 0 0 0
        1 1 1 1 1 0 1 0 0
        1 1 1 1 1 1 0 1 0
        0 0 0 0 0 0 0 0 1""",
}


def mask_of(rows, visibility="columns", **options):
    coordinates = Coordinates.of(build_layout(rows, **options))
    return np.asarray(column_mask(coordinates, coordinates, visibility))


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_literal_masks(visibility):
    literal = np.array([line.split() for line in LITERAL[visibility].strip().splitlines()], int)
    np.testing.assert_array_equal(mask_of([[SMALL]], visibility, length=9)[0], literal)


WORKED_MASK = """
    10000000000000000
    11000000000000000
    11100000000000000
    11110000000000000
    11111000000000000
    11111100000000000
    11111110000000000
    11111111000000000
    11111111100000000
    11111111010000000
    11111111001000000
    11111111111100000
    11111111111010000
    11111111111001000
    11111111111111100
    11111111111111010
    11111111111111111
"""  # 8 tokens of background; then by columns Q1 Q2 Q3, Q1 Q2 Q3, Q1 Q2, Q1


def test_the_mask_of_the_worked_example():
    literal = np.array([list(line.strip()) for line in WORKED_MASK.strip().splitlines()], int)
    np.testing.assert_array_equal(mask_of([[WORKED]])[0], literal)


FORK_JOIN_FORK = {  # of STORY: B0 B1, Q1 Q2, Q1, A1 A2, A1, J, S, Q3, A3
    "columns": """
        1 0 0 0 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0 0 0 0
        1 1 1 1 1 0 0 0 0 0 0 0
        1 1 1 1 1 1 0 0 0 0 0 0
        1 1 1 1 1 0 1 0 0 0 0 0
        1 1 1 1 1 1 1 1 0 0 0 0
        1 1 1 1 1 1 1 1 1 0 0 0
        1 1 1 1 1 1 1 1 1 1 0 0
        1 1 1 1 1 1 1 1 1 1 1 0
        1 1 1 1 1 1 1 1 1 1 1 1""",
    "isolated": """
        1 0 0 0 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0 0 0 0
        1 1 1 0 1 0 0 0 0 0 0 0
        1 1 1 0 1 1 0 0 0 0 0 0
        1 1 0 1 0 0 1 0 0 0 0 0
        1 1 1 0 1 1 0 1 0 0 0 0
        1 1 1 1 1 1 1 1 1 0 0 0
        1 1 1 1 1 1 1 1 1 1 0 0
        1 1 0 0 0 0 0 0 1 1 1 0
        1 1 0 0 0 0 0 0 1 1 1 1""",
    "prompts": """
        1 0 0 0 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0 0 0 0
        1 1 0 1 0 0 0 0 0 0 0 0
        1 1 1 1 1 0 0 0 0 0 0 0
        1 1 1 1 1 1 0 0 0 0 0 0
        1 1 1 1 1 0 1 0 0 0 0 0
        1 1 1 1 1 1 0 1 0 0 0 0
        1 1 1 1 1 1 1 1 1 0 0 0
        1 1 1 1 1 1 1 1 1 1 0 0
        1 1 1 1 1 0 0 0 1 1 1 0
        1 1 1 1 1 0 0 0 1 1 1 1""",
}


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_the_masks_of_a_fork_a_join_and_a_fork(visibility):
    literal = np.array([line.split() for line in FORK_JOIN_FORK[visibility].strip().splitlines()], int)
    np.testing.assert_array_equal(mask_of([[STORY]], visibility)[0], literal)
    mixed = Coordinates.of(build_layout([[replace(STORY, visibility=visibility)]]), "mix")
    np.testing.assert_array_equal(column_mask(mixed, mixed, "mix")[0], literal)


def test_the_docstring_draws_the_isolated_mask():
    """The pictures in the docstring of `column_mask` are the literal masks."""
    drawn = [
        line.split() for line in (column_mask.__doc__ or "").splitlines() if line.split()[-1:] != [] and "." in line
    ]
    rows = [
        [cell for cell in line[1:-1] if cell in "1."] for line in drawn if line[0][0] in "BQAJS" and line[-1].isdigit()
    ]
    pictures = {n: [[int(cell == "1") for cell in row] for row in rows if len(row) == n] for n in (17, 12)}
    np.testing.assert_array_equal(
        pictures[17], [list(map(int, line)) for line in WORKED_MASK.split()[: len(pictures[17])]]
    )
    literal = [[int(x) for x in line.split()] for line in FORK_JOIN_FORK["isolated"].strip().splitlines()]
    np.testing.assert_array_equal(pictures[12], [row for row in literal if 0 in row])


@given(stories, aligns)
@settings(max_examples=15, deadline=None)
def test_the_trunk_sees_everybody_and_is_seen_by_everybody(story, align):
    layout = build_layout([[story]], length=192, align=align)
    branch, column, valid = layout.branch[0], layout.column[0], layout.valid[0]
    earlier = (column[None] < column[:, None]) & valid[None] & valid[:, None]
    trunk = ((branch == 0)[None] | (branch == 0)[:, None]) & valid[None] & valid[:, None]
    siblings = np.asarray(sibling_mask(*[Coordinates.of(layout)] * 2))[0]
    assert not siblings[trunk].any()
    for visibility in VISIBILITIES:
        mask = mask_of([[story]], visibility, length=192, align=align)[0]
        np.testing.assert_array_equal((mask & ~np.eye(192, dtype=bool))[trunk], earlier[trunk])
        if visibility == "isolated":
            assert not (mask & siblings).any()


@given(samples, samples, aligns)
@settings(max_examples=15, deadline=None)
def test_any_mask_is_what_the_definition_says(first, second, align):
    """Token by token, in Python, for two samples packed into one padded row."""
    layout = build_layout([[first, second]], length=112, align=align)
    for visibility in VISIBILITIES:
        mask = mask_of([[first, second]], visibility, length=112, align=align)[0]
        size = len(first) + len(second) + 2  # the rest is PAD like these two
        for i, j in np.ndindex(size, size):
            at = {name: (layout[name][0, i], layout[name][0, j]) for name in ("segment", "branch", "column", "valid")}
            own = at["branch"][1] in (0, at["branch"][0])
            visible = visibility == "columns" or own or (visibility == "prompts" and layout.prompt[0, j])
            seen = at["segment"][0] == at["segment"][1] and at["column"][1] < at["column"][0] and visible
            assert mask[i, j] == (i == j or bool(seen and all(at["valid"])))


def test_a_mix_gives_every_sample_its_own_visibility():
    """Packed into one row, in every order: inside a sample the mask is that of its visibility, between them nothing."""
    for kinds in itertools.permutations(VISIBILITIES):
        row = [replace(SMALL, visibility=visibility) for visibility in kinds]
        layout = build_layout([row], length=3 * 8 + 1)
        at = Coordinates.of(layout, "mix")
        mask = np.asarray(column_mask(at, at, "mix"))[0]
        expected = np.zeros((25, 25), bool)
        for place, visibility in enumerate(kinds):
            part = slice(8 * place, 8 * place + 8)
            expected[part, part] = mask_of([[SMALL]], visibility)[0]
        expected[24, 24] = True  # PAD
        np.testing.assert_array_equal(mask, expected)


def test_a_query_among_cached_keys_finds_itself():
    """Decoding asks for one column of queries against all keys: the same rows of the same mask."""
    coordinates = Coordinates.of(build_layout([[SMALL]], length=9))
    own = jnp.array([5, 6])
    query = jax.tree.map(lambda x: x[:, own], coordinates)
    for visibility in VISIBILITIES:
        whole = column_mask(coordinates, coordinates, visibility)
        np.testing.assert_array_equal(column_mask(query, coordinates, visibility, own[None]), whole[:, own])


def test_sibling_mask():
    coordinates = Coordinates.of(build_layout([[SMALL]]))
    branch = np.array([0, 0, 1, 2, 1, 1, 2, 1])
    siblings = (branch[None] != branch[:, None]) & (branch[None] != 0) & (branch[:, None] != 0)
    np.testing.assert_array_equal(sibling_mask(coordinates, coordinates)[0], siblings)


def test_unknown_visibility():
    with pytest.raises(ValueError, match="visibility 'all' is not one of columns, isolated, prompts"):
        mask_of([[SMALL]], "all")


# ---------------------------------------------------------------- RoPE


def turned(config, vector, branch, column):
    """The reference: every pair turned by its own 2x2 matrix, in float64."""
    half = config.head_dim // 2
    out = np.array(vector, np.float64)
    for p in range(half):
        frequency = config.rope_theta ** (-2 * p / config.head_dim)
        listed = config.pair_indices.index(p + 1) if p + 1 in config.pair_indices else None
        with_branch = listed is not None and listed % 2 == 0
        angle = frequency * (config.branch_stride * branch if with_branch else column)
        a, b = vector[p], vector[p + half]
        out[p], out[p + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("pairs", [(), (1,), (2, 4, 6), (6, 4, 2), (8, 3)])
@pytest.mark.parametrize("stride", [1.0, 2.5])
def test_rope_against_float64(pairs, stride):
    config = dataclasses.replace(CONFIG, pair_indices=pairs, branch_stride=stride)
    vector = np.random.default_rng(0).normal(size=config.head_dim)
    for branch, column in ((0, 0), (0, 7), (3, 0), (5, 31)):
        cos, sin = rope_tables(config, jnp.array([branch]), jnp.array([column]))
        ours = rotate(jnp.asarray(vector, jnp.float32)[None, None], cos, sin)[0, 0]
        np.testing.assert_allclose(ours, turned(config, vector, branch, column), atol=2e-6)


def test_listed_order_decides_which_pairs_turn_with_the_branch():
    cos = {p: rope_tables(dataclasses.replace(CONFIG, pair_indices=p), jnp.array([3]), jnp.array([0]))[0] for p in
           ((2, 4, 6), (4, 2, 6))}  # fmt: skip
    np.testing.assert_array_equal(np.flatnonzero(cos[2, 4, 6][0] != 1) + 1, [2, 6])
    np.testing.assert_array_equal(np.flatnonzero(cos[4, 2, 6][0] != 1) + 1, [4, 6])


@pytest.mark.parametrize(("pairs", "message"), [((0,), r"\[0\] outside 1..8"), ((2, 9), r"\[9\] outside 1..8"),
                                                ((3, 3), "names a pair twice")])  # fmt: skip
def test_pairs_that_cannot_be(pairs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, pair_indices=pairs)
