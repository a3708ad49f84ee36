"""The chunked loss equals the plain one: value and gradients, whatever the chunk."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from pd_jax.loss import weighted_nll
from pd_jax.mesh import ROWS, make_mesh
from pd_jax.planning.collectives import collectives

TOKENS, HIDDEN, VOCAB = (3, 37), 16, 97  # 111 tokens: no chunk below divides them


@pytest.fixture
def batch():
    """hidden states, head, targets, weights (some 0)."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*TOKENS, HIDDEN))
    head = jax.random.normal(keys[1], (VOCAB, HIDDEN))
    weights = jax.random.uniform(keys[3], TOKENS) * (jnp.arange(37) > 5)
    return hidden, head, jax.random.randint(keys[2], TOKENS, 0, VOCAB), weights


def plain_nll(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.T)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize("chunk", [8, 50, 1024])
def test_value_and_gradients_equal_the_plain_loss(batch, chunk):
    hidden, head, targets, weights = batch
    value, grads = jax.value_and_grad(weighted_nll, (0, 1, 3))(hidden, head, targets, weights, chunk)
    expected, expected_grads = jax.value_and_grad(plain_nll, (0, 1, 3))(hidden, head, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_token_of_weight_zero_counts_for_nothing(batch):
    hidden, head, targets, weights = batch
    other = jnp.where(weights == 0, (targets + 1) % VOCAB, targets)
    assert weighted_nll(hidden, head, targets, weights) == weighted_nll(hidden, head, other, weights)
    d_hidden = jax.grad(weighted_nll)(hidden, head, targets, weights)
    np.testing.assert_array_equal(d_hidden[weights == 0], 0)


def exact(hidden, head, targets, weights):
    """In float64 from all logits: the loss and its gradients to hidden and head."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    p = np.exp(hidden @ head.T)
    p /= p.sum(-1, keepdims=True)
    hit = np.eye(len(head))[np.asarray(targets)]
    d_logits = weights[..., None] * (p - hit)
    d_head = np.einsum("btv,btd->vd", d_logits, hidden)
    return -np.sum(weights * np.log((p * hit).sum(-1))), d_logits @ head, d_head


@pytest.mark.parametrize("answers", [(), (11,), (4, 25, 26), tuple(range(37))])
@pytest.mark.parametrize("chunk", [16, 1024])
def test_any_share_of_weighted_tokens_gives_the_exact_loss_and_gradients(batch, chunk, answers):
    """None, a few of the second row, some of every row, all: no chunk, a part of one, several, all."""
    hidden, head, targets, weights = batch
    hidden, head = hidden / 4, head / 4
    here = jnp.isin(jnp.arange(37), jnp.array(answers))
    weights = jnp.where(here, weights + 0.5, 0).at[:: 2 if len(answers) == 1 else 4].mul(len(answers) != 1)
    value, grads = jax.jit(jax.value_and_grad(lambda *a: weighted_nll(*a, chunk), (0, 1)))(
        hidden, head, targets, weights
    )
    for got, want in zip((value, *grads), exact(hidden, head, targets, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(weighted_nll(hidden, head, targets, weights, chunk), value, rtol=1e-6)


def test_chunks_without_a_weight_are_not_computed(batch):
    """16 weighted tokens fill two chunks of 8: what the other 95 hold is never multiplied."""
    hidden, head, targets, _ = batch
    weights = jnp.zeros(TOKENS).at[:2, 3:11].set(1)
    holes = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    got = jax.value_and_grad(weighted_nll, (0, 1))(holes, head, targets, weights, 8)
    want = jax.value_and_grad(plain_nll, (0, 1))(hidden, head, targets, weights)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_rows_stay_on_their_devices():
    """Rows over two axes of a mesh, the head over two: the head is gathered once, the hidden states never."""
    mesh = make_mesh(2, 2, 2)
    keys = jax.random.split(jax.random.key(0), 4)
    weights = jnp.where(jnp.arange(64) % 16 < 2, jax.random.uniform(keys[3], (8, 64)), 0).at[2:5].set(0)
    arrays = (
        jax.random.normal(keys[0], (8, 64, HIDDEN)),
        jax.random.normal(keys[1], (96, HIDDEN)),
        jax.random.randint(keys[2], (8, 64), 0, 96),
        weights,
    )
    places = [NamedSharding(mesh, spec) for spec in (P(ROWS), P("tensor", "fsdp"), P(ROWS), P(ROWS))]
    step = jax.value_and_grad(partial(weighted_nll, chunk=32), (0, 1))
    with jax.set_mesh(mesh):
        program = jax.jit(step, out_shardings=(None, tuple(places[:2]))).lower(*map(jax.device_put, arrays, places))
        program = program.compile()
        got = program(*map(jax.device_put, arrays, places))
    sent = collectives(program.as_text())
    assert sent["all-gather"] == (1, 96 // 2 * HIDDEN * 4)
    assert not sent.keys() & {"all-to-all", "collective-permute"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, step(*arrays))


def test_low_precision_hidden_states_give_a_float32_loss(batch):
    hidden, head, targets, weights = batch
    low = hidden.astype(jnp.bfloat16)
    got = weighted_nll(low, head, targets, weights)
    assert got.dtype == jnp.float32
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(got, plain_nll(low, rounded, targets, weights), rtol=1e-5)


def test_the_gradient_of_the_head_keeps_its_digits_over_many_chunks(batch):
    """bfloat16 hidden states, float32 head: a sum over 111 chunks in bfloat16 would be off by half a percent."""
    hidden, head, targets, weights = batch
    low = hidden.astype(jnp.bfloat16)
    got = jax.grad(weighted_nll, 1)(low, head, targets, weights, 1)
    exact = jax.grad(plain_nll, 1)(low, head.astype(jnp.bfloat16).astype(jnp.float32), targets, weights)
    assert float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)) < 3e-3


def test_all_logits_never_exist_at_once(batch):
    """At 64 chunks the temporary memory is a fraction of what the float32 logits of all tokens take."""
    tokens, vocab = 4096, 4096
    shapes = [((tokens, HIDDEN), jnp.float32), ((vocab, HIDDEN), jnp.float32), ((tokens,), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(*s) for s in (*shapes, ((tokens,), jnp.float32))]
    step = jax.jit(lambda h, w, t, s: jax.value_and_grad(weighted_nll, (0, 1))(h, w, t, s, 64))
    memory = step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert memory < tokens * vocab * 4 / 8
