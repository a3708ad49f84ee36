"""What a run would need on a machine that is not there: memory, traffic, the least time of a step and of a column.

Memory is the compiler's own account, collectives are read off the optimised program, work and traffic are counted by
hand (XLA counts the body of a loop once).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax

from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.machines import GIB, Machine, measured, peak_bytes
from pd_jax.mesh import make_mesh
from pd_jax.params import parameter_count, training_flops
from pd_jax.planning.collectives import collectives
from pd_jax.planning.compile import Workload, compile_decoder, compile_train_step, topology
from pd_jax.planning.flags import PlanFlags


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device does in one unit of work."""

    machine: Machine  # by its data sheet
    measured: Machine | None = None  # the same as `scripts/doctor.py` measured it, where it ran on one
    devices: int  # that share the work
    unit: Literal["step", "column"]
    tokens: int  # of the unit, on all devices
    held: dict[str, int]  # bytes by what they are for
    peak: int  # bytes, the most at once
    flops: float
    traffic: float  # bytes to and from memory
    collectives: dict[str, tuple[int, int]]  # by kind: how many, and bytes sent in all of them

    def seconds(self, machine: Machine) -> dict[str, float]:
        """The least time that each resource of `machine` needs; the largest bounds the unit."""
        sent = sum(size for _, size in self.collectives.values())
        return {
            "compute": self.flops / machine.flops,
            "memory": self.traffic / machine.bandwidth,
            "links": sent / machine.link,
        }


def local_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def workload_of(flags: PlanFlags) -> Workload:
    """What is compiled, as the flags say."""
    return Workload(
        mesh=flags.mesh,
        batch_size=flags.batch_size,
        accumulation=flags.gradient_accumulation_steps,
        branches=flags.branch_count,
        length=flags.branch_count * flags.seq_length,
        remat=flags.remat,
        attention=flags.attention,
        lora=LoraConfig(flags.lora_r) if flags.use_lora else None,
    )


def plan_training(flags: PlanFlags, config: ModelConfig) -> Plan:
    """Compile the training step of `flags` and account for it. Raises `InputError` for what does not fit together."""
    machine, devices = topology(flags.topology)
    workload = workload_of(flags)
    compiled, state, frozen = compile_train_step(workload, config, devices)
    memory = compiled.memory_analysis()
    lora, length = workload.lora, workload.length
    tokens = flags.batch_size * flags.gradient_accumulation_steps * length
    again = {"none": 0.0, "dots": 0.0, "full": 2.0 / (4 if lora else 6)}[flags.remat]
    # Every micro-batch reads the bfloat16 weights forward, backward (and once more where layers are recomputed).
    ways = make_mesh(*flags.mesh, devices=devices).shape["tensor"]
    kernels = 2 * parameter_count(config) / ways * (3 if flags.remat == "full" else 2)
    return Plan(
        machine=machine,
        measured=measured(devices[0].device_kind),
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
    compiled, weights, cache = compile_decoder(workload_of(flags), config, devices)
    used = math.gcd(len(devices), config.num_key_value_heads)
    memory, n = compiled.memory_analysis(), flags.branch_count
    slots = cache[0][0].shape[1]
    read = {name: part for name, part in weights.items() if name != "embed" or config.tie_word_embeddings}
    matrices = sum(x.size for x in jax.tree.leaves(read) if x.ndim > 1)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * slots
    return Plan(
        machine=machine,
        measured=measured(devices[0].device_kind),
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
    least = plan.seconds(plan.machine)
    resource = max(least, key=least.__getitem__)
    seconds = least[resource]
    lines = [
        f"{name}: {fits}",
        f"  memory      peak {gib(plan.peak)} of {gib(plan.machine.memory)}: "
        + ", ".join(f"{what} {gib(size)}" for what, size in plan.held.items()),
        f"  work        {plan.flops / 1e12:.3g} TFLOP, {plan.traffic / 1e9:.1f} GB of memory traffic",
        *(
            f"  {kind:<19} {count} a {plan.unit}, {size / 1e9:.3g} GB sent"
            for kind, (count, size) in plan.collectives.items()
        ),
        "  least time  " + ", ".join(f"{key} {1e3 * value:.2f} ms" for key, value in least.items()),
        f"  bound by {resource}: at best {1e3 * seconds:.2f} ms a {plan.unit}, {plan.tokens / seconds:,.0f} tokens/s "
        f"on {plan.devices} devices",
    ]
    if plan.measured is not None:
        slower = max(plan.seconds(plan.measured).values())
        lines.append(f"  as scripts/doctor.py measured this machine: at best {1e3 * slower:.2f} ms a {plan.unit}")
    return "\n".join(lines)
