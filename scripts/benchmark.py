"""Time this project on this machine: every contender in one process, taking turns, reported as ratios.

    python scripts/benchmark.py attention                      # backends against plain causal attention, and torch
    python scripts/benchmark.py attention --tokens 4096 --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128
"""  # fmt: skip

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pd_jax.cli import flag, parse, run


# --- taking turns
class Contender(NamedTuple):
    """`call()` returns when its result is there; `memory` is what it needs beside its inputs, in MB, if known."""

    call: Callable[[], Any]
    memory: float | None = None


def fastest(contenders: dict[str, Contender], repeat: int, on_cpu: bool) -> dict[str, float]:
    """Seconds of the fastest of `repeat` calls of each, one call of each at a time: a busy spell hits all alike.

    On a CPU the time of this process, not of the clock: other processes then cost little.
    """
    clock = time.process_time if on_cpu else time.perf_counter
    best: dict[str, float] = {}
    for turn in range(repeat + 1):
        for name, contender in contenders.items():
            start = clock()
            contender.call()
            if turn:  # the first call compiles
                best[name] = min(best.get(name, float("inf")), clock() - start)
    return best


def table(title: str, contenders: dict[str, Contender], seconds: dict[str, float], reference: str) -> None:
    print(f"\n{title}\n{'':28}{'ms':>10}{'x ' + reference:>22}{'MB':>10}")
    for name, contender in contenders.items():
        memory = "" if contender.memory is None else f"{contender.memory:.0f}"
        ratio = seconds[reference] / seconds[name]  # throughput: above 1 is faster than the reference
        print(f"{name:28}{1000 * seconds[name]:10.1f}{ratio:22.2f}{memory:>10}", flush=True)


def compiled(function: Callable, *arrays: Any) -> Contender:
    import jax

    program = jax.jit(function).lower(*arrays).compile()
    memory = program.memory_analysis().temp_size_in_bytes / 1e6
    return Contender(lambda: jax.block_until_ready(program(*arrays)), memory)


def one_core() -> None:
    """Keep this process on one core, before a library counts the cores it has."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"


def import_torch() -> Any:
    """torch on one thread, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    return torch


# --- attention
@dataclass(frozen=True)
class AttentionFlags:
    tokens: tuple[int, ...] = flag((1024, 4096), "row lengths to time")
    branches: int = flag(16, "branches of a row, one token of each in every column", minimum=1)
    batch: int = flag(1, "rows", minimum=1)
    heads: int = flag(8, "query heads", minimum=1)
    kv_heads: int = flag(4, "key and value heads", minimum=1)
    head_dim: int = flag(64, "dimensions of a head", minimum=2)
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: float32 on a CPU, bfloat16 elsewhere")
    backends: tuple[str, ...] = flag(
        ("dense", "chunked", "splash", "tokamax", "cudnn"), "those that cannot run are said"
    )
    repeat: int = flag(3, "calls of which the fastest counts", minimum=1)
    model: bool = flag(True, "on a CPU also time training a 29M model, forward and backward, against torch")


def grid(tokens: int, branches: int, batch: int) -> Any:
    """Coordinates of rows of `branches` equally long branches without a background; the last may be shorter."""
    from pd_jax.columns import Coordinates
    from pd_jax.layout import Branch, TokenSample, build_layout

    lengths = [tokens // branches + (b < tokens % branches) for b in range(branches)]
    sample = TokenSample([], [Branch([0] * length) for length in lengths if length])
    return Coordinates.of(build_layout([[sample]] * batch, objective="all"))


def attention(flags: AttentionFlags) -> None:
    import jax
    import jax.numpy as jnp

    from pd_jax.attention import make_attention

    on_cpu = jax.default_backend() == "cpu"
    dtype = {"auto": jnp.float32 if on_cpu else jnp.bfloat16}.get(flags.dtype) or jnp.dtype(flags.dtype)
    counts = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    print(
        f"attention on {jax.devices()[0].device_kind}, {jnp.dtype(dtype).name}: {flags.batch} rows, {flags.heads}/"
        f"{flags.kv_heads} heads of {flags.head_dim}, {flags.branches} branches"
    )
    for tokens in flags.tokens:
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(flags.batch, tokens, n, flags.head_dim) for n in counts]
        arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

        def make(attend: Callable, backward: bool, arrays: list) -> Contender:
            def both(q, k, v, cotangent):
                out, pullback = jax.vjp(attend, q, k, v)
                return out, pullback(cotangent)

            return compiled(both, *arrays) if backward else compiled(attend, *arrays[:3])

        columns = grid(tokens, flags.branches, flags.batch)
        causal = grid(tokens, 1, flags.batch)  # one branch: the column mask is the causal mask
        for backward in (False, True):
            plain = make_attention(causal)
            if jax.default_backend() == "gpu":
                plain = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
            contenders = {"causal": make(plain, backward, arrays)}
            for backend in flags.backends:
                try:
                    contenders[backend] = make(make_attention(columns, backend=backend), backward, arrays)
                except ValueError as error:
                    if not backward:
                        print(f"skipped: {error}")
            if on_cpu:
                contenders |= torch_attention(columns, arrays, backward)
            name = "forward and backward" if backward else "forward"
            table(f"{tokens} tokens, {name}", contenders, fastest(contenders, flags.repeat, on_cpu), "causal")
    if on_cpu and flags.model:
        training(flags.repeat)


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


def training(repeat: int) -> None:
    """Forward and backward of a 29M Qwen3 over 2 x 256 tokens, the same weights and loss in both libraries."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.checkpoint import load_config, load_params
    from pd_jax.columns import column_mask
    from pd_jax.loss import weighted_nll
    from pd_jax.model import forward, head

    torch = import_torch()
    if torch is None:
        print("\ntraining: torch is not installed, nothing to compare with")
        return
    import transformers

    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        config = load_config(Path(directory), pair_indices=())
        params = load_params(Path(directory), config)
    coordinates = grid(256, 16, 2)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, 2, 256))
    weights = jnp.ones((2, 256), jnp.float32) / 512

    def loss(backend: str, params, tokens, targets):
        hidden = forward(params, config, tokens, coordinates, backend=backend)
        return weighted_nll(hidden, head(params), targets, weights)

    mask = np.where(np.asarray(column_mask(coordinates, coordinates)), 0, np.finfo(np.float32).min)[:, None]
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask.astype(np.float32)),
        "position_ids": torch.tensor(np.asarray(coordinates.column, np.int64)),
        "use_cache": False,
    }
    labels = torch.tensor(targets).flatten()

    def torch_step() -> float:
        reference.zero_grad()
        nll = torch.nn.functional.cross_entropy(reference(**inputs).logits.flatten(0, 1).float(), labels)
        nll.backward()
        return nll.item()

    ours = float(jax.jit(partial(loss, "auto"))(params, tokens, targets))
    print(f"\nloss: {ours:.6f} here, {torch_step():.6f} in torch")
    contenders = {"torch": Contender(torch_step)}
    for backend in ("dense", "chunked"):
        contenders[backend] = compiled(jax.value_and_grad(partial(loss, backend)), params, tokens, targets)
    table("29M model, 2 x 256 tokens", contenders, fastest(contenders, repeat, on_cpu=True), "torch")


COMMANDS = {"attention": (AttentionFlags, attention)}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)} (each has --help)")
        return
    if name not in COMMANDS:
        raise ValueError(f"command {name!r} is not one of {', '.join(COMMANDS)}")
    flags, command = COMMANDS[name]
    parsed = parse(flags, sys.argv[2:], description=__doc__)
    one_core()
    command(parsed)


if __name__ == "__main__":
    run(main)
