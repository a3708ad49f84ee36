"""The mesh of devices, and where every array lives on it.

Axes: `data` (batch only), `fsdp` (batch, and every weight's hidden dimension), `tensor` (heads, mlp, vocabulary).
On one device every spec means "here"; nothing else in the code knows how many devices there are.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from pd_jax.config import ModelConfig
from pd_jax.errors import InputError
from pd_jax.params import SIZES, SPLIT, Params, tree_of

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows are split over

# Field names of a spec spell the layout: A accumulation steps, B batch, T tokens, D hidden, S samples, C cache slots.
ACTIVATIONS_BTD = P(ROWS, None, None)
BATCH_ABT = P(None, ROWS, None)
HEAD_VD = P("tensor", None)  # where it is multiplied; [V, D]
CACHE_KS_C_H = P("tensor", None, None)  # [K*S, C, H]


def compile_target() -> tuple[str, str]:
    """Platform ("cpu", "gpu" or "tpu") and kind of the device that is compiled for: that of `jax.set_mesh`, else the
    default device.

    An ahead-of-time compile has a mesh of devices that this machine need not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    platform = device.platform or jax.default_backend()
    return "gpu" if platform == "cuda" else platform, device.device_kind


def make_mesh(*axes: int, devices: Any = None) -> Mesh:
    """A mesh over all devices, of the sizes of `AXES`; one axis may be -1 and takes what the others leave.

    Raises `InputError` when there are not three, or when they do not multiply to the number of devices.
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
    return Mesh(np.array(devices).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raise `InputError` for a model that does not divide over the mesh, naming every dimension that does not."""
    wrong = [
        f"{SIZES[letter]} {size} by {axis} {mesh.shape[axis]}"
        for letter, axis in SPLIT.items()
        if (size := getattr(config, SIZES[letter])) % mesh.shape[axis]
    ]
    if wrong:
        raise InputError(f"the mesh does not divide the model: {'; '.join(wrong)}; choose other --mesh sizes")


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise `InputError` when the rows of a micro-batch do not divide over the batch axes, or those over processes."""
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
    """A tree like the parameters of training, of `NamedSharding`s."""
    return tree_of(config, lambda weight: NamedSharding(mesh, weight.spec()))


def decoding_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """A tree like the weights of decoding (`pd_jax.decoding.unstack`: a list of layers), of `NamedSharding`s."""
    tree = tree_of(config, lambda weight: NamedSharding(mesh, weight.decoding_spec()))
    return tree | {"layers": [tree["layers"]] * config.num_hidden_layers}


def abstract_arrays(shapes: Any, shardings: Any, dtype: Any = None) -> Any:
    """`jax.ShapeDtypeStruct`s of a tree of shapes in a tree of shardings, all of `dtype` if one is given."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, shardings)


def place_batch(mesh: Mesh, accumulation: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows [b * A, T] as global arrays [A, B, T]: dealt out to the micro-batches in turn, so that every
    micro-batch is the same for any number of processes."""
    sharding = NamedSharding(mesh, BATCH_ABT)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.ascontiguousarray(rows.reshape(-1, accumulation, rows.shape[-1]).swapaxes(0, 1))
        )
        for name, rows in batch.items()
    }
