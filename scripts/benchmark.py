"""Time this project on this machine: every contender in one process, taking turns, reported as ratios.

    python scripts/benchmark.py attention                      # backends against plain causal attention, and torch
    python scripts/benchmark.py attention --tokens 4096 --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128
    python scripts/benchmark.py decode                         # columns against transformers, one by one and batched
    python scripts/benchmark.py decode --model Qwen/Qwen3-0.6B --threads 2 --background 128 1024 --output decode.json
"""  # fmt: skip

import ctypes
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pd_jax.cli import flag, parse, run
from pd_jax.config import Backend
from pd_jax.errors import InputError


# --- taking turns
class Contender(NamedTuple):
    """`call()` returns when its result is there, perhaps with the `Moment` of its first token.

    `memory` is what it needs beside its inputs, in MB, if known.
    `like`: the contender that took part of the same work before, and how many times its seconds are expected here.
    `compiles`: the first call says nothing about those after it.
    """

    call: Callable[[], Any]
    memory: float | None = None
    like: tuple[Any, float] | None = None
    compiles: bool = False


class Moment(NamedTuple):
    """Seconds of the clock, and of the main thread's CPU."""

    clock: float
    python: float

    @classmethod
    def now(cls, on_cpu: bool) -> "Moment":
        return cls((time.process_time if on_cpu else time.perf_counter)(), time.thread_time())


class Timing(NamedTuple):
    """The least of all calls: seconds in all, until the first token and after it, of the main thread's CPU after it.
    And the most MB that any call took beyond what was held before it."""

    seconds: float
    first: float
    rest: float
    python: float
    megabytes: float | None


class Peak:
    """MB beyond what was held before: of this process on Linux; elsewhere nothing is said."""

    def __enter__(self) -> "Peak":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
        self.before = self._held("VmRSS")
        if self.before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        return self

    def __exit__(self, *_: Any) -> None:
        after = self._held("VmHWM")
        self.megabytes = None if after is None or self.before is None else after - self.before

    @staticmethod
    def _held(field: str) -> float | None:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(field)), None)


def fastest(
    contenders: dict[Any, Contender], repeat: int, on_cpu: bool, patience: float = math.inf
) -> dict[Any, Timing]:
    """The fastest of `repeat` calls of each, one call of each at a time: a busy spell hits all alike.

    On one core of a CPU the time of this process, not of the clock: other processes then cost little. A call that would
    take a contender beyond `patience` seconds in all is not made; the first counts only where there is no other. What
    compiles is always called twice, and compiling costs no patience.
    """
    best: dict[Any, Timing] = {}
    spent: dict[Any, float] = {}
    for turn in range(repeat + 1):
        for name, contender in contenders.items():
            like, times = (name, 1.0) if turn else contender.like or (None, 0.0)
            expected = 0.0
            if like is not None:
                expected = best[like].seconds * times if like in best else math.inf  # one that was skipped
            compiled_before = turn == 1 and contender.compiles and name in best
            if spent.get(name, 0.0) + expected > patience and not compiled_before:
                continue
            with Peak() as peak:
                start = Moment.now(on_cpu)
                first = contender.call()
                end = Moment.now(on_cpu)
            first = first if isinstance(first, Moment) else start
            timing = Timing(
                end.clock - start.clock,
                first.clock - start.clock,
                end.clock - first.clock,
                end.python - first.python,
                peak.megabytes,
            )
            if turn or not contender.compiles:
                spent[name] = spent.get(name, 0.0) + timing.seconds
            old = best.get(name)
            if old is not None and turn > 1:
                most = max((m for m in (old.megabytes, timing.megabytes) if m is not None), default=None)
                timing = Timing(*map(min, timing[:4], old[:4]), most)
            best[name] = timing
    return best


def table(title: str, contenders: dict[str, Contender], timings: dict[str, Timing], reference: str) -> None:
    print(f"\n{title}\n{'':28}{'ms':>10}{'x ' + reference:>22}{'MB':>10}")
    for name, contender in contenders.items():
        memory = "" if contender.memory is None else f"{contender.memory:.0f}"
        seconds = timings[name].seconds
        ratio = timings[reference].seconds / seconds  # throughput: above 1 is faster than the reference
        print(f"{name:28}{1000 * seconds:10.1f}{ratio:22.2f}{memory:>10}", flush=True)


def compiled(function: Callable, *arrays: Any) -> Contender:
    import jax

    program = jax.jit(function).lower(*arrays).compile()
    analysis: Any = program.memory_analysis()
    memory = analysis.temp_size_in_bytes / 1e6
    return Contender(lambda: jax.block_until_ready(program(*arrays)), memory)


def keep_to(cores: int) -> None:
    """Keep this process on so many cores, before a library counts those it has."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["OMP_NUM_THREADS"] = str(cores)


def import_torch(threads: int = 1) -> Any:
    """torch on so many threads, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch


# --- models
def shape_of(model: str) -> Any:
    """A `ModelConfig` that transformers can compute too: a Qwen3's by its hub id, or "29m"."""
    from pd_jax.config import ModelConfig, known_config

    if model != "29m":
        return replace(known_config(model), pair_indices=())
    return ModelConfig(8192, 512, 1536, 8, 8, 4, 64, 1e6, tie_word_embeddings=True, pair_indices=())


def in_transformers(config: Any, params: Any, dtype: str, device: str) -> Any:
    """The same weights as a transformers model."""
    import transformers

    from pd_jax.files import write_params

    with tempfile.TemporaryDirectory() as directory:
        write_params(Path(directory), params, config)
        Path(directory, "config.json").write_text(json.dumps(config.to_hf()))
        transformers.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)


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
    backends: tuple[Backend, ...] = flag(
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
                except InputError as error:
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

    from pd_jax.columns import column_mask
    from pd_jax.loss import weighted_nll
    from pd_jax.model import forward, head
    from pd_jax.params import init_params

    torch = import_torch()
    if torch is None:
        print("\ntraining: torch is not installed, nothing to compare with")
        return
    config = shape_of("29m")
    params = init_params(config, jax.random.key(0, impl="rbg"))
    reference = in_transformers(config, params, "float32", "cpu")
    coordinates = grid(256, 16, 2)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, 2, 256))
    weights = jnp.ones((2, 256), jnp.float32) / 512

    def loss(backend: Backend, params, tokens, targets):
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


# --- decode
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


def tokens_only(vocabulary: int) -> Any:
    """A tokenizer of as many words as the model has rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")))


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
    """What `decoder.generate` does; when the first column came."""
    from pd_jax import SamplingParams
    from pd_jax.decoding.steps import BLOCK

    steps = decoder._run([sample], SamplingParams(max_new_tokens=new), BLOCK)
    (transcripts,) = next(steps)
    first = Moment.now(on_cpu)
    for _ in steps:
        continue
    for transcript in transcripts:
        transcript.result()
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


def decode(flags: DecodeFlags) -> None:
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from pd_jax import ParallelDecoder
    from pd_jax.decoding.steps import BLOCK, cache_bytes, unstack
    from pd_jax.evaluation.pictures import draw_decoding
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
        f"{speed / 1e9:.1f} GB/s; x: times as fast, whole calls; python ms: of the host, a block of {BLOCK} columns",
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


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "attention": (AttentionFlags, attention),
    "decode": (DecodeFlags, decode),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)} (each has --help)")
        return
    if name not in COMMANDS:
        raise InputError(f"command {name!r} is not one of {', '.join(COMMANDS)}")
    flags, command = COMMANDS[name]
    parsed = parse(flags, sys.argv[2:], description=__doc__)
    keep_to(getattr(parsed, "threads", 1))
    command(parsed)


if __name__ == "__main__":
    run(main)
