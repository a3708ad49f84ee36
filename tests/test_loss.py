"""The chunked loss equals the plain one: value and gradients, whatever the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pd_jax.loss import weighted_nll

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
