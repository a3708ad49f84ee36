"""Compiled for chips that are not here: a training step's program for a TPU and for an H100, and what it holds.

Needs libtpu, or jax-cuda13-plugin with jax-cuda13-pjrt, of jax's version beside jax; nothing runs on a device.
"""

import dataclasses
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from pd_jax.columns import Coordinates
from pd_jax.config import ModelConfig
from pd_jax.decoding import BLOCK, Method, Program, decode_block
from pd_jax.files import known_config
from pd_jax.loss import weighted_nll
from pd_jax.model import forward, head
from pd_jax.params import init_params
from pd_jax.planning import PlanFlags
from pd_jax.planning.compile import compile_train_step, decoder_arguments, topology
from pd_jax.planning.plan import workload_of

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


def compile_for(platform: str, function, *shapes, devices: int = 1, donate: int | None = None):
    """`function` compiled for arrays of `shapes`, trees of ShapeDtypeStruct; rows over the devices. The argument
    `donate` is donated."""
    chips = mesh(platform, devices)

    def place(leaf):
        spec = P("data") if leaf.shape == (ROWS, TOKENS) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(chips, spec))

    arrays = jax.tree.map(place, shapes)
    with jax.set_mesh(chips):
        return jax.jit(function, donate_argnums=donate).trace(*arrays).lower(lowering_platforms=(platform,)).compile()


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


@pytest.mark.slow
def test_a_plan_names_the_machine_that_it_is_for(caplog):
    """And not the one that it is made on."""
    flags = PlanFlags(batch_size=1, branch_count=2, seq_length=256, mesh=(1, 1, 1))
    with caplog.at_level("INFO", logger="pd_jax"):
        compile_train_step(workload_of(flags), CONFIG, list(mesh("cuda").devices.flat))
    why = "NVIDIA's kernels cannot be traced without their GPU"
    assert [record.message for record in caplog.records] == [f"attention: chunked on NVIDIA H100 80GB HBM3 ({why})"]


# --- decoding
LAYERS = 12  # of Qwen3-4B's 36
STAGED = {"cuda": 0, "tpu": 2}  # libtpu keeps so many of the 24 cache arrays in vector memory, and writes them back


def decoder_program(platform: str, branches: int):
    """A block of `branches` branches over 1,024 tokens, Qwen3-4B's shape with `LAYERS` layers; the shape of a cache
    array, and the bytes of the smallest weight matrix or cache array."""
    config = dataclasses.replace(known_config("Qwen/Qwen3-4B"), num_hidden_layers=LAYERS)
    program = Program(config, "columns", Method())
    _, arguments = decoder_arguments(config, "bfloat16", tokens=1024, branches=branches, room=4 * BLOCK)
    weights, _, state, *_ = arguments
    block = partial(decode_block.__wrapped__, program=program)
    large = jax.tree.leaves((weights["layers"], state.cache.layers))
    least = min(x.size * x.dtype.itemsize for x in large if x.ndim > 1)
    compiled = compile_for(platform, block, *arguments, donate=2)
    return compiled, state.cache.layers[0][0].shape, least


def copies(program, least: int) -> list[str]:
    """Copies and transposes of at least so many bytes; not those of a TPU into its vector memory, `S(1)`."""
    sizes = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4}
    found = re.findall(r"= \(?(\w+)\[([\d,]+)\](\S*).* (?:copy|copy-start|transpose)\(", program.as_text())
    return [
        f"{kind}[{shape}]"
        for kind, shape, layout in found
        if "S(1)" not in layout and math.prod(map(int, shape.split(","))) * sizes.get(kind, 4) >= least
    ]


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 16])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_decoding_copies_neither_weights_nor_cache(platform, branches):
    program, cache, least = decoder_program(platform, branches)
    assert " while(" in program.as_text()
    found = copies(program, least)
    assert len(found) <= STAGED[platform]
    assert set(found) <= {f"bf16[{','.join(map(str, cache))}]"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_search_for_copies_finds_those_of_a_cache_that_is_read_after_it_is_written(platform):
    def loop(cache, new):
        def step(_, carry):
            cache, total = carry
            written = jax.lax.dynamic_update_slice(cache, new + total[0, 0], (0, 0))
            return written, total + new @ (cache @ written.T)[: new.shape[1]]

        return jax.lax.fori_loop(0, 9, step, (cache, jnp.zeros((16, 4096), jnp.bfloat16)))

    cache, new = (jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16) for n in (4096, 16))
    program = compile_for(platform, loop, cache, new, donate=0)
    assert copies(program, 4096 * 4096 * 2)
