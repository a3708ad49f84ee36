"""What a run would need on a machine that is not there: its training step and its decoder, compiled ahead of time.

The compilers of TPUs and GPUs need no accelerator. What is compiled here are `train.make_step` and `loop.decode_block`
themselves with the shapes and shardings of a run; memory is the compiler's own account, collectives are read off the
optimised program, work and traffic are counted by hand (XLA counts the body of a loop once).
"""

import dataclasses
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pd_jax.columns import Coordinates
from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.decoding import SamplingParams
from pd_jax.decoding.prompts import Prompt
from pd_jax.decoding.sampling import Method
from pd_jax.decoding.steps import (
    BLOCK,
    Program,
    decode_block,
    prefill,
    unstack,
)
from pd_jax.errors import InputError
from pd_jax.layout import Layout
from pd_jax.lora import adapter_shapes
from pd_jax.machines import GIB, MACHINES, Machine
from pd_jax.mesh import (
    BATCH_ABT,
    CACHE_KS_C_H,
    check_batch,
    check_model,
    decoding_shardings,
    make_mesh,
    param_shardings,
)
from pd_jax.params import init_params, parameter_count, training_flops
from pd_jax.planning.flags import PlanFlags
from pd_jax.training.loop import abstract_state, placed
from pd_jax.training.step import Optimisation, StepSettings, make_optimizer, make_step

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


def topology(name: str) -> tuple[Machine, list[Any]]:
    """The machine and the devices of `name`, e.g. "v5e:4x4" or "h100:8", none of which need exist.

    Raises `ValueError` for a name that is not known, or when its compiler is not installed.
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


def compile_train_step(flags: PlanFlags, config: ModelConfig, devices: list[Any]) -> tuple[Any, Any, Any]:
    """The training step of `flags` compiled for `devices`, and its abstract state and frozen parameters."""
    mesh = make_mesh(*flags.mesh, devices=devices)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    # NVIDIA's kernels cannot be traced without their GPU.
    traced = "chunked" if devices[0].platform == "gpu" and flags.attention == "auto" else flags.attention
    lora = LoraConfig(flags.lora_r) if flags.use_lora else None
    optimizer, _ = make_optimizer(Optimisation(), 1000)
    here, shardings = NamedSharding(mesh, P()), param_shardings(config, mesh)
    weights = jax.eval_shape(partial(init_params, config), jax.random.key(0))

    if lora is None:
        frozen, state = {}, abstract_state(weights, shardings, optimizer, mesh)
    else:
        frozen = placed(weights, shardings, jnp.bfloat16)
        adapters = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            adapter_shapes(config, lora),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        state = abstract_state(adapters, jax.tree.map(lambda _: here, adapters), optimizer, mesh)
    shape = (flags.gradient_accumulation_steps, flags.batch_size, flags.branch_count * flags.seq_length)
    rows = NamedSharding(mesh, BATCH_ABT)
    kinds = {"valid": bool, "prompt": bool, "weights": np.float32}
    batch = {
        f.name: jax.ShapeDtypeStruct(shape, kinds.get(f.name, np.int32), sharding=rows)
        for f in dataclasses.fields(Layout)
    }
    step, _ = make_step(config, optimizer, StepSettings(jnp.bfloat16, flags.remat, traced), lora)
    places = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return jitted.lower(state, frozen, batch).compile(), state, frozen


def decoder_arguments(program: Program, dtype: str, tokens: int, branches: int, room: int) -> tuple[tuple, tuple]:
    """The arguments of `loop.prefill` and of `loop.decode_block`, as trees of ShapeDtypeStruct: one row of `tokens` and
    `branches`, and a cache with room for `room` columns."""

    def begin(key: jax.Array) -> tuple:
        row, branch = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, branches), jnp.int32)
        coordinates = Coordinates(row, row, row, row == 0, row == 0)
        prompt = Prompt(row, coordinates, branch, branch, branch[..., None][..., :0], branch, branch, branch)
        weights = unstack(init_params(program.config, key, dtype), dtype)
        controls = SamplingParams().controls((1,), jnp.ones(program.config.vocab_size, bool))
        state, _ = prefill(weights, controls, prompt, program=program, room=room)
        return (weights, controls, prompt), (weights, controls, state, branch == 0, jnp.int32(room))

    return jax.eval_shape(begin, jax.random.key(0))


def compile_decoder(flags: PlanFlags, config: ModelConfig, devices: list[Any]) -> tuple[Any, Any, Any]:
    """`loop.decode_block` in bfloat16 for one row of branches, compiled for as many of `devices` as share out the kv
    heads; its abstract weights and cache."""
    mesh = make_mesh(1, 1, -1, devices=devices[: math.gcd(len(devices), config.num_key_value_heads)])
    check_model(config, mesh)
    branches, length = flags.branch_count, flags.branch_count * flags.seq_length
    program = Program(config, "columns", Method())
    _, arrays = decoder_arguments(program, "bfloat16", length, branches, 4 * BLOCK)

    weights, controls, state, ended, until = arrays
    here = NamedSharding(mesh, P())
    weights = placed(weights, decoding_shardings(config, mesh))
    cache = jax.tree.map(lambda _: NamedSharding(mesh, CACHE_KS_C_H), state.cache)
    state = placed(state, dataclasses.replace(jax.tree.map(lambda _: here, state), cache=cache))
    controls, ended, until = (placed(x, jax.tree.map(lambda _: here, x)) for x in (controls, ended, until))
    with jax.set_mesh(mesh):
        compiled = decode_block.lower(weights, controls, state, ended, until, program=program).compile()
    return compiled, weights, state.cache


# ---------------------------------------------------------------- reading the program

BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def _bytes(text: str) -> int:
    """The largest array in a type such as `(bf16[16,128]{1,0}, f32[2])`."""
    sizes = [
        BITS.get(kind, 32) // 8 * math.prod(int(d) for d in shape.split(",") if d)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    ]
    return max(sizes, default=0)


def _sent(kind: str, line: str) -> int:
    """Bytes that one device sends in the collective of an HLO line, over a ring: what comes out of it; twice that where
    it is summed first and gathered then; and all that goes in where only a share comes out."""
    size = _bytes(line.split(f" {kind}")[0])
    if kind == "reduce-scatter":
        grid, first = re.search(r"replica_groups=\[\d+,(\d+)\]", line), re.search(r"replica_groups=\{\{([\d,]+)", line)
        return size * (int(grid.group(1)) if grid else len(first.group(1).split(",")) if first else 1)
    return size * (2 if kind == "all-reduce" else 1)


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many run, bytes that are sent in them)} of an optimised HLO module, by one device in one call.

    What stands in the body of a loop counts as often as the loop runs: the trip count that XLA notes, or where it notes
    none (TPU) the bound that the loop's condition compares its counter with.
    """
    bounds: dict[str, int] = defaultdict(int)
    calls: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    entry = computation = ""
    for line in program.splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = opening.group(2)
            entry = computation if opening.group(1) else entry
            continue
        if bound := re.search(r" = s32\[\]\S* constant\((\d+)\)", line):
            bounds[computation] = max(bounds[computation], int(bound.group(1)))
        if not (operation := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line)):
            continue
        kind, trips, condition = operation.group(2), 1, ""
        if kind == "while":
            noted = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', line)
            condition = re.findall(r"condition=%?([\w.\-]+)", line)[0]
            trips = int(noted.group(1)) if noted else 0
        for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
            calls[computation].append((called, trips, condition))
        for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
            calls[computation] += [(name.strip(" %"), 1, "") for name in group.split(",")]
        base = kind.removesuffix("-start")
        if base in COLLECTIVES:
            found[computation].append((base, _sent(base, line)))
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def visit(name: str, times: int) -> None:
        for kind, size in found[name]:
            totals[kind][0] += times
            totals[kind][1] += times * size
        for called, trips, condition in calls[name]:
            visit(called, times * (trips or max(bounds[condition], 1)))

    visit(entry, 1)
    return {kind: (count, size) for kind, (count, size) in sorted(totals.items())}


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """One device's share of one `unit`, "step" or "column", in which `devices` of them work on `tokens` tokens."""

    machine: Machine
    devices: int
    unit: str
    tokens: int
    held: dict[str, int]  # bytes by what they are for
    peak: int
    flops: float
    traffic: float
    collectives: dict[str, tuple[int, int]]

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that each resource needs; the largest bounds the unit."""
        sent = sum(size for _, size in self.collectives.values())
        return {
            "compute": self.flops / self.machine.flops,
            "memory": self.traffic / self.machine.bandwidth,
            "links": sent / self.machine.link,
        }


def local_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peak_bytes(memory: Any) -> int:
    """All that is alive at once, by the compiler's account: what comes in, what goes out, and what is between."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def plan_training(flags: PlanFlags, config: ModelConfig) -> Plan:
    """Compile the training step of `flags` and account for it. Raises `ValueError` for what does not fit together."""
    machine, devices = topology(flags.topology)
    compiled, state, frozen = compile_train_step(flags, config, devices)
    memory = compiled.memory_analysis()
    lora = LoraConfig(flags.lora_r) if flags.use_lora else None
    length = flags.branch_count * flags.seq_length
    tokens = flags.batch_size * flags.gradient_accumulation_steps * length
    again = {"none": 0.0, "dots": 0.0, "full": 2.0 / (4 if lora else 6)}[flags.remat]
    # Every micro-batch reads the bfloat16 weights forward, backward (and once more where layers are recomputed).
    ways = make_mesh(*flags.mesh, devices=devices).shape["tensor"]
    kernels = 2 * parameter_count(config) / ways * (3 if flags.remat == "full" else 2)
    return Plan(
        machine=machine,
        devices=len(devices),
        unit="step",
        tokens=tokens,
        held={
            "parameters": local_bytes(state["trained"]) + local_bytes(frozen),
            "optimizer": local_bytes(state["opt"]),
            "temporaries": memory.temp_size_in_bytes,
        },
        peak=peak_bytes(memory),
        flops=training_flops(config, length, lora is not None) * (1 + again) * tokens / len(devices),
        traffic=2 * (local_bytes(state) + memory.temp_size_in_bytes) + flags.gradient_accumulation_steps * kernels,
        collectives=collectives(compiled.as_text()),
    )


def plan_decoding(flags: PlanFlags, config: ModelConfig) -> Plan:
    """Compile the column decoder for one sample of the size of a training row, and account for one column of it."""
    machine, devices = topology(flags.topology)
    compiled, weights, cache = compile_decoder(flags, config, devices)
    used = math.gcd(len(devices), config.num_key_value_heads)
    memory, n = compiled.memory_analysis(), flags.branch_count
    slots = cache[0][0].shape[1]
    read = {name: part for name, part in weights.items() if name != "embed" or config.tie_word_embeddings}
    matrices = sum(x.size for x in jax.tree.leaves(read) if x.ndim > 1)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * slots
    return Plan(
        machine=machine,
        devices=used,
        unit="column",
        tokens=n,
        held={
            "parameters": local_bytes(weights),
            "cache": local_bytes(cache),
            "temporaries": memory.temp_size_in_bytes,
        },
        peak=peak_bytes(memory),
        flops=(2 * matrices + attention) * n / used,
        traffic=local_bytes(read) + local_bytes(cache),
        collectives=collectives(compiled.as_text()),
    )


def report(name: str, plan: Plan) -> str:
    """The plan as lines of text."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    spare = plan.machine.memory - plan.peak
    fits = f"fits, {gib(spare)} to spare" if spare >= 0 else f"does not fit, {gib(-spare)} too much"
    resource = max(plan.seconds, key=plan.seconds.__getitem__)
    seconds = plan.seconds[resource]
    lines = [
        f"{name}: {fits}",
        f"  memory      peak {gib(plan.peak)} of {gib(plan.machine.memory)}: "
        + ", ".join(f"{what} {gib(size)}" for what, size in plan.held.items()),
        f"  work        {plan.flops / 1e12:.3g} TFLOP, {plan.traffic / 1e9:.1f} GB of memory traffic",
        *(
            f"  {kind:<19} {count} a {plan.unit}, {size / 1e9:.3g} GB sent"
            for kind, (count, size) in plan.collectives.items()
        ),
        "  least time  " + ", ".join(f"{key} {1e3 * value:.2f} ms" for key, value in plan.seconds.items()),
        f"  bound by {resource}: at best {1e3 * seconds:.2f} ms a {plan.unit}, {plan.tokens / seconds:,.0f} tokens/s "
        f"on {plan.devices} devices",
    ]
    return "\n".join(lines)
