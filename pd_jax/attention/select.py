"""Choosing an attention backend: one entry, `make_attention`, over backends that all equal `dense`."""

import functools
import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from pd_jax.attention import chunked, nvidia, splash
from pd_jax.attention.dense import dense_attention, sibling_scores
from pd_jax.columns import Coordinates, column_mask, sibling_mask
from pd_jax.config import Backend, RowVisibility, check_choice
from pd_jax.errors import InputError
from pd_jax.machines import wrong_backends
from pd_jax.mesh import compile_target

log = logging.getLogger(__name__)

FLASH = {"splash": splash.splash_attention, "tokamax": nvidia.tokamax_attention, "cudnn": nvidia.cudnn_attention}
TILE = 512  # tokens of a tile of `chunked`
CPU_TILE, CPU_LONG_TILE = 128, 256  # float32 scores that stay in the cache; XLA:CPU leaves products of 128 to one core


class Attention(Protocol):
    def __call__(self, q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        """q [B, T, N, H], k and v [B, S, K, H], sibling_bias [N] or None -> [B, T, N, H] in q's dtype."""
        ...


@dataclass(frozen=True)
class Call:
    """What decides whether a backend can serve; all of it is known before anything compiles."""

    platform: str  # "cpu", "gpu" or "tpu"
    device_kind: str
    visibility: str
    tokens: int
    head_dim: int
    dtype: Any
    sibling_bias: bool


def refusal(backend: str, call: Call) -> str | None:
    """Why `backend` cannot serve `call`; None when it can."""
    if backend in ("dense", "chunked"):
        return None
    platform = "tpu" if backend == "splash" else "gpu"
    if call.platform != platform:
        return f"it needs a {platform.upper()}, this is {call.platform}"
    if call.sibling_bias:
        return "it cannot add sibling_bias"
    if backend == "splash":
        if call.visibility != "columns":
            return f"it knows visibility 'columns' only, not {call.visibility!r}"
        if call.tokens % splash.LANES or call.tokens > splash.MAX_TOKENS:
            return f"{call.tokens} tokens are not a multiple of {splash.LANES} up to {splash.MAX_TOKENS}"
        return None
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {jnp.dtype(call.dtype).name}"
    if backend == "cudnn":
        if call.head_dim % 8 or call.head_dim > 128:
            return f"head_dim {call.head_dim} is not a multiple of 8 up to 128"
        return f"{call.tokens} tokens are not an even number" if call.tokens % 2 else None
    if not re.search(r"\bG?[HB]\d", call.device_kind):
        return f"it needs a Hopper or Blackwell data centre GPU, this is {call.device_kind}"
    if find_spec("tokamax") is None:
        return "the package tokamax is not installed"
    return f"{call.tokens} tokens are not a multiple of 128" if call.tokens % 128 else None


@functools.cache
def _announce(backend: str, refusals: tuple[str, ...], platform: str) -> None:
    """Say once which backend `auto` took; on an accelerator its own kernels should not have refused."""
    level = logging.INFO if platform == "cpu" or backend in FLASH else logging.WARNING
    why = f" ({'; '.join(refusals)})" if refusals else ""
    log.log(level, "attention: %s on %s%s", backend, platform, why)


def check_backend(backend: str, call: Call) -> None:
    """Raise `InputError` when `backend` was asked for and cannot serve `call`; `auto` always finds one."""
    reason = None if backend == "auto" else refusal(backend, call)
    if reason is not None:
        raise InputError(f"attention backend {backend!r} cannot run here: {reason}; use 'auto' or 'chunked'")


def _choose(backend: str, call: Call, order: tuple[str, ...], wrong: dict[str, str]) -> str:
    """The backend that serves `call`: for `auto` the first of `order` that is not `wrong`.

    Raises `InputError` when none can.
    """
    check_backend(backend, call)
    if backend != "auto":
        return backend
    reasons = []
    for name in order:
        reason = refusal(name, call) or wrong.get(name)
        if reason is None:
            _announce(name, tuple(reasons), call.platform)
            return name
        reasons.append(f"{name}: {reason}")
    raise InputError(f"no attention backend is right here: {'; '.join(reasons)}; force one with --attention")


def candidates(platform: str) -> tuple[str, ...]:
    """The kernels of a platform, the best first."""
    return {"tpu": ("splash",), "gpu": ("tokamax", "cudnn")}.get(platform, ())


def per_device(attend, q: Array, k: Array, v: Array, mask: Any) -> Array:
    """A kernel over the mesh of `jax.set_mesh`: rows over its batch axes, heads over `tensor`. Kernels cannot be
    partitioned by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, mask)
    rows = P(tuple(axis for axis in mesh.axis_names if axis != "tensor"))
    heads = P(*rows, None, "tensor" if "tensor" in mesh.axis_names else None)
    sharded = jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return sharded(q, k, v, mask)


def make_attention(
    coordinates: Coordinates, visibility: RowVisibility = "columns", backend: Backend = "auto"
) -> Attention:
    """Self-attention over laid-out rows with `coordinates` [B, T]; the mask is computed once for all layers.

    `auto` takes the platform's kernel where it can serve, else `chunked`, or `dense` for a row of one tile; never one
    that `scripts/doctor.py` found wrong here. Raises `InputError` for an unknown backend, and when called for one that
    cannot run. `dense` and `chunked` take tokens in any order; the kernels need the column-major order of
    `pd_jax.layout` and give NaN without it.
    """
    check_choice("visibility", visibility, RowVisibility)
    check_choice("attention backend", backend, Backend)
    platform, device_kind = compile_target()
    tokens = coordinates.column.shape[-1]
    tile = TILE if platform != "cpu" else CPU_TILE if tokens < 1024 else CPU_LONG_TILE
    anywhere = ("dense", "chunked") if tokens <= tile else ("chunked", "dense")
    wrong = wrong_backends(device_kind) if backend == "auto" else {}
    order = (*candidates(platform), *anywhere[: 1 + (anywhere[0] in wrong)])
    # The masks of all backends that a call may take are made here, outside the scan over the layers; under jit those
    # not taken are dropped.
    names = order if backend == "auto" else (backend,)
    masks: dict[str, Any] = {}
    if "dense" in names:
        masks["dense"] = column_mask(coordinates, coordinates, visibility)
        siblings = sibling_mask(coordinates, coordinates)
    if "chunked" in names:
        masks["chunked"] = chunked.make_mask(coordinates, tile)
    if "splash" in names and tokens % splash.LANES == 0:
        masks["splash"] = splash.make_mask(coordinates)
    if "tokamax" in names or "cudnn" in names:
        masks["tokamax"] = masks["cudnn"] = nvidia.make_mask(coordinates, visibility)

    def attend(q: Array, k: Array, v: Array, sibling_bias: Array | None = None) -> Array:
        call = Call(platform, device_kind, visibility, tokens, q.shape[-1], q.dtype, sibling_bias is not None)
        chosen = _choose(backend, call, order, wrong)
        if chosen == "dense":
            bias = None if sibling_bias is None else sibling_scores(siblings, sibling_bias)
            return dense_attention(q, k, v, masks["dense"], bias)
        if chosen == "chunked":
            return chunked.chunked_attention(q, k, v, masks["chunked"], visibility, sibling_bias)
        return per_device(FLASH[chosen], q, k, v, masks[chosen])

    return attend
