"""Column decoding against transformers: one by one, batched, and the matrices alone."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pd_jax.benchmarks.models import in_transformers, shape_of, tokens_only
from pd_jax.benchmarks.timing import Contender, Moment, compiled, fastest, import_torch
from pd_jax.cli import flag


@dataclass(frozen=True)
class DecodeFlags:
    model: str = flag("29m", "shape of the random weights: 29m or a hub id like Qwen/Qwen3-0.6B")
    branches: tuple[int, ...] = flag((1, 4, 16, 64), "branches over one background")
    background: tuple[int, ...] = flag((128, 1024), "tokens of the background")
    prompt: int = flag(16, "tokens of every branch's prompt", minimum=1)
    new_tokens: tuple[int, ...] = flag((32,), "tokens that every branch answers; no branch ends earlier")
    visibility: tuple[Literal["columns", "isolated", "prompts"], ...] = flag(
        ("columns", "isolated"), "what of this project is timed; isolated is decoded without waiting"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: float32 on a CPU, bfloat16 elsewhere")
    transformers: bool = flag(True, "compare with transformers.generate where torch is installed")
    compile: bool = flag(False, "also its static cache with torch.compile, which takes a CPU minutes to compile")
    threads: int = flag(1, "on a CPU: 1 counts the process's own time, more the clock's", minimum=1)
    repeat: int = flag(3, "calls of which the fastest counts", minimum=1)
    patience: float = flag(
        120.0, "seconds for all calls of a contender, but for compiling; what is expected to take longer is skipped"
    )
    output: str | None = flag(None, "also write what was measured to this .json file, and a plot beside it")


MATRICES, SINGLE, THEIRS, COPIES, COMPILED = (
    "matrices alone",
    "one by one",
    "transformers, one by one",
    "transformers, batched",
    "transformers, compiled",
)


def bandwidth(on_cpu: bool) -> float:
    """Bytes a second that a matrix of 256 MB is read with, multiplied with a vector as a layer's weights are."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((8192, 8192), jnp.float32), jnp.ones((1, 8192), jnp.float32)
    product = compiled(lambda matrix, vector: jnp.einsum("ni,oi->no", vector, matrix), matrix, vector)
    total = compiled(jnp.sum, matrix)
    jax.block_until_ready(matrix)
    timings = fastest({"product": product, "sum": total}, 5, on_cpu)
    return matrix.nbytes / min(timing.seconds for timing in timings.values())


def generator(model: Any, torch: Any, compile_: bool, on_cpu: bool) -> Callable[[list[list[int]], int], Moment]:
    """transformers.generate over equally long rows: greedy, to the last token asked for; when the first one came."""
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compile_:
        from transformers import CompileConfig

        how = CompileConfig(mode="default", fullgraph=False)
        how._compile_all_devices = True  # a CPU too
        settings |= {"cache_implementation": "static", "compile_config": how}

    def generate(ids: list[list[int]], new: int) -> Moment:
        given, first = torch.tensor(ids, device=model.device), []

        def watch(_: Any, scores: Any) -> Any:
            if not first:
                if scores.is_cuda:
                    torch.cuda.synchronize()
                first.append(Moment.now(on_cpu))
            return scores

        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, logits_processor=[watch], **settings
        )
        out.cpu()
        return first[0]

    return generate


def answer(decoder: Any, sample: Any, new: int, on_cpu: bool) -> Moment:
    """What `decoder.generate` does, but for the text; when the first column came."""
    steps = decoder.columns([sample], max_new_tokens=new)
    next(steps)
    first = Moment.now(on_cpu)
    for _ in steps:
        continue
    return first


def matrices(weights: Any, rows: int) -> Callable[[], Any]:
    """All matrices of a model times so many rows, and nothing else: a column cannot take less."""
    import jax.numpy as jnp

    from pd_jax.cpu import times
    from pd_jax.model import head
    from pd_jax.params import PROJECTIONS

    kernels = [layer[name] for layer in weights["layers"] for name in PROJECTIONS] + [head(weights)]
    x = jnp.ones((1, rows, max(kernel.shape[1] for kernel in kernels)), kernels[0].dtype)
    return compiled(lambda kernels, x: [times(x[..., : k.shape[1]], k) for k in kernels], kernels, x).call


def time_decoding(flags: DecodeFlags) -> None:
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from pd_jax import ParallelDecoder
    from pd_jax.benchmarks.pictures import draw_decoding
    from pd_jax.decoding import BLOCK, cache_bytes, unstack
    from pd_jax.layout import Branch, TokenSample
    from pd_jax.params import init_params

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    cpu_time = on_cpu and flags.threads == 1
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    config, rng = shape_of(flags.model), np.random.default_rng(0)
    params = init_params(config, jax.random.key(0, impl="rbg"), dtype)
    torch: Any = import_torch(flags.threads) if flags.transformers else None
    theirs: dict[str, Callable] = {}
    if torch is not None:
        model = in_transformers(config, params, dtype, "cpu" if on_cpu else "cuda")
        theirs = {COPIES: generator(model, torch, False, cpu_time)} | (
            {COMPILED: generator(model, torch, True, cpu_time)} if flags.compile else {}
        )
    weights = unstack(params, dtype)
    never = (config.vocab_size,)
    tokenizer = tokens_only(config.vocab_size)
    ours = {}
    for name in flags.visibility:
        align = "ragged" if name == "isolated" else "left"
        ours[name] = ParallelDecoder(config, weights, tokenizer, never, dtype=dtype, visibility=name, align=align)
    # One by one takes n times what one branch takes; its fastest call, n times.
    single = {SINGLE: flags.visibility[-1]} | ({THEIRS: COPIES} if theirs else {})

    rows: list[dict[str, Any]] = []
    most, speed = max(flags.branches), bandwidth(cpu_time)
    counts = sorted({1, *flags.branches})
    alone = {n: matrices(weights, n) for n in counts}
    for length in flags.background:
        background = rng.integers(config.vocab_size, size=length).tolist()
        prompts = rng.integers(config.vocab_size, size=(most, flags.prompt)).tolist()
        contenders: dict[tuple[str, int, int], Contender] = {}
        for new in flags.new_tokens:
            for n in counts:
                contenders[MATRICES, n, new] = Contender(lambda n=n, new=new: [alone[n]() for _ in range(new - 1)])
                sample = TokenSample(background, [Branch(ids) for ids in prompts[:n]])
                for name, decoder in ours.items():
                    call = partial(answer, decoder, sample, new, cpu_time)
                    contenders[name, n, new] = Contender(call, compiles=True)
                for name, generate in theirs.items():
                    call = partial(generate, [background + ids for ids in prompts[:n]], new)
                    before = counts[counts.index(n) - 1]
                    like = None if n == 1 else ((name, before, new), n / before)
                    compiles = name == COMPILED
                    if compiles:
                        like = (COPIES, n, new), 1.0
                    contenders[name, n, new] = Contender(call, like=like, compiles=compiles)
        timings = fastest(contenders, flags.repeat, cpu_time, flags.patience)
        for new in flags.new_tokens:
            for n in flags.branches:
                for name in (MATRICES, *ours, *single, *theirs):
                    key, times = ((single[name], 1), n) if name in single else ((name, n), 1)
                    if (*key, new) not in timings:
                        print(f"skipped: {name}, {n} branches over {length} tokens: beyond --patience {flags.patience}")
                        continue
                    timing = timings[*key, new]
                    column = times * timing.rest / max(new - 1, 1)
                    # Read in every column: all weights but an embedding that is not the head, and half the answers.
                    copies = 1 if name in ours else n
                    read = sum(x.nbytes for x in jax.tree.leaves(weights)) * times
                    read -= 0 if config.tie_word_embeddings else weights["embed"].nbytes * times
                    if name != MATRICES:
                        read += cache_bytes(config, copies, length, n // copies, flags.prompt + new // 2, dtype)
                    host = None
                    if name in ours and new > 1:  # the host looks at a block at a time
                        host = 1e3 * timing.python / math.ceil((new - 1) / BLOCK)
                    row: dict[str, Any] = {"contender": name, "background": length, "branches": n, "new_tokens": new}
                    row |= {
                        "seconds": times * timing.seconds,
                        "prefill_ms": 1e3 * times * timing.first,
                        "column_ms": 1e3 * column if new > 1 else None,
                        "tokens_per_second": n * new / (times * timing.seconds),
                        "roofline": read / speed / column if new > 1 else None,
                        "megabytes": timing.megabytes,
                        "python_ms": host,
                    }
                    if name == MATRICES:
                        row |= dict.fromkeys(("seconds", "prefill_ms", "tokens_per_second", "megabytes"))
                    rows.append(row)
    found = {(r["background"], r["new_tokens"], r["branches"], r["contender"]): r for r in rows}
    load = os.getloadavg()[0]
    clock = "process time" if cpu_time else "clock"
    about = {"model": flags.model, "dtype": dtype, "device": device.device_kind, "threads": flags.threads}
    about |= {"clock": clock, "load": load, "bandwidth": speed, "rows": rows}
    grid = Table(
        title=f"{flags.model} {dtype} on {device.device_kind}, {flags.threads} threads ({clock}), load {load:.1f}, "
        f"{speed / 1e9:.1f} GB/s; x: times as fast, whole calls; python ms: of the host, a block of {BLOCK} columns"
    )
    heads = (
        "background branches new contender s prefill_ms column_ms t(n)/t(1) tokens/s roofline MB python_ms x_single "
        "x_batched x_column"
    )
    for text in heads.split():
        grid.add_column(text.replace("_", " "), justify="left" if text == "contender" else "right")
    for row in rows:
        case = row["background"], row["new_tokens"]
        one = found.get((*case, 1, row["contender"]))
        row["growth"] = row["column_ms"] / one["column_ms"] if one is not None and row["column_ms"] else None
        for name, other, field in (
            ("x_one_by_one", THEIRS, "seconds"),
            ("x_batched", COPIES, "seconds"),
            ("x_batched_column", COPIES, "column_ms"),
        ):
            against = found.get((*case, row["branches"], other))
            row[name] = None if against is None or row[field] is None else against[field] / row[field]
        shown = [row["seconds"], row["prefill_ms"], row["column_ms"], row["growth"], row["tokens_per_second"]]
        shown += [row["roofline"], row["megabytes"], row["python_ms"]]
        shown += [row["x_one_by_one"], row["x_batched"], row["x_batched_column"]]
        digits = (2, 1, 2, 2, 0, 2, 0, 2, 2, 2, 2)
        cells = ["" if x is None else f"{x:.{d}f}" for x, d in zip(shown, digits, strict=True)]
        grid.add_row(*map(str, (*case[:1], row["branches"], case[1])), row["contender"], *cells)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(grid)
    if flags.output is not None:
        Path(flags.output).write_text(json.dumps(about, indent=2) + "\n")
        draw_decoding(about, Path(flags.output).with_suffix(".png"))
