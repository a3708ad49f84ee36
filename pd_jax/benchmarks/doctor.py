"""Does it work on this machine? What can be wrong is compared, what can be slow is timed: one table, one file.

The file lies in the user's cache directory (`pd_jax.machines.report_path`): what it calls wrong, `auto` attention does
not take again on such a device, and what it measured stands beside the data sheet's figures.
"""

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pd_jax.benchmarks.attention import AttentionFlags, side_by_side
from pd_jax.benchmarks.checks import CASES, attention_errors, decoding_errors, reference_device, step_errors, wrong
from pd_jax.benchmarks.decoding import answer, weight_bytes
from pd_jax.benchmarks.models import shape_of, tokens_only
from pd_jax.benchmarks.timing import Contender, fastest
from pd_jax.cli import flag
from pd_jax.config import Align, Backend, Dtype
from pd_jax.errors import InputError
from pd_jax.machines import data_sheet, least_seconds, matrix_flops, memory_bandwidth, report_path, write_whole

Verdict = Literal["ok", "slow", "WRONG"]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "torch", "tokamax", "libtpu")
PACKAGES += ("jax-cuda13-plugin", "jax-cuda12-plugin")
BACKENDS: tuple[Backend, ...] = get_args(Backend)[1:]  # without "auto"
# Below these shares it is called slow: of a data sheet's figure; of plain causal attention; of the byte roofline.
SHEET_SHARE, CAUSAL_SHARE = 0.6, 0.5
ROOFLINE_SHARE = {"cpu": 0.15}  # a CPU's columns are bound by its arithmetic too
ROOFLINE = 0.5
SLOW_DISK = 50e6  # bytes/s


@dataclass(frozen=True)
class DoctorFlags:
    quick: bool = flag(False, "fewer and smaller checks; on a CPU without the training step and the speed of attention")
    model: str = flag("auto", "shape of the decoded columns: 29m or a hub id; auto: 29m on a CPU, Qwen/Qwen3-0.6B else")
    branches: int = flag(16, "branches of a decoded column", minimum=1)
    background: int = flag(1024, "tokens in front of it", minimum=0)
    directory: str = flag(".", "where a checkpoint is written, read and removed again")
    output: str | None = flag(None, "also write the report to this .json file")


class Finding(NamedTuple):
    """A row of the table."""

    part: str
    what: str
    figure: str
    verdict: Verdict = "ok"
    wrong_backend: Backend | None = None


class Ward(NamedTuple):
    """What all parts need to know."""

    flags: DoctorFlags
    device: Any
    on_cpu: bool
    tokens: int  # of the rows of checks: several tiles of `chunked`, a multiple of what kernels need
    head_dim: int
    dtypes: tuple[Dtype, ...]
    figures: dict[str, float]  # what is measured, by the fields of `Machine`


def examine(flags: DoctorFlags) -> bool:
    """Run all parts, print the table, write the report; whether nothing was wrong."""
    import jax
    from rich.console import Console
    from rich.table import Table

    if not Path(flags.directory).is_dir():
        raise InputError(f"--directory {flags.directory} is not a directory")
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    sizes: tuple[int, int] = (384, 16) if on_cpu else (1152, 128)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    if flags.quick:
        dtypes = dtypes[:1] if on_cpu else dtypes[1:]
    ward = Ward(flags, device, on_cpu, *sizes, dtypes, {})
    report: dict[str, Any] = {
        "device": device.device_kind,
        "devices": [str(d) for d in jax.local_devices()],
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": dict(_versions()),
        "quick": flags.quick,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    print("\n".join(f"{name}: {value}" for name, value in report.items() if name != "quick"), flush=True)
    findings: list[Finding] = []
    path = report_path(device.device_kind)
    for name, part in PARTS.items():
        began = time.perf_counter()
        findings += outcome(name, part, ward)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        # From the checks of attention on, `auto` knows.
        report["wrong_backends"] = sorted({f.wrong_backend for f in findings if f.wrong_backend})
        if name == "attention":
            write_whole(path, _text(report))
    report |= {"figures": ward.figures, "findings": [finding._asdict() for finding in findings]}
    for file in {path, Path(flags.output or path)}:
        write_whole(file, _text(report))

    table = Table(title=f"pd_jax on {device.device_kind}")
    for name in ("part", "what", "figure", "verdict"):
        table.add_column(name)
    for finding in findings:
        colour = {"ok": "green", "slow": "yellow", "WRONG": "bold red"}[finding.verdict]
        table.add_row(*finding[:3], f"[{colour}]{finding.verdict}[/]")
    Console(width=None if Console().is_terminal else 140).print(table)
    count = sum(finding.verdict == "WRONG" for finding in findings)
    print(f"{count or 'nothing'} WRONG; the report, to be attached to a bug report, is {flags.output or path}")
    if report["wrong_backends"]:
        print(f"attention 'auto' passes over {', '.join(report['wrong_backends'])} here from now on")
    return count == 0


def outcome(name: str, part: Callable[[Ward], Iterator[Finding]], ward: Ward) -> list[Finding]:
    """The findings of a part; one that breaks off is wrong."""
    findings = []
    try:
        for finding in part(ward):
            findings.append(finding)
    except Exception as error:
        findings.append(Finding(name, "breaks off", _first_line(error), "WRONG"))
    return findings


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _text(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2) + "\n"


def _errors(errors: dict[str, float]) -> str:
    return "error " + ", ".join(f"{name} {error:.0e}" for name, error in errors.items())


# ---------------------------------------------------------------- the parts


def speed(ward: Ward) -> Iterator[Finding]:
    """Matrix products and memory, beside the data sheet."""
    quick, on_cpu = ward.flags.quick, ward.on_cpu
    size = (1024 if quick else 2048) if on_cpu else (4096 if quick else 8192)
    dtype = "float32" if on_cpu else "bfloat16"
    bandwidth = memory_bandwidth((128 << 20) if on_cpu and quick else (256 << 20) if on_cpu else 1 << 30)
    ward.figures.update(flops=matrix_flops(size, dtype), bandwidth=bandwidth)
    sheet = data_sheet(ward.device.device_kind)
    for name, what, scale, unit in (
        ("flops", f"{dtype} product, {size} x {size}", 1e12, "TFLOP/s"),
        ("bandwidth", "memory read", 1e9, "GB/s"),
    ):
        value, promised = ward.figures[name], getattr(sheet, name, 0)
        beside = f", {value / promised:.0%} of the data sheet" if promised else ""
        slow = bool(promised) and value < SHEET_SHARE * promised
        yield Finding("speed", what, f"{value / scale:.3g} {unit}{beside}", "slow" if slow else "ok")


def links(ward: Ward) -> Iterator[Finding]:
    """The sum over all devices of this process: whether it is right, and the rate at which each sends its part."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    devices = jax.local_devices()
    n, width = len(devices), (1 << 20) if ward.on_cpu else (64 << 20)
    if n == 1:
        yield Finding("links", "1 device", "nothing to talk to")
        return
    mesh = Mesh(np.array(devices), ("all",))
    mine = jnp.arange(1, n + 1, dtype=jnp.float32)[:, None] * jnp.ones((1, width), jnp.float32)
    mine = jax.device_put(mine, NamedSharding(mesh, P("all")))
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P()))
    right = bool(jnp.all(total(mine) == n * (n + 1) / 2))
    seconds = least_seconds(lambda: total(mine), 5)
    ward.figures["link"] = 2 * (n - 1) / n * 4 * width / seconds
    figure = f"{ward.figures['link'] / 1e9:.3g} GB/s sent by each"
    yield Finding("links", f"a sum over {n} devices", figure, "ok" if right else "WRONG")


def attention(ward: Ward) -> Iterator[Finding]:
    """Every backend that can run here against `dense` in float32."""
    cases = tuple(CASES)
    if ward.flags.quick:
        cases = cases[-1:] if ward.on_cpu else ("columns", "sibling_bias")  # a CPU compiles for seconds
    for backend in BACKENDS:
        if backend == "dense" and ward.on_cpu:
            continue  # the reference itself
        for case in cases:
            for dtype in ward.dtypes:
                what = f"{backend}: {case}, {dtype}"
                try:
                    errors = attention_errors(backend, case, dtype, ward.tokens, ward.head_dim)
                except InputError:
                    continue  # it cannot serve this, and says so when it is asked for
                except Exception as error:
                    yield Finding("attention", what, _first_line(error), "WRONG", backend)
                    continue
                bad = wrong(errors, dtype)
                yield Finding("attention", what, _errors(errors), *(("WRONG", backend) if bad else ()))


def attention_speed(ward: Ward) -> Iterator[Finding]:
    """Forward and backward of every backend beside plain causal attention."""
    quick = ward.flags.quick
    if quick and ward.on_cpu:
        return
    tokens = 2048 if quick or ward.on_cpu else 4096
    shape = AttentionFlags(heads=4, kv_heads=2, backends=BACKENDS[quick:], branches=16)  # not dense
    if not ward.on_cpu:
        shape = replace(shape, heads=32, kv_heads=8, head_dim=128)
    dtype = "float32" if ward.on_cpu else "bfloat16"
    contenders, skipped = side_by_side(shape, tokens, dtype, backward=True, torch=False)
    timings = fastest(contenders, 2 if quick else 5, False)
    for name in contenders:
        ratio = timings["causal"].seconds / timings[name].seconds
        figure = f"{1e3 * timings[name].seconds:.1f} ms"
        figure += "" if name == "causal" else f", {ratio:.2f} x as fast as causal"
        yield Finding(
            "attention", f"{name}: {tokens} tokens, {dtype}", figure, "slow" if ratio < CAUSAL_SHARE else "ok"
        )
    for reason in skipped:
        yield Finding("attention", "left out", reason.partition(";")[0])


def decoding(ward: Ward) -> Iterator[Finding]:
    """Logits column by column against one forward over the finished row."""
    cases: tuple[tuple[str, Align], ...] = (("columns", "left"), ("isolated", "ragged"), ("sibling_bias", "right"))
    for case, align in cases[-1:] if ward.flags.quick and ward.on_cpu else cases[::2] if ward.flags.quick else cases:
        for dtype in ward.dtypes:
            errors = decoding_errors(case, align, dtype, ward.tokens, ward.head_dim)
            what = f"columns against one forward: {case}, {align}, {dtype}"
            yield Finding("decoding", what, _errors(errors), "WRONG" if wrong(errors, dtype) else "ok")


def step(ward: Ward) -> Iterator[Finding]:
    """A training step against the same one on the CPU."""
    if ward.flags.quick and ward.on_cpu:
        return
    reference = reference_device().platform
    for case in ("columns", "sibling_bias")[ward.flags.quick or ward.on_cpu :]:
        for dtype in ward.dtypes:
            errors = step_errors(case, dtype, ward.tokens, ward.head_dim)
            what = f"one step against float32 on {reference}: {case}, {dtype}"
            yield Finding("training", what, _errors(errors), "WRONG" if wrong(errors, dtype) else "ok")


def column(ward: Ward) -> Iterator[Finding]:
    """The share of a decoded column's time in which its weights and cache can be read."""
    import jax
    import numpy as np

    from pd_jax.decoding import ParallelDecoder, cache_bytes
    from pd_jax.layout import Branch, TokenSample
    from pd_jax.params import init_params

    flags, dtype = ward.flags, "float32" if ward.on_cpu else "bfloat16"
    config = shape_of(flags.model if flags.model != "auto" else "29m" if ward.on_cpu else "Qwen/Qwen3-0.6B")
    n, background = flags.branches, flags.background
    if flags.quick:
        config, background = replace(config, num_hidden_layers=2), min(background, 128)
    params = init_params(config, jax.random.key(0, impl="rbg"), dtype)
    decoder = ParallelDecoder(config, params, tokens_only(config.vocab_size), (), dtype=dtype)  # no end
    rng, new = np.random.default_rng(0), 33  # the first token, and a block of columns
    prompts = [Branch(rng.integers(config.vocab_size, size=16).tolist()) for _ in range(n)]
    sample = TokenSample(rng.integers(config.vocab_size, size=background).tolist(), prompts)
    call = Contender(lambda: answer(decoder, sample, new, False), compiles=True)
    seconds = fastest({"": call}, 3, False)[""].rest / (new - 1)
    read = weight_bytes(config, decoder.weights)
    read += cache_bytes(config, samples=1, tokens=background, branches=n, columns=16 + new // 2, dtype=dtype)
    share = read / ward.figures["bandwidth"] / seconds
    what = f"{config.num_hidden_layers} layers of {config.hidden_size}, {n} branches over {background} tokens"
    figure = f"{1e3 * seconds:.2f} ms a column, {share:.0%} of the byte roofline"
    yield Finding(
        "decoding", what, figure, "slow" if share < ROOFLINE_SHARE.get(ward.device.platform, ROOFLINE) else "ok"
    )


def disk(ward: Ward) -> Iterator[Finding]:
    """A checkpoint written and read again."""
    import jax

    from pd_jax.files import digest, read_checkpoint, write_checkpoint
    from pd_jax.mesh import make_mesh, param_shardings
    from pd_jax.params import init_params

    directory = Path(ward.flags.directory)
    yield Finding("disk", f"free in {directory.absolute()}", f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB")
    config = replace(shape_of("29m"), num_hidden_layers=2 if ward.flags.quick else 8)
    shardings = param_shardings(config, make_mesh(1, 1, 1, devices=[ward.device]))
    params = jax.device_put(init_params(config, jax.random.key(0, impl="rbg")), shardings)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as folder:
        path = Path(folder, "checkpoint")
        write_checkpoint(Path(folder, "first"), params)  # compiles, which is no part of a disk's speed
        began = time.perf_counter()
        write_checkpoint(path, params)
        written = time.perf_counter()
        again = jax.block_until_ready(read_checkpoint(path, config, None, shardings))
        rates = size / (written - began), size / (time.perf_counter() - written)
        same = digest(again) == digest(params)
    figure = f"{size / 1e6:.0f} MB, written at {rates[0] / 1e6:.0f} MB/s, read (perhaps from memory) at "
    slow = min(rates) < SLOW_DISK
    yield Finding(
        "disk", "a checkpoint", f"{figure}{rates[1] / 1e6:.0f} MB/s", "WRONG" if not same else "slow" if slow else "ok"
    )


PARTS: dict[str, Callable[[Ward], Iterator[Finding]]] = {
    "speed": speed,
    "links": links,
    "attention": attention,
    "speed of attention": attention_speed,
    "decoding": decoding,
    "training": step,
    "speed of decoding": column,
    "disk": disk,
}
