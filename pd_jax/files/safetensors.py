"""Hugging Face's tensors and ours: one key table both ways, and safetensors read and written one tensor at a time.

A tensor is read in blocks, straight into the array that keeps the numbers, and only the rows that a shard needs.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pd_jax.config import ModelConfig
from pd_jax.errors import InputError
from pd_jax.params import BY_NAME, Params, Weight, param_shapes, weights_of

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
BLOCK_BYTES = 32 << 20  # what is read of a tensor at once: bounds the memory beside the model

Progress = Callable[[str], Any]


# --- the table
class Entry(NamedTuple):
    """One tensor: Hugging Face's name for it and its place in `Params`."""

    name: str
    path: tuple[str, ...]  # its keys in `Params`
    layer: int | None  # its place along L; None for embed, norm and lm_head
    shape: tuple[int, ...]  # in our axes, without L
    order: tuple[int, ...]  # our axes in Hugging Face's order: outputs, then inputs
    hf_shape: tuple[int, ...]


def key_table(config: ModelConfig) -> dict[str, Entry]:
    """Every tensor of a model by its Hugging Face name, in the order in which exports write them."""

    def entry(weight: Weight, layer: int | None) -> Entry:
        name = weight.hf if layer is None else f"model.layers.{layer}.{weight.hf}"
        path = (weight.name,) if layer is None else ("layers", weight.name)
        shape, inputs = weight.shape(config), len(weight.summed)
        order = (*range(inputs, len(shape)), *range(inputs))
        hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape
        return Entry(name, path, layer, shape, order, hf_shape)

    weights = weights_of(config)
    inside = [weight for weight in weights if weight.in_layers]
    first, *last = [weight for weight in weights if not weight.in_layers]
    entries = [entry(first, None)]
    entries += [entry(weight, layer) for layer in range(config.num_hidden_layers) for weight in inside]
    entries += [entry(weight, None) for weight in last]
    return {entry.name: entry for entry in entries}


# --- reading safetensors
class Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

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

    def read(self) -> np.ndarray:
        """The whole tensor, in its own dtype."""
        return np.concatenate([rows for _, rows in self.blocks()])


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises `InputError` naming the file when it is damaged or truncated."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or damaged ({error}); download it again") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {dtype}, only {', '.join(DTYPES)} are supported")
    return {name: Tensor(path, name, DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def find_tensors(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a model directory's `model*.safetensors`, and what is wrong with the files."""
    errors: list[str] = []
    index = directory / "model.safetensors.index.json"
    weight_map: dict[str, str] | None = None
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(path.name for path in directory.glob("model*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            found = read_header(directory / name)
        except FileNotFoundError:
            errors.append(f"{name} is missing (model.safetensors.index.json lists it)")
            continue
        except ValueError as error:
            errors.append(str(error))
            continue
        errors += [
            f"{key} is both in {tensors[key].file.name} and in {name}" for key in sorted(found.keys() & tensors.keys())
        ]
        tensors |= found
    if weight_map is not None and not errors:
        errors += [f"{key} is in the index but in no file" for key in sorted(weight_map.keys() - tensors.keys())]
    return tensors, errors


def differences(found: Mapping[str, Any], expected: Mapping[str, Sequence[int]], source: str) -> list[str]:
    """A line for every array that is missing, unknown or of another shape than `source` says.

    `found` has anything with a shape by name, `expected` the shapes.
    """
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is unknown" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name].shape)}, {source} {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ),
    ]


def _drop_tied_head(tensors: dict[str, Tensor], errors: list[str]) -> None:
    """Qwen3-0.6B's own file repeats the embedding as lm_head.weight: fine when equal, an error when not."""
    head, embed = tensors.pop(BY_NAME["lm_head"].hf, None), tensors.get(BY_NAME["embed"].hf)
    if head is None or embed is None:
        return
    same = (head.dtype, head.shape) == (embed.dtype, embed.shape) and all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for (_, a), (_, b) in zip(head.blocks(), embed.blocks(), strict=True)
    )
    if not same:
        errors.append("lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true")


def raise_collected(where: Path, errors: list[str], shown: int = 20) -> None:
    """Raise one `InputError` for `errors`, if there are any."""
    if errors:
        more = f"; and {len(errors) - shown} more" if len(errors) > shown else ""
        raise InputError(f"{where}: " + "; ".join(errors[:shown]) + more)


def read_params(
    directory: Path, config: ModelConfig, dtype: Any = None, shardings: Any = None, progress: Progress | None = None
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

    shapes = param_shapes(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree_util.tree_map_with_path(
        lambda path, shape, sharding: leaf(tuple(k.key for k in path), shape, sharding),
        shapes,
        shardings,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _fill(out: np.ndarray, tensor: Tensor, entry: Entry, ranges: list[range]) -> None:
    """Fill `out`, the part `ranges` of our axes of `entry`, from the file."""
    shape = [entry.shape[axis] for axis in entry.order]  # the file's, with heads and head_dim apart
    groups, *rest = (ranges[axis] for axis in entry.order)
    target = out.transpose(entry.order)
    for first, rows in tensor.blocks(groups.start, groups.stop, tensor.shape[0] // shape[0]):
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
    shape: tuple[int, ...]
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
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in tensors.values():
            # A transposed view must become contiguous first: its bytes are in another order than its elements.
            np.ascontiguousarray(make()).tofile(file)


def write_params(
    directory: Path,
    params: Params,
    config: ModelConfig,
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
