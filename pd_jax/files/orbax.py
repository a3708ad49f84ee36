"""Our own checkpoints of the weights, the `params/` of a model directory, through orbax with bounded memory."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from pd_jax.config import Dtype, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.checks import differences, raise_collected
from pd_jax.params import Params, param_shapes

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file it opens

CONCURRENT_BYTES = 256 << 20  # orbax's buffers beside the model; without a limit it holds the model twice
CHUNK_BYTES = 64 << 20  # what is compressed at once


def _context(tree: Any) -> ocp.Context:
    """Orbax with bounded buffers; its limits must lie above the largest array of `tree`."""
    context = ocp.Context()
    largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(CONCURRENT_BYTES, largest + 1)
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.use_compression = False  # weights hardly shrink, and it takes three times as long
    return context


def _by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree, or their shapes, by their keys: "['layers']['q']"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def read_checkpoint(path: Path, config: ModelConfig, dtype: Any, shardings: Any) -> Params:
    """The weights at `path`, checked against `config` before they are read; dtype None: as they are stored."""
    path = path.absolute()  # orbax finds nothing at a relative one, and says nothing
    try:
        metadata = ocp.metadata(str(path))
        stored, about = metadata.metadata, metadata.custom_metadata
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint: {root_cause(error)}") from None
    found, expected = _by_name(stored), _by_name(param_shapes(config))
    if not found:
        raise InputError(f"{path} is not a readable checkpoint: it holds no arrays; is it damaged?")
    raise_collected(path, differences(found, expected, "the config says"))
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        stored,
        shardings,
    )
    try:
        with _context(target):
            params = ocp.load(str(path), target)
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint: {root_cause(error)}") from None
    sums: Any = about.get("digest") if isinstance(about, dict) else None  # an older one has none
    if sums and sums.get(params["norm"].dtype.name) not in (None, digest(params)):
        raise InputError(f"{path} is not what was saved: bits have changed on the disk; restore it from a copy")
    broken = [name for name, fine in _by_name(_finite(params)).items() if not fine]
    if broken:
        raise InputError(f"{path}: {broken[0]} holds NaN or infinity; it is damaged, or training has diverged")
    return params


@jax.jit
def _finite(params: Params) -> Any:
    """Whether each array holds neither NaN nor infinity; sibling_bias may be -inf: hidden."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        return jnp.all(x < jnp.inf) if path[-1].key == "sibling_bias" else jnp.all(jnp.isfinite(x))

    return jax.tree_util.tree_map_with_path(one, params)


def digest(tree: Any, dtype: Dtype | None = None) -> list[int]:
    """A checksum of every array, as it is or as `dtype`, by its bits: orbax keeps none, and a flipped bit of a number
    is a number.

    Whatever the devices, the sums are the same: they are of integers, modulo 2^32.
    """
    return [int(total) for total in jax.tree.leaves(_sums(tree, dtype))]


@partial(jax.jit, static_argnames="dtype")  # here, not in `digest`: else every call would compile it, and keep it
def _sums(tree: Any, dtype: Dtype | None) -> Any:
    def one(x: jax.Array) -> jax.Array:
        x = x if dtype is None else x.astype(dtype)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
        places = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)  # odd: the change of any one bit stays

    return jax.tree.map(one, tree)


def write_checkpoint(path: Path, params: Params) -> None:
    """Write `params` as the checkpoint `path`, with their checksums; every process must call it. Raises `InputError`
    where it cannot be written."""
    sums: Any = {dtype: digest(params, dtype) for dtype in get_args(Dtype)}
    try:
        with _context(params):
            ocp.save(str(path.absolute()), params, custom_metadata={"digest": sums})
    except Exception as error:
        raise InputError(
            f"{path} cannot be written ({root_cause(error)}); make room or choose another place, and run the same "
            "command again"
        ) from None


def root_cause(error: BaseException) -> str:
    """Orbax wraps every failure in a page about handlers; the reason is at the bottom of the chain."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # ty: ignore[invalid-assignment]
    text = str(error).strip().partition("\n")[0]
    text = text if len(text) <= 400 else f"{text[:100]} ... {text[-300:]}"  # tensorstore says all of its settings
    return f"{type(error).__name__}: {text}"
