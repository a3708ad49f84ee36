"""Training steps and decoders compiled for machines that are not there: the compilers need no accelerator."""

import dataclasses
import logging
import math
import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

from pd_jax.columns import Coordinates
from pd_jax.config import Backend, LoraConfig, ModelConfig, Remat
from pd_jax.decoding import BLOCK, Cache, Method, Program, Prompt, SamplingParams, State, decode_block, unstack
from pd_jax.errors import InputError
from pd_jax.layout import Layout
from pd_jax.lora import adapter_shapes
from pd_jax.machines import MACHINES, Machine
from pd_jax.mesh import (
    BATCH_ABT,
    CACHE_KS_C_H,
    abstract_arrays,
    check_batch,
    check_model,
    decoding_shardings,
    make_mesh,
    param_shardings,
)
from pd_jax.params import init_params
from pd_jax.training import Optimisation, StepSettings, abstract_state, make_optimizer, make_step

log = logging.getLogger(__name__)

# How XLA describes an H100 SXM to itself (stream_executor's GpuTargetConfigProto).
H100_TARGET = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is compiled: rows of branches to train on, and one such row to decode behind."""

    mesh: tuple[int, ...]  # sizes of data, fsdp and tensor
    batch_size: int  # rows of a micro-batch
    accumulation: int  # micro-batches of a step
    branches: int  # of a row
    length: int  # tokens of a row
    remat: Remat
    attention: Backend
    lora: LoraConfig | None  # None trains all weights


def topology(name: str) -> tuple[Machine, list[Any]]:
    """The machine and the devices of `name`, e.g. "v5e:4x4" or "h100:8", none of which need exist.

    Raises `InputError` for a name that is not known, or when its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    unknown = f"topology {name!r} is not known; give one like v5e:4x4, v5p:2x2x1, v6e:4x4 or h100:1 to h100:8"
    if (
        kind not in MACHINES
        or not MACHINES[kind].memory
        or not re.fullmatch(r"[1-8]" if kind == "h100" else r"\d+(x\d+)*", shape)
    ):
        raise InputError(unknown)
    machine, version = MACHINES[kind], jax.__version__
    platform = "tpu" if kind.startswith("v") else "cuda"
    module, install = {
        "tpu": ("libtpu", f"'jax[tpu]=={version}'"),
        "cuda": ("jax_cuda13_plugin", f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"),
    }[platform]
    if find_spec(module) is None:
        raise InputError(f"the compiler for {name} is not installed; pip install {install}")
    try:
        if platform == "tpu":
            description = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            description = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x1x{shape}", target_config=H100_TARGET
            )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(f"{unknown} ({module}: {str(error).splitlines()[0]})") from None
    return machine, list(description.devices)


def compile_train_step(workload: Workload, config: ModelConfig, devices: list[Any]) -> tuple[Any, Any, Any]:
    """The training step of `workload` compiled for `devices`, and its abstract state and frozen parameters."""
    mesh = make_mesh(*workload.mesh, devices=devices)
    check_model(config, mesh)
    check_batch(workload.batch_size, mesh)
    attention, lora = workload.attention, workload.lora
    if attention == "auto" and devices[0].platform == "gpu":
        attention = "chunked"
        kind = devices[0].device_kind
        log.warning("attention: chunked on %s (NVIDIA's kernels cannot be traced without their GPU)", kind)
    optimizer, _ = make_optimizer(Optimisation(), 1000)
    here, shardings = NamedSharding(mesh, P()), param_shardings(config, mesh)
    weights = jax.eval_shape(partial(init_params, config), jax.random.key(0))

    if lora is None:
        frozen, state = {}, abstract_state(weights, shardings, optimizer, mesh)
    else:
        frozen = abstract_arrays(weights, shardings, jnp.bfloat16)
        adapters = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            adapter_shapes(config, lora),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        state = abstract_state(adapters, jax.tree.map(lambda _: here, adapters), optimizer, mesh)
    shape = (workload.accumulation, workload.batch_size, workload.length)
    rows = NamedSharding(mesh, BATCH_ABT)
    kinds = {"valid": bool, "prompt": bool, "weights": np.float32}
    batch = {
        f.name: jax.ShapeDtypeStruct(shape, kinds.get(f.name, np.int32), sharding=rows)
        for f in dataclasses.fields(Layout)
    }
    step, _ = make_step(config, optimizer, StepSettings(jnp.bfloat16, workload.remat, attention), lora)
    places = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return jitted.lower(state, frozen, batch).compile(), state, frozen


def decoder_arguments(config: ModelConfig, dtype: str, *, tokens: int, branches: int, room: int) -> tuple[tuple, tuple]:
    """The arguments of `pd_jax.decoding.prefill` and of `decode_block` after it, as trees of ShapeDtypeStruct: one row
    of `tokens` and `branches`, a cache with room for `room` columns, the likeliest token each time.

    The state between the two is written down, not traced: a prefill would choose its attention by the machine that this
    runs on, and NVIDIA's kernels cannot be traced without their GPU.
    """

    def array(*shape: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, of)

    def places(count: int) -> Coordinates:
        place, flag = array(1, count), array(1, count, of=jnp.bool_)
        return Coordinates(branch=place, column=place, segment=place, valid=flag, prompt=flag)

    branch, flag, scalar = array(1, branches), array(1, branches, of=jnp.bool_), array()
    begun = {
        "branch": branch,
        "first": branch,
        "forced": array(1, branches, 0),
        "forced_count": branch,
        "limit": branch,
    }
    stream = array(1, branches, of=jnp.uint32)
    prompt = Prompt(tokens=array(1, tokens), coordinates=places(tokens), last=branch, stream=stream, **begun)
    slots = tokens + branches * room
    cache = array(config.num_key_value_heads, slots, config.head_dim, of=dtype)
    state = State(
        cache=Cache([(cache, cache)] * config.num_hidden_layers, places(slots), slot=scalar, width=scalar),
        count=scalar,
        token=branch,
        live=flag,
        done=flag,
        key=None,
        seen=None,
        **begun,
    )
    weights = jax.eval_shape(lambda key: unstack(init_params(config, key, dtype), dtype), jax.random.key(0))
    controls = jax.eval_shape(lambda: SamplingParams().controls((1,), jnp.ones(config.vocab_size, bool), 1, 1))
    return (weights, controls, prompt), (weights, controls, state, flag, scalar)


def compile_decoder(workload: Workload, config: ModelConfig, devices: list[Any]) -> tuple[Any, Any, Any]:
    """A block of columns in bfloat16 for one row of branches, compiled for as many of `devices` as share out the kv
    heads; its abstract weights and cache."""
    mesh = make_mesh(1, 1, -1, devices=devices[: math.gcd(len(devices), config.num_key_value_heads)])
    check_model(config, mesh)
    sizes = {"tokens": workload.length, "branches": workload.branches, "room": 4 * BLOCK}
    _, (weights, controls, state, ended, until) = decoder_arguments(config, "bfloat16", **sizes)
    here = NamedSharding(mesh, P())
    weights = abstract_arrays(weights, decoding_shardings(config, mesh))
    places: Any = jax.tree.map(lambda _: here, state)
    places.cache.layers[:] = jax.tree.map(lambda _: NamedSharding(mesh, CACHE_KS_C_H), state.cache.layers)
    state = abstract_arrays(state, places)
    controls, ended, until = (abstract_arrays(x, jax.tree.map(lambda _: here, x)) for x in (controls, ended, until))
    program = Program(config, "columns", Method())
    with jax.set_mesh(mesh):
        compiled = decode_block.lower(weights, controls, state, ended, until, program=program).compile()
    return compiled, weights, state.cache.layers
