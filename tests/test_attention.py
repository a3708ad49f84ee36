"""Every backend that runs on a CPU against `dense`, and `dense` against the formula: forward and all gradients."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from pd_jax.attention import Call, chunked, make_attention, splash
from pd_jax.attention.select import _announce, per_device, refusal
from pd_jax.columns import Coordinates, column_mask, prefix_ends, sibling_mask
from pd_jax.config import VISIBILITIES
from pd_jax.layout import Branch, TokenSample, build_layout

TOLERANCE = 2e-5


def sample(background, prompts, answers=None, start=1):
    """A sample whose tokens are numbers; only its shape matters."""
    answers = [0] * len(prompts) if answers is None else answers
    pairs = zip(prompts, answers, strict=True)
    return TokenSample([start] * background, [Branch([start] * p, [start] * a) for p, a in pairs])


def coordinates(*rows, length=None, align="left"):
    return Coordinates.of(build_layout(rows, length, align))


PACKED = [sample(5, [3, 2], [4, 2]), sample(0, [7, 7, 1]), sample(20, [4], [9])]
# One row of every kind, all of 128 tokens, so that a backend compiles once for all of them.
ROWS = {
    "worked example": coordinates([sample(8, [4, 3, 2])], length=128),
    "grid": coordinates([sample(0, [8] * 16)]),
    "first column": coordinates([sample(0, [1] * 40)], length=128),
    "one branch": coordinates([sample(30, [10], [88])], length=128),
    "packed": coordinates(PACKED, length=128),
    "packed the other way": coordinates(PACKED[::-1], length=128),
    "right": coordinates([sample(6, [9, 2, 5], [3, 8, 1])], length=128, align="right"),
    "fork, join, fork": coordinates(
        [replace(sample(6, [9, 2], [3, 8]), later=[Branch([1] * 4, [1] * 5), sample(0, [3, 6], [20, 9]).branches])],
        length=128,
    ),
    "ragged": coordinates([sample(6, [9, 2, 5], [3, 8, 1])], length=128, align="ragged"),
}
ALL = jax.tree.map(lambda *rows: jnp.concatenate(rows), *ROWS.values())


def inputs(c, heads=4, kv_heads=2, head_dim=16, seed=0):
    """q, k, v and the output's cotangent."""
    b, t = c.column.shape
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jax.random.normal(key, (b, t, n, head_dim)) for key, n in zip(keys, counts, strict=True)]


def attention(backend, c, visibility="columns", tile=16):
    """A backend with the knobs that make small inputs cross its tiles, and the kernel interpreted."""
    if backend == "chunked":
        return partial(chunked.chunked_attention, tiles=chunked.make_mask(c, tile), visibility=visibility)
    if backend == "splash":
        return partial(splash.splash_attention, mask=splash.make_mask(c), interpret=True)
    return make_attention(c, visibility, backend)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(backend, visibility, tile, c, cotangent, q, k, v, bias=None):
    """Output and the gradients of q, k, v (and the bias); the coordinates are traced, as in training."""
    extra = {} if bias is None else {"sibling_bias": bias}

    def attend(q, k, v, extra):
        return attention(backend, c, visibility, tile)(q, k, v, **extra)

    out, pullback = jax.vjp(attend, q, k, v, extra)
    *grads, d_extra = pullback(cotangent)
    return out, *grads, *d_extra.values()


def assert_equal(backend, c, q, k, v, cotangent, visibility="columns", bias=None, tile=16):
    """`backend` against dense, for the output and every gradient."""
    got = run(backend, visibility, tile, c, cotangent, q, k, v, bias)
    expected = run("dense", visibility, tile, c, cotangent, q, k, v, bias)
    assert len(got) == len(expected) == (4 if bias is None else 5)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dbias"), got, expected, strict=False):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_dense_is_the_formula(visibility):
    c = ROWS["packed"]
    q, k, v, _ = map(np.asarray, inputs(c))
    bias = np.array([-1.0, 0.5, 2.0, -8.0], np.float32)
    mask, siblings = np.asarray(column_mask(c, c, visibility)), np.asarray(sibling_mask(c, c))
    expected = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[b, i])
        scores = k[b, keys, n // 2] @ q[b, i, n] / 4
        weights = np.exp(scores + bias[n] * siblings[b, i, keys])
        expected[b, i, n] = weights / weights.sum() @ v[b, keys, n // 2]
    got = make_attention(c, visibility, "dense")(q, k, v, jnp.array(bias))
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_chunked_equals_dense(visibility):
    assert_equal("chunked", ALL, *inputs(ALL), visibility)


def test_chunked_equals_dense_for_a_mix():
    """Every row of another visibility; each sample of a packed row too."""
    kind = jnp.arange(ALL.column.shape[0])[:, None] + ALL.segment
    mixed = replace(ALL, visibility=jnp.asarray(kind % 3, jnp.int32))
    assert_equal("chunked", mixed, *inputs(ALL), "mix", bias=jnp.array([-8.0, -1.0, 0.0, 1.5]))


@pytest.mark.parametrize("visibility", ["columns", pytest.param("prompts", marks=pytest.mark.slow)])
def test_chunked_sibling_bias_has_exact_gradients(visibility):
    assert_equal("chunked", ALL, *inputs(ALL), visibility, bias=jnp.array([-8.0, -1.0, 0.0, 1.5]))


def test_splash_equals_dense():
    assert_equal("splash", ALL, *inputs(ALL))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_bias_of_minus_infinity_is_isolated_and_zero_is_columns(backend):
    q, k, v, cotangent = inputs(ALL)
    for value, visibility in ((-jnp.inf, "isolated"), (0.0, "columns")):
        got = run(backend, "columns", 16, ALL, cotangent, q, k, v, jnp.full(4, value))
        expected = run("dense", visibility, 16, ALL, cotangent, q, k, v)
        for a, b in zip(got, expected, strict=False):  # without the bias' own gradient
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["chunked", "splash"])
@pytest.mark.parametrize("kv_heads", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_grouped_heads(backend, kv_heads):
    """Four query heads; two kv heads are everywhere else."""
    assert_equal(backend, ROWS["packed"], *inputs(ROWS["packed"], 4, kv_heads))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_several_blocks_and_packed_samples(backend):
    """1,280 tokens are five blocks of 256; the samples end inside blocks, and most pairs of blocks see nothing."""
    rows = [sample(100, [40, 30, 20], [50, 60, 70]), sample(0, [25] * 16), sample(300, [10] * 7, [5] * 7)]
    c = coordinates(rows, rows[::-1], length=1280)
    assert splash.block_size(1280) == 256
    assert_equal(backend, c, *inputs(c, 2, 1, 8), tile=128)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_grid_of_16_branches_and_256_columns(backend):
    c = coordinates([sample(0, [256] * 16)])
    assert_equal(backend, c, *inputs(c, 2, 1, 8), tile=128)


def test_one_branch_is_causal_attention():
    c = jax.tree.map(lambda x: jnp.repeat(x, 8, axis=0), ROWS["one branch"])
    q, k, v, cotangent = inputs(c)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    got = run("chunked", "columns", 16, c, cotangent, q, k, v)[0]
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def with_holes(c, share=0.3):
    """Some tokens made invalid, in the middle of their samples."""
    hole = jax.random.bernoulli(jax.random.key(1), share, c.valid.shape)
    return replace(c, valid=c.valid & ~hole)


@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_invalid_tokens(backend):
    assert_equal(backend, with_holes(ALL), *inputs(ALL))


@st.composite
def samples(draw):
    prompts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    answers = draw(st.lists(st.integers(0, 4), min_size=len(prompts), max_size=len(prompts)))
    return sample(draw(st.integers(0, 12)), prompts, answers)  # at most 60 tokens


few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Every example has the shape of ALL, so that nothing compiles again.
@few
@given(drawn=st.lists(samples(), min_size=8, max_size=8), align=st.sampled_from(["left", "right", "ragged"]))
def test_random_ragged_columns(drawn, align):
    c = coordinates(*([one, other] for one, other in zip(drawn, drawn[::-1], strict=True)), length=128, align=align)
    for visibility in VISIBILITIES:
        assert_equal("chunked", c, *inputs(c), visibility)
    assert_equal("splash", c, *inputs(c))


@few
@given(seed=st.integers(0, 2**30))
def test_chunked_takes_tokens_in_any_order(seed):
    """Coordinates that no layout would give: unsorted, samples interleaved, holes."""
    draw = partial(np.random.default_rng(seed).integers, size=ALL.column.shape)
    numbers = [jnp.asarray(draw(high), jnp.int32) for high in (4, 12, 3)]
    c = Coordinates(*numbers, *(jnp.asarray(draw(2), bool) for _ in range(2)))
    for visibility in VISIBILITIES:
        assert_equal("chunked", c, *inputs(c), visibility)


@pytest.mark.parametrize("holes", [False, True])
def test_ranges_are_the_mask(holes):
    c = with_holes(ALL) if holes else ALL
    ends, ordered = prefix_ends(c)
    index = jnp.arange(128)
    pairs = (c.segment[:, None, :] == c.segment[:, :, None]) & c.valid[:, None, :] & c.valid[:, :, None]
    ranges = (index < ends[..., None]) & pairs
    np.testing.assert_array_equal(ranges | jnp.eye(128, dtype=bool), column_mask(c, c))
    assert bool(ordered.all())


def test_splash_gives_nan_for_a_row_out_of_order():
    swapped = jnp.arange(128).at[jnp.array([3, 5])].set(jnp.array([5, 3]))
    c = jax.tree.map(lambda x: x.at[0].set(x[0, swapped]), ALL)  # the worked example's background
    q, k, v, cotangent = inputs(c)
    out = run("splash", "columns", 16, c, cotangent, q, k, v)[0]
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


def test_tiles_that_nobody_may_see_are_skipped():
    """Three packed samples: the last one's tiles start at its own first tile, PAD's tiles see themselves only."""
    c = coordinates([sample(64, [64]), sample(64, [64]), sample(32, [32])], length=512)
    mask = chunked.make_mask(c, 64)
    np.testing.assert_array_equal(mask.first, [0, 0, 2, 2, 4, 5, 6, 7])
    np.testing.assert_array_equal(mask.last, [1, 2, 3, 4, 5, 6, 7, 8])


def test_chunked_holds_no_square_array():
    c = coordinates([sample(0, [128] * 16)])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(c)]

    def size(backend):
        q, k, v, cotangent = shapes
        lowered = run.lower(backend, "columns", 128, c, cotangent, q, k, v)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert size("chunked") < size("dense") / 10


CALL = {"device_kind": "", "visibility": "columns", "tokens": 4096, "head_dim": 128, "sibling_bias": False}
CALL["dtype"] = jnp.bfloat16
H100 = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("splash", {"platform": "tpu"}, None),
        ("splash", {"platform": "cpu"}, "needs a TPU, this is cpu"),
        ("splash", {"platform": "tpu", "visibility": "isolated"}, "'isolated'"),
        ("splash", {"platform": "tpu", "sibling_bias": True}, "sibling_bias"),
        ("splash", {"platform": "tpu", "tokens": 4100}, "4100 tokens"),
        ("cudnn", H100, None),
        ("cudnn", H100 | {"dtype": jnp.float32}, "float32"),
        ("cudnn", H100 | {"sibling_bias": True}, "sibling_bias"),
        ("cudnn", H100 | {"head_dim": 256}, "head_dim 256"),
        ("tokamax", H100 | {"device_kind": "NVIDIA A100-SXM4-80GB"}, "A100"),
        ("tokamax", {"platform": "cpu"}, "needs a GPU, this is cpu"),
        ("chunked", {"platform": "cpu", "visibility": "prompts", "sibling_bias": True}, None),
    ],
)
def test_refusals_name_the_reason(backend, changes, reason):
    got = refusal(backend, Call(**(CALL | changes)))
    assert got is None if reason is None else reason in got


def test_a_forced_backend_that_cannot_run_is_an_error():
    c = ROWS["grid"]
    q, k, v, _ = inputs(c)
    with pytest.raises(ValueError, match="'splash' cannot run here: it needs a TPU, this is cpu"):
        make_attention(c, backend="splash")(q, k, v)
    with pytest.raises(ValueError, match="'flash' is not one of auto, dense"):
        make_attention(c, backend="flash")


def test_auto_takes_chunked_for_long_rows_and_says_so_once(caplog):
    c = coordinates([sample(0, [160] * 16)])  # 2,560 tokens: never dense
    q, k, v, _ = inputs(c, 1, 1, 8)
    _announce.cache_clear()  # other tests have heard it
    with caplog.at_level("INFO", logger="pd_jax.attention"):
        jaxpr = jax.make_jaxpr(lambda q, k, v: make_attention(c)(make_attention(c)(q, k, v), k, v))(q, k, v)
    assert [record.message for record in caplog.records] == ["attention: chunked on cpu"]
    assert "2560,2560" not in str(jaxpr)


def test_auto_takes_chunked_for_a_sibling_bias_and_says_why(monkeypatch, caplog):
    """A TPU has splash, which refuses the bias."""
    monkeypatch.setattr("pd_jax.attention.select.compile_target", lambda: ("tpu", "TPU v5e"))
    c = coordinates([sample(0, [128] * 16)])
    q, k, v, _ = inputs(c, 2, 1, 8)
    with caplog.at_level("INFO", logger="pd_jax.attention"):
        jaxpr = jax.make_jaxpr(lambda q, k, v: make_attention(c)(q, k, v, jnp.zeros(2)))(q, k, v)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "chunked on tpu (splash: " in caplog.text
    assert "sibling_bias" in caplog.text
    assert "pallas" not in str(jaxpr)


def test_low_precision_stays_close_to_dense():
    c = ROWS["packed"]
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(c))
    got = attention("chunked", c)(q, k, v)
    assert got.dtype == jnp.bfloat16
    exact = make_attention(c, backend="dense")(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert float(jnp.max(jnp.abs(got - exact))) < 2 * math.ldexp(float(jnp.max(jnp.abs(exact))), -8)


@pytest.mark.slow
def test_kernels_run_on_their_share_of_rows_and_heads():
    """Four devices along the rows, two along the heads."""
    q, k, v, cotangent = inputs(ALL)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        kernel = partial(splash.splash_attention, interpret=True)
        arrays = jax.device_put((q, k, v, splash.make_mask(ALL)), rows)
        got = jax.jit(partial(per_device, kernel))(*arrays)
    assert got.sharding.spec == P("data", None, "tensor")
    expected = run("dense", "columns", 16, ALL, cotangent, q, k, v)[0]
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
