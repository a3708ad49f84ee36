"""The mesh and where every array lives on it: one frozen table of layout-named PartitionSpecs.

Axes: `data` (batch only), `fsdp` (batch, and every weight's hidden dimension), `tensor` (heads, mlp, vocabulary).
On one device every spec means "here"; nothing else in the code knows how many devices there are.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pd_jax.config import ModelConfig
from pd_jax.errors import InputError
from pd_jax.model import Params, param_shapes

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


@dataclass(frozen=True)
class Specs:
    """Field names spell the layout: L layers, D hidden, N heads, K kv heads, H head_dim, F mlp, V vocab, A accumulation
    steps, B batch, T tokens."""

    embed_vd: P = P("tensor", "fsdp")
    lm_head_vd: P = P("tensor", "fsdp")
    norm_d: P = P()
    attn_norm_ld: P = P()
    mlp_norm_ld: P = P()
    q_norm_lh: P = P()
    k_norm_lh: P = P()
    sibling_bias_ln: P = P()
    q_ldnh: P = P(None, "fsdp", "tensor", None)
    k_ldkh: P = P(None, "fsdp", "tensor", None)
    v_ldkh: P = P(None, "fsdp", "tensor", None)
    o_lnhd: P = P(None, "tensor", None, "fsdp")
    gate_ldf: P = P(None, "fsdp", "tensor")
    up_ldf: P = P(None, "fsdp", "tensor")
    down_lfd: P = P(None, "tensor", "fsdp")
    act_btd: P = P(BATCH, None, None)
    batch_abt: P = P(None, BATCH, None)


SPECS = Specs()
_BY_NAME = {f.name.rsplit("_", 1)[0]: getattr(SPECS, f.name) for f in dataclasses.fields(SPECS)}


def make_mesh(*axes: int, devices: Any = None) -> Mesh:
    """A mesh over all devices, of the sizes of `AXES`; one axis may be -1 and takes what the others leave.

    Raises `ValueError` when there are not three, or when they do not multiply to the number of devices.
    """
    if len(axes) != len(AXES):
        raise InputError(f"mesh {' '.join(map(str, axes))} has {len(axes)} sizes; give {', '.join(AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, axes, strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or min(size for size in sizes.values() if size != -1) < 1 or len(devices) % fixed:
        raise InputError(f"mesh {sizes} does not fit {len(devices)} devices; the axes must multiply to that number")
    if free:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise InputError(f"mesh {sizes} has {fixed} places for {len(devices)} devices; set one axis to -1")
    shape = tuple(sizes.values())
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raise `ValueError` for a model that does not divide over the mesh, naming every dimension that does not."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    sizes = {
        "num_attention_heads": (config.num_attention_heads, "tensor", tensor),
        "num_key_value_heads": (config.num_key_value_heads, "tensor", tensor),
        "intermediate_size": (config.intermediate_size, "tensor", tensor),
        "vocab_size": (config.vocab_size, "tensor", tensor),
        "hidden_size": (config.hidden_size, "fsdp", fsdp),
    }
    wrong = [f"{name} {size} by {axis} {n}" for name, (size, axis, n) in sizes.items() if size % n]
    if wrong:
        raise InputError(f"the mesh does not divide the model: {'; '.join(wrong)}; choose other --mesh sizes")


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise `ValueError` when the rows of a micro-batch do not divide over the batch axes, or those over processes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise InputError(
            f"--batch-size {batch_size} does not divide over data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} "
            f"devices; use a multiple of {ways}"
        )
    processes = len({device.process_index for device in mesh.devices.flat})
    if ways % processes:
        raise InputError(
            f"data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} does not share out the rows over {processes} "
            "processes; make it a multiple of that number and --mesh's tensor axis smaller"
        )


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """A tree like the parameters, of `NamedSharding`s."""

    def place(path: tuple, _: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, _BY_NAME[path[-1].key])

    return jax.tree_util.tree_map_with_path(place, param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
