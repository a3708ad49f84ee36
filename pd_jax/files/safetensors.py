"""Weights in Hugging Face's safetensors files: read in blocks and written one tensor at a time, for bounded memory.

The library reads: each block goes straight into the array that keeps the numbers, and a shard asks for its rows only.
Writing is ours, because the library wants all tensors of a file in memory at once.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pd_jax.config import ModelConfig
from pd_jax.errors import InputError
from pd_jax.files.checks import differences, finite, raise_collected
from pd_jax.files.find import weight_files
from pd_jax.files.names import Entry, key_table
from pd_jax.machines import naming
from pd_jax.params import BY_NAME, Params, param_shapes, tree_of

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
BLOCK_BYTES = 32 << 20  # what is read of a tensor at once: bounds the memory beside the model

Progress = Callable[[str], Any]  # is told a tensor's name when it has been read or is written


# --- reading safetensors
class Tensor(NamedTuple):
    """A tensor in a safetensors file; nothing of it is read yet."""

    file: Path
    name: str  # in the file
    dtype: np.dtype
    shape: tuple[int, ...]  # in the file: [out, in] for a projection

    def blocks(self, start: int = 0, stop: int | None = None, rows_each: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(first, rows) of the groups [start, stop) of `rows_each` rows of the first axis, `BLOCK_BYTES` at most.

        The file is opened for each of them: what is mapped counts as resident memory until it is closed.
        """
        stop = self.shape[0] // rows_each if stop is None else stop
        group = rows_each * math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, group))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            with safe_open(self.file, framework="np") as file:
                yield first, file.get_slice(self.name)[first * rows_each : last * rows_each]

    def checked(self) -> np.ndarray:
        """The whole tensor, in its own dtype. Raises `InputError` for NaN and infinity."""
        whole = np.concatenate([rows for _, rows in self.blocks()])
        self.check(whole)
        return whole

    def check(self, rows: np.ndarray) -> None:
        """Raise `InputError` when some rows of the tensor hold NaN or infinity; sibling_bias may be -inf: hidden."""
        if not finite(rows) and not (self.name.endswith("sibling_bias") and (rows < np.inf).all()):
            raise InputError(f"{self.file}: {self.name} holds NaN or infinity; it is damaged, or training has diverged")


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises `InputError` naming the file when it is damaged or truncated."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); download it again") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {dtype}, only {', '.join(DTYPES)} are supported")
    return {name: Tensor(path, name, DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def find_tensors(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a model directory's `weight_files`, and what is wrong with the files."""
    errors: list[str] = []
    names, weight_map = weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            found = read_header(directory / name)
        except FileNotFoundError:
            errors.append(f"{name} is missing (model.safetensors.index.json lists it)")
            continue
        except InputError as error:
            errors.append(str(error))
            continue
        errors += [
            f"{key} is both in {tensors[key].file.name} and in {name}" for key in sorted(found.keys() & tensors.keys())
        ]
        tensors |= found
    if weight_map is not None and not errors:
        errors += [f"{key} is in the index but in no file" for key in sorted(weight_map.keys() - tensors.keys())]
    return tensors, errors


def _drop_tied_head(tensors: dict[str, Tensor], errors: list[str]) -> None:
    """Qwen3-0.6B's own file, and others, repeat the embedding as lm_head.weight: fine when equal, an error when not."""
    head, embed = tensors.pop(BY_NAME["lm_head"].hf, None), tensors.get(BY_NAME["embed"].hf)
    if head is None or embed is None:
        return
    same = (head.dtype, head.shape) == (embed.dtype, embed.shape) and all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for (_, a), (_, b) in zip(head.blocks(), embed.blocks(), strict=True)
    )
    if not same:
        errors.append("lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true")


def default_device(config: ModelConfig) -> Params:
    """A tree of shardings that puts every weight on the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return tree_of(config, lambda weight: here)


def read_params(
    directory: Path, config: ModelConfig, dtype: Any = None, *, shardings: Any = None, progress: Progress | None = None
) -> Params:
    """The model of a Hugging Face directory as jax arrays, every tensor read straight to its place.

    `dtype` None keeps the files' own. `shardings` is a tree like `param_shapes(config)`; None is the default device.
    `progress` is called with a tensor's name after it was read (once a shard). Raises `InputError` with everything
    that is missing, unknown, duplicate, truncated or of another shape, before any weight is read.
    """
    table = key_table(config)
    tensors, errors = find_tensors(directory)
    if config.tie_word_embeddings:
        _drop_tied_head(tensors, errors)
    if not errors:
        errors += differences(tensors, {name: entry.hf_shape for name, entry in table.items()}, "the config says")
    kinds: dict[tuple[str, ...], list[Entry]] = {}
    for entry in table.values():
        kinds.setdefault(entry.path, []).append(entry)
    for path, entries in kinds.items():
        found = {tensors[e.name].dtype.name for e in entries if e.name in tensors}
        if dtype is None and len(found) > 1:
            errors.append(f"the layers of {path[-1]} are stored as {' and '.join(sorted(found))}; choose one dtype")
    raise_collected(directory, errors)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...], sharding: Any) -> jax.Array:
        entries = kinds[path]
        out_dtype = tensors[entries[0].name].dtype if dtype is None else np.dtype(dtype)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None stands for shardings whose shards are no slices; ours are
            ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
            out = np.empty([len(r) for r in ranges], out_dtype)
            stacked = entries[0].layer is not None
            for place, number in enumerate(ranges[0] if stacked else [0]):
                entry = entries[number]
                part = out[place] if stacked else out
                _fill(part, tensors[entry.name], entry, ranges[1:] if stacked else ranges)
                if progress is not None:
                    progress(entry.name)
            return out

        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree_util.tree_map_with_path(
        lambda path, shape, sharding: leaf(tuple(k.key for k in path), shape, sharding),
        param_shapes(config),
        default_device(config) if shardings is None else shardings,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _fill(out: np.ndarray, tensor: Tensor, entry: Entry, ranges: list[range]) -> None:
    """Fill `out`, the part `ranges` of our axes of `entry`, from the file."""
    shape = [entry.shape[axis] for axis in entry.order]  # the file's, with heads and head_dim apart
    groups, *rest = (ranges[axis] for axis in entry.order)
    target = out.transpose(entry.order)
    for first, rows in tensor.blocks(groups.start, groups.stop, tensor.shape[0] // shape[0]):
        tensor.check(rows)
        place, block = first - groups.start, rows.reshape(-1, *shape[1:])
        target[place : place + len(block)] = block[(slice(None), *(slice(r.start, r.stop) for r in rest))]


# --- writing safetensors
def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "60KB" (powers of ten, as in transformers' max_shard_size) or "GiB" and so on."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
    number = text.strip().rstrip("BGKMIbgkmi ")
    unit = text.strip()[len(number) :].strip().upper()
    if unit not in units or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise InputError(f"size {text!r} is not a number with a unit; write it like 5GB or 500MB")
    return int(float(number) * units[unit])


class Pending(NamedTuple):
    """A tensor that is made when its turn to be written comes."""

    dtype: np.dtype
    shape: tuple[int, ...]  # in the file
    make: Callable[[], np.ndarray]


def write_safetensors(path: Path, tensors: dict[str, Pending]) -> None:
    """Write one safetensors file, holding one tensor at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in tensors.values():
            # A transposed view must become contiguous first: its bytes are in another order than its elements.
            # Not `tofile`, which does not say why a disk takes no more.
            file.write(np.ascontiguousarray(make()).reshape(-1).view(np.uint8).data)


def write_params(
    directory: Path,
    params: Params,
    config: ModelConfig,
    *,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Write `params` into `directory` as Hugging Face's `model*.safetensors`, sharded at `max_shard_size` bytes."""

    def leaf(entry: Entry) -> Any:
        node = params
        for key in entry.path:
            node = node[key]
        return node

    def make(entry: Entry) -> np.ndarray:
        array = leaf(entry)
        array = np.asarray(array if entry.layer is None else array[entry.layer])
        if progress is not None:
            progress(entry.name)
        return array.transpose(entry.order).reshape(entry.hf_shape)

    shards: list[dict[str, Pending]] = [{}]
    weight_map: dict[str, int] = {}
    size = total = count = 0
    for entry in key_table(config).values():
        dtype = np.dtype(leaf(entry).dtype)
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][entry.name] = Pending(dtype, entry.hf_shape, partial(make, entry))
        weight_map[entry.name] = len(shards)
        size += nbytes
        total += nbytes
        count += math.prod(entry.shape)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(directory / file, shard)
    index = {
        "metadata": {"total_parameters": count, "total_size": total},
        "weight_map": {name: files[number - 1] for name, number in sorted(weight_map.items())},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
