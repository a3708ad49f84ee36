"""Column decoding against transformers: one by one, batched, and the matrices alone."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pd_jax.benchmarks.models import in_transformers, shape_of, tokens_only
from pd_jax.benchmarks.timing import Contender, Moment, compiled, fastest, import_torch
from pd_jax.cli import flag
from pd_jax.machines import memory_bandwidth, write_whole


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


@dataclass(kw_only=True)
class Measurement:
    """One contender at one size: a row of the table and of the .json file. None is what does not apply to it."""

    contender: str
    background: int  # tokens
    branches: int
    new_tokens: int  # of every branch
    seconds: float | None  # of a whole call
    prefill_ms: float | None  # until the first token
    column_ms: float | None  # of every column after it
    tokens_per_second: float | None  # of a whole call
    roofline: float | None  # the share of a column's time in which what it must read can be read
    megabytes: float | None  # that a call takes beyond what was held before it
    python_ms: float | None  # of the host, a block of columns
    growth: float | None = None  # column_ms over that of one branch
    x_one_by_one: float | None = None  # how many times as fast as transformers, whole calls
    x_batched: float | None = None
    x_batched_column: float | None = None  # likewise, a column


# Of the table: title, field, digits.
FIGURES = (
    ("s", "seconds", 2),
    ("prefill ms", "prefill_ms", 1),
    ("column ms", "column_ms", 2),
    ("t(n)/t(1)", "growth", 2),
    ("tokens/s", "tokens_per_second", 0),
    ("roofline", "roofline", 2),
    ("MB", "megabytes", 0),
    ("python ms", "python_ms", 2),
    ("x single", "x_one_by_one", 2),
    ("x batched", "x_batched", 2),
    ("x column", "x_batched_column", 2),
)
MATRICES, SINGLE, THEIRS, COPIES, COMPILED = (
    "matrices alone",
    "one by one",
    "transformers, one by one",
    "transformers, batched",
    "transformers, compiled",
)


def generator(model: Any, torch: Any, compile_: bool, cpu_time: bool) -> Callable[[list[list[int]], int], Moment]:
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
                first.append(Moment.now(cpu_time))
            return scores

        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, logits_processor=[watch], **settings
        )
        out.cpu()
        return first[0]

    return generate


def answer(decoder: Any, sample: Any, new: int, cpu_time: bool) -> Moment:
    """What `decoder.generate` does, text included; when the first column came."""
    import numpy as np

    steps = decoder.columns([sample], max_new_tokens=new)
    said = [next(steps).tokens]
    first = Moment.now(cpu_time)
    said += [columns.tokens for columns in steps]
    for ids in np.concatenate(said)[:, 0, : len(sample.branches)].T:
        decoder.tokenizer.decode(ids[ids >= 0].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return first


def weight_bytes(config: Any, weights: Any) -> int:
    """Bytes of the weights of decoding that every column reads."""
    import jax

    unread = 0 if config.tie_word_embeddings else weights["embed"].nbytes
    return sum(x.nbytes for x in jax.tree.leaves(weights)) - unread


def matrices(weights: Any, rows: int) -> Callable[[], Any]:
    """All matrices of a model times so many rows, and nothing else: a column cannot take less."""
    import jax.numpy as jnp

    from pd_jax.cpu import times
    from pd_jax.model import head
    from pd_jax.params import PROJECTIONS

    kernels = [layer[name] for layer in weights["layers"] for name in PROJECTIONS] + [head(weights)]
    x = jnp.ones((1, rows, max(kernel.shape[1] for kernel in kernels)), kernels[0].dtype)
    return compiled(lambda kernels, x: [times(x[..., : k.shape[1]], k) for k in kernels], kernels, x).call


def compare(rows: list[Measurement]) -> None:
    """Fill in how every measurement stands to one branch and to transformers."""
    found = {(row.background, row.new_tokens, row.branches, row.contender): row for row in rows}

    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over is not None and under else None

    for row in rows:
        size = row.background, row.new_tokens
        one = found.get((*size, 1, row.contender))
        row.growth = None if one is None else ratio(row.column_ms, one.column_ms)
        if (single := found.get((*size, row.branches, THEIRS))) is not None:
            row.x_one_by_one = ratio(single.seconds, row.seconds)
        if (batched := found.get((*size, row.branches, COPIES))) is not None:
            row.x_batched = ratio(batched.seconds, row.seconds)
            row.x_batched_column = ratio(batched.column_ms, row.column_ms)


def print_measurements(title: str, rows: list[Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for name in ("background", "branches", "new", "contender"):
        shown.add_column(name, justify="left" if name == "contender" else "right")
    for name, _, _ in FIGURES:
        shown.add_column(name, justify="right")
    for row in rows:
        figures = [(getattr(row, field), digits) for _, field, digits in FIGURES]
        cells = ["" if figure is None else f"{figure:.{digits}f}" for figure, digits in figures]
        shown.add_row(str(row.background), str(row.branches), str(row.new_tokens), row.contender, *cells)
    Console(width=None if sys.stdout.isatty() else 180).print(shown)


def time_decoding(flags: DecodeFlags) -> None:
    import jax
    import numpy as np

    from pd_jax.benchmarks.pictures import draw_decoding
    from pd_jax.decoding import BLOCK, ParallelDecoder, cache_bytes, unstack
    from pd_jax.layout import Branch, TokenSample
    from pd_jax.params import init_params

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    cpu_time = on_cpu and flags.threads == 1
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if on_cpu else "bfloat16"

    # --- the same weights, here and in transformers
    config, rng = shape_of(flags.model), np.random.default_rng(0)
    params = init_params(config, jax.random.key(0, impl="rbg"), dtype)
    torch: Any = import_torch(flags.threads) if flags.transformers else None
    theirs: dict[str, Callable] = {}
    if torch is not None:
        model = in_transformers(config, params, dtype, "cpu" if on_cpu else "cuda")
        theirs[COPIES] = generator(model, torch, False, cpu_time)
        if flags.compile:
            theirs[COMPILED] = generator(model, torch, True, cpu_time)
    weights = unstack(params, dtype)
    every_column = weight_bytes(config, weights)
    base = ParallelDecoder(config, weights, tokens_only(config.vocab_size), (), dtype=dtype)  # no end
    ours = {
        name: base.variant(visibility=name, align="ragged" if name == "isolated" else "left")
        for name in flags.visibility
    }
    # One by one takes n times what one branch takes; its fastest call, n times.
    single = {SINGLE: flags.visibility[-1]} | ({THEIRS: COPIES} if theirs else {})

    rows: list[Measurement] = []
    most, speed = max(flags.branches), memory_bandwidth(cpu_time=cpu_time)
    counts = sorted({1, *flags.branches})
    alone = {n: matrices(weights, n) for n in counts}
    for length in flags.background:
        # --- timing
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

        # --- what was measured
        for new in flags.new_tokens:
            for n in flags.branches:
                for name in (MATRICES, *ours, *single, *theirs):
                    key, times = ((single[name], 1), n) if name in single else ((name, n), 1)
                    if (*key, new) not in timings:
                        why = f"no memory, or no --patience {flags.patience}"
                        print(f"skipped: {name}, {n} branches over {length} tokens: {why}")
                        continue
                    timing = timings[*key, new]
                    whole = name != MATRICES  # calls, not columns only
                    seconds, column = times * timing.seconds, times * timing.rest / max(new - 1, 1)
                    read = times * every_column
                    if whole:  # and the cache, with half the answers
                        copies = 1 if name in ours else n
                        read += cache_bytes(
                            config,
                            samples=copies,
                            tokens=length,
                            branches=n // copies,
                            columns=flags.prompt + new // 2,
                            dtype=dtype,
                        )
                    blocks = math.ceil((new - 1) / BLOCK)  # the host looks at one at a time
                    measured = Measurement(
                        contender=name,
                        background=length,
                        branches=n,
                        new_tokens=new,
                        seconds=seconds if whole else None,
                        prefill_ms=1e3 * times * timing.first if whole else None,
                        column_ms=1e3 * column if new > 1 else None,
                        tokens_per_second=n * new / seconds if whole else None,
                        roofline=read / speed / column if new > 1 else None,
                        megabytes=timing.megabytes if whole else None,
                        python_ms=1e3 * timing.python / blocks if name in ours and new > 1 else None,
                    )
                    rows.append(measured)

    # --- the table, the file and the plot
    compare(rows)
    load, clock = os.getloadavg()[0], "process time" if cpu_time else "clock"
    print_measurements(
        f"{flags.model} {dtype} on {device.device_kind}, {flags.threads} threads ({clock}), load {load:.1f}, "
        f"{speed / 1e9:.1f} GB/s; x: times as fast, whole calls; python ms: of the host, a block of {BLOCK} columns",
        rows,
    )
    if flags.output is not None:
        about = {"model": flags.model, "dtype": dtype, "device": device.device_kind, "threads": flags.threads}
        about |= {"clock": clock, "load": load, "bandwidth": speed, "rows": [asdict(row) for row in rows]}
        write_whole(Path(flags.output), json.dumps(about, indent=2) + "\n")
        draw_decoding(about, Path(flags.output).with_suffix(".png"))
