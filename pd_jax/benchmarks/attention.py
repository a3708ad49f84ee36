"""Attention backends against plain causal attention and torch, forward and backward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pd_jax.benchmarks.models import equal_branches
from pd_jax.benchmarks.timing import Contender, compiled, fastest, import_torch, table
from pd_jax.benchmarks.training import TrainFlags, time_training
from pd_jax.cli import flag
from pd_jax.config import Backend
from pd_jax.errors import InputError


@dataclass(frozen=True)
class AttentionFlags:
    tokens: tuple[int, ...] = flag((1024, 4096), "row lengths to time")
    branches: int = flag(16, "branches of a row, one token of each in every column", minimum=1)
    batch: int = flag(1, "rows", minimum=1)
    heads: int = flag(8, "query heads", minimum=1)
    kv_heads: int = flag(4, "key and value heads", minimum=1)
    head_dim: int = flag(64, "dimensions of a head", minimum=2)
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: float32 on a CPU, bfloat16 elsewhere")
    backends: tuple[Backend, ...] = flag(
        ("dense", "chunked", "splash", "tokamax", "cudnn"), "those that cannot run are said"
    )
    repeat: int = flag(3, "calls of which the fastest counts", minimum=1)
    model: bool = flag(True, "on a CPU also time training steps of a 29M model, as `train` does")


def time_attention(flags: AttentionFlags) -> None:
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    dtype = {"auto": jnp.float32 if on_cpu else jnp.bfloat16}.get(flags.dtype) or jnp.dtype(flags.dtype)
    print(
        f"attention on {jax.devices()[0].device_kind}, {jnp.dtype(dtype).name}: {flags.batch} rows, {flags.heads}/"
        f"{flags.kv_heads} heads of {flags.head_dim}, {flags.branches} branches"
    )
    said: set[str] = set()
    for tokens in flags.tokens:
        for backward in (False, True):
            contenders, skipped = side_by_side(flags, tokens, dtype, backward)
            for reason in sorted({*skipped} - said):
                print(f"skipped: {reason}")
            said.update(skipped)
            name = "forward and backward" if backward else "forward"
            table(f"{tokens} tokens, {name}", contenders, fastest(contenders, flags.repeat, on_cpu), "causal")
    if on_cpu and flags.model:
        time_training(TrainFlags(attention=("dense", "chunked"), targets=(1.0, 0.0625), repeat=flags.repeat))


def side_by_side(
    flags: AttentionFlags, tokens: int, dtype: Any, backward: bool, torch: bool = True
) -> tuple[dict[str, Contender], list[str]]:
    """Plain causal attention, the backends of `flags`, and on a CPU torch; and why backends are not among them."""
    import jax

    from pd_jax.attention import make_attention

    keys = jax.random.split(jax.random.key(0), 4)
    counts = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    shapes = [(flags.batch, tokens, n, flags.head_dim) for n in counts]
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    def make(attend: Callable) -> Contender:
        def both(q, k, v, cotangent):
            out, pullback = jax.vjp(attend, q, k, v)
            return out, pullback(cotangent)

        return compiled(both, *arrays) if backward else compiled(attend, *arrays[:3])

    columns = equal_branches(tokens, flags.branches, flags.batch)
    causal = make_attention(equal_branches(tokens, 1, flags.batch))  # one branch: the mask is the causal mask
    if jax.default_backend() == "gpu":
        causal = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contenders, skipped = {"causal": make(causal)}, []
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    for backend in flags.backends:
        try:
            contender = make(make_attention(columns, backend=backend))
        except InputError as error:
            skipped.append(str(error))
            continue
        if 1e6 * (contender.memory or 0) > room:
            skipped.append(
                f"{backend}: {tokens} tokens take {contender.memory:.0f} MB, the device has {room / 1e6:.0f}"
            )
            continue
        contenders[backend] = contender
    if torch and jax.default_backend() == "cpu":
        contenders |= torch_attention(columns, arrays, backward)
    return contenders, skipped


def torch_attention(coordinates: Any, arrays: list, backward: bool) -> dict[str, Contender]:
    """torch's fused attention with the mask as a matrix, and causal."""
    import numpy as np

    from pd_jax.columns import column_mask

    torch = import_torch()
    if torch is None:
        return {}
    q, k, v, cotangent = (
        torch.tensor(np.asarray(x, np.float32)).transpose(1, 2).contiguous().requires_grad_(i < 3)
        for i, x in enumerate(arrays)
    )
    mask = np.where(np.asarray(column_mask(coordinates, coordinates)), 0, np.finfo(np.float32).min)[:, None]
    mask = torch.tensor(mask.astype(np.float32))

    def call(**how: Any) -> None:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
            if backward:
                torch.autograd.grad(out, (q, k, v), cotangent)

    return {
        "torch, mask": Contender(partial(call, attn_mask=mask)),
        "torch, causal": Contender(partial(call, is_causal=True)),
    }
