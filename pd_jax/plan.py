"""What a run would need on a machine that is not there: the real training step, compiled ahead of time.

The compilers of TPUs and GPUs need no accelerator. What is compiled here is `train.make_step` itself with the shapes
and shardings of a run; memory is the compiler's own account, collectives are read off the optimised program.
"""

import dataclasses
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.flags import PlanFlags, PretrainFlags
from pd_jax.layout import Layout
from pd_jax.lora import adapter_shapes
from pd_jax.model import init_params
from pd_jax.monitor import flops_per_token
from pd_jax.sharding import SPECS, check_batch, check_model, make_mesh, param_shardings
from pd_jax.train import abstract_state, make_optimizer, make_step, placed

# layers, hidden, mlp, heads, kv heads, tied: from the models' config.json; head_dim 128, vocabulary 151,936, theta 1e6.
QWEN3 = {
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 16, 8, True),
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16, 8, True),
    "Qwen/Qwen3-4B": (36, 2560, 9728, 32, 8, True),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, False),
    "Qwen/Qwen3-14B": (40, 5120, 17408, 40, 8, False),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64, 8, False),
}


@dataclass(frozen=True)
class Machine:
    """One device, from its data sheet: memory in bytes, the others in units per second. `link` is what one device sends
    to the others of its slice or node."""

    platform: str
    memory: float
    bandwidth: float
    flops: float
    link: float


GIB = 2**30
MACHINES = {
    "v5e": Machine("tpu", 16 * GIB, 819e9, 197e12, 200e9),
    "v5p": Machine("tpu", 95 * GIB, 2765e9, 459e12, 600e9),
    "v6e": Machine("tpu", 32 * GIB, 1640e9, 918e12, 448e9),
    "h100": Machine("cuda", 84978434048, 3352e9, 989e12, 450e9),
}

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


def model_config(name: str) -> ModelConfig:
    """The shape of a Qwen3 by its hub id; no download."""
    if name not in QWEN3:
        raise ValueError(f"model {name!r} is not known here; give a directory, or one of {', '.join(QWEN3)}")
    layers, hidden, mlp, heads, kv_heads, tied = QWEN3[name]
    return ModelConfig(151936, hidden, mlp, layers, heads, kv_heads, 128, 1e6, tie_word_embeddings=tied)


def topology(name: str) -> tuple[Machine, list[Any]]:
    """The machine and the devices of `name`, e.g. "v5e:4x4" or "h100:8", none of which need exist.

    Raises `ValueError` for a name that is not known, or when its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in MACHINES or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"topology {name!r} is not known; give one like v5e:4x4, v5p:2x2x1, v6e:4x4, h100:8")
    machine = MACHINES[kind]
    try:
        if machine.platform == "tpu":
            description = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            description = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x1x{shape}", target_config=H100_TARGET
            )
    except (RuntimeError, NotImplementedError, ImportError) as error:
        extra = "libtpu" if machine.platform == "tpu" else "jax-cuda13-plugin jax-cuda13-pjrt (of jax's version)"
        raise ValueError(
            f"the compiler for {name} cannot be used ({str(error).splitlines()[0]}); pip install {extra}"
        ) from None
    return machine, list(description.devices)


def compile_train_step(flags: PlanFlags, config: ModelConfig, devices: list[Any]) -> tuple[Any, Any, Any]:
    """The training step of `flags` compiled for `devices`, and its abstract state and frozen parameters."""
    mesh = make_mesh(*flags.mesh, devices=devices)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    shared = {f.name for f in dataclasses.fields(PretrainFlags)} & {f.name for f in dataclasses.fields(PlanFlags)}
    run = PretrainFlags(**{name: getattr(flags, name) for name in shared})
    lora = LoraConfig(flags.lora_r) if flags.use_lora else None
    optimizer, _ = make_optimizer(run, 1000)
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
    rows = NamedSharding(mesh, SPECS.batch_abt)
    kinds = {"valid": bool, "prompt": bool, "weights": np.float32}
    batch = {
        f.name: jax.ShapeDtypeStruct(shape, kinds.get(f.name, np.int32), sharding=rows)
        for f in dataclasses.fields(Layout)
    }
    step, _ = make_step(run, config, lora, optimizer, jnp.bfloat16)
    places = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return jitted.lower(state, frozen, batch).compile(), state, frozen


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


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many run, bytes that come out of them)} of an optimised HLO module, on one device in one call.

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
            found[computation].append((base, _bytes(operation.group(1))))
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
    """Per device; bytes, FLOPs and seconds of one optimiser step."""

    machine: Machine
    parameters: int
    optimizer: int
    temporaries: int
    peak: int
    flops: float
    traffic: float
    collectives: dict[str, tuple[int, int]]

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that each resource needs; the largest bounds the step."""
        sent = sum(size for _, size in self.collectives.values())
        return {
            "compute": self.flops / self.machine.flops,
            "memory": self.traffic / self.machine.bandwidth,
            "links": sent / self.machine.link,
        }


def local_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan_training(flags: PlanFlags, config: ModelConfig) -> Plan:
    """Compile the training step of `flags` and account for it. Raises `ValueError` for what does not fit together."""
    machine, devices = topology(flags.topology)
    compiled, state, frozen = compile_train_step(flags, config, devices)
    memory = compiled.memory_analysis()
    moments, weights = local_bytes(state["opt"]), local_bytes(state["trained"]) + local_bytes(frozen)
    lora = LoraConfig(flags.lora_r) if flags.use_lora else None
    length = flags.branch_count * flags.seq_length
    tokens = flags.batch_size * flags.gradient_accumulation_steps * length
    again = {"none": 0.0, "dots": 0.0, "full": 2.0 / (4 if lora else 6)}[flags.remat]
    # Every micro-batch reads the bfloat16 weights forward, backward (and once more where layers are recomputed).
    kernels = 2 * config.parameters / math.prod(flags.mesh[2:]) * (3 if flags.remat == "full" else 2)
    return Plan(
        machine=machine,
        parameters=weights,
        optimizer=moments,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        flops=flops_per_token(config, lora, length) * (1 + again) * tokens / len(devices),
        traffic=2 * (local_bytes(state) + memory.temp_size_in_bytes) + flags.gradient_accumulation_steps * kernels,
        collectives=collectives(compiled.as_text()),
    )


def report(name: str, plan: Plan, tokens: int, devices: int) -> str:
    """The plan as lines of text."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    spare = plan.machine.memory - plan.peak
    fits = f"fits, {gib(spare)} to spare" if spare >= 0 else f"does not fit, {gib(-spare)} too much"
    resource = max(plan.seconds, key=plan.seconds.__getitem__)
    seconds = plan.seconds[resource]
    lines = [
        f"{name}: {fits}",
        f"  memory      peak {gib(plan.peak)} of {gib(plan.machine.memory)}: parameters {gib(plan.parameters)}, "
        f"optimizer {gib(plan.optimizer)}, temporaries {gib(plan.temporaries)}",
        f"  work        {plan.flops / 1e12:.2f} TFLOP, {plan.traffic / 1e9:.1f} GB of memory traffic",
        *(f"  {kind:<19} {count} a step, {size / 1e9:.2f} GB" for kind, (count, size) in plan.collectives.items()),
        "  least time  " + ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in plan.seconds.items()),
        f"  bound by {resource}: at best {1e3 * seconds:.1f} ms a step, {tokens / seconds:,.0f} tokens/s on {devices} "
        "devices",
    ]
    return "\n".join(lines)
