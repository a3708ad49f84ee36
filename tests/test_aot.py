"""Compiled for chips that are not here: a training step's program for a TPU and for an H100, and what it holds.

Needs libtpu, or jax-cuda13-plugin with jax-cuda13-pjrt, of jax's version beside jax; nothing runs on a device.
"""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pd_jax.columns import Coordinates
from pd_jax.config import ModelConfig
from pd_jax.loss import weighted_nll
from pd_jax.model import forward, head, init_params
from pd_jax.plan import topology

pytestmark = pytest.mark.aot
ROWS, TOKENS = 2, 4096
# Qwen3-4B's head_dim, groups and row length; narrow and shallow, because every layer compiles to the same body.
CONFIG = ModelConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    rope_theta=1e6,
    tie_word_embeddings=True,
)


MACHINES = {"tpu": "v5e:2x2", "cuda": "h100:1"}


@cache
def mesh(platform: str, devices: int = 1) -> Mesh:
    """A mesh of chips that are described, not present."""
    try:
        _, chips = topology(MACHINES[platform])
    except ValueError as error:
        pytest.skip(str(error))
    return Mesh(np.array(chips[:devices]).reshape(devices, 1), ("data", "tensor"))


def compile_for(platform: str, function, *shapes, devices: int = 1):
    """`function` compiled for arrays of `shapes`, trees of ShapeDtypeStruct; rows over the devices."""
    chips = mesh(platform, devices)

    def place(leaf):
        spec = P("data") if leaf.shape == (ROWS, TOKENS) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(chips, spec))

    arrays = jax.tree.map(place, shapes)
    with jax.set_mesh(chips):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).compile()


def step_program(platform: str, backend: str, devices: int = 1):
    """Forward and backward of the model over rows of 4,096 tokens."""

    def loss(params, tokens, coordinates, targets, weights):
        hidden = forward(params, CONFIG, tokens, coordinates, dtype=jnp.bfloat16, remat="full", backend=backend)
        return weighted_nll(hidden, head(params), targets, weights)

    def row(dtype):
        return jax.ShapeDtypeStruct((ROWS, TOKENS), dtype)

    params = jax.eval_shape(lambda key: init_params(CONFIG, key, jnp.bfloat16), jax.random.key(0))
    coordinates = Coordinates(row(jnp.int32), row(jnp.int32), row(jnp.int32), row(jnp.bool_), row(jnp.bool_))
    arrays = (row(jnp.int32), coordinates, row(jnp.int32), row(jnp.float32))
    return compile_for(platform, jax.value_and_grad(loss), params, *arrays, devices=devices)


def squares(program) -> set[str]:
    """The T x T arrays in the optimised program."""
    return set(re.findall(rf"\w+\[(?:\d+,)*{TOKENS},{TOKENS}(?:,\d+)*\]", program.as_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "backend"), [("tpu", "splash"), ("tpu", "auto"), ("tpu", "chunked"), ("cuda", "chunked")]
)
def test_a_training_step_holds_no_square_array(platform, backend):
    program = step_program(platform, backend)
    assert squares(program) == set()
    assert ("splash" in program.as_text()) == (platform == "tpu" and backend != "chunked")


@pytest.mark.slow
def test_the_search_for_square_arrays_finds_those_of_dense():
    assert squares(step_program("cuda", "dense"))


@pytest.mark.slow
def test_splash_is_split_over_devices():
    """Two chips, a row each: the kernel sees one row, and nothing gathers q, k or v."""
    program = step_program("tpu", "splash", devices=2)
    text = program.as_text()
    assert "splash" in text
    assert squares(program) == set()
    assert not re.search(rf"all-gather\S* = \S*\[(?:\d+,)*{TOKENS},\d+,128", text)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_chunked_loss_saves_the_logits_of_a_whole_vocabulary(platform):
    """Qwen3's 151,936 rows and 16,384 tokens: 9.3 GiB of float32 logits, of which a chunk of 1,024 holds 0.6."""
    tokens, hidden, vocab = 16384, 1024, 151936
    shapes = (((tokens, hidden), jnp.bfloat16), ((vocab, hidden), jnp.bfloat16))
    shapes += (((tokens,), jnp.int32), ((tokens,), jnp.float32))
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def memory(chunk: int) -> int:
        step = jax.value_and_grad(partial(weighted_nll, chunk=chunk), (0, 1))
        return compile_for(platform, step, *arrays).memory_analysis().temp_size_in_bytes

    whole, chunked = memory(tokens), memory(1024)
    assert whole - chunked > 6.0 * 2**30
    assert chunked < 3 * 2**30
