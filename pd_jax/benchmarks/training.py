"""Training steps, with LoRA or of all weights, beside transformers and torch: the same weights, rows, mask and loss."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pd_jax.benchmarks.models import equal_branches, in_transformers, shape_of
from pd_jax.benchmarks.timing import Contender, fastest, import_torch, unless_out_of_memory
from pd_jax.cli import flag
from pd_jax.config import Backend, LoraConfig, Remat
from pd_jax.machines import PeakMemory, peak_bytes, peak_flops


@dataclass(frozen=True)
class TrainFlags:
    model: str = flag("29m", "shape of the random weights: 29m or a hub id like Qwen/Qwen3-0.6B")
    use_lora: bool = flag(False, "train low-rank adapters on all projections, the weights frozen")
    batch_size: int = flag(2, "rows of a step", minimum=1)
    branches: int = flag(16, "branches of a row", minimum=1)
    seq_length: int = flag(16, "tokens of a branch", minimum=1)
    targets: tuple[float, ...] = flag(
        (1.0,), "shares of the tokens that have a weight in the loss, one after the other"
    )
    remat: Remat = flag("none", "what the backward pass recomputes")
    attention: tuple[Backend, ...] = flag(("auto",), "backends, one after the other")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of products; auto: float32 on a CPU, bfloat16 else")
    transformers: bool = flag(True, "compare with transformers where torch is installed (LoRA: peft)")
    threads: int = flag(1, "on a CPU: 1 counts the process's own time, more the clock's", minimum=1)
    repeat: int = flag(3, "steps of which the fastest counts", minimum=1)


THEIRS = "transformers"


def time_training(flags: TrainFlags) -> None:
    """Whole steps: forward, backward and AdamW. On a CPU all take turns; elsewhere one after the other, each with the
    device's memory to itself."""
    import jax
    import numpy as np

    from pd_jax.benchmarks.checks import reference_device
    from pd_jax.lora import init_adapters
    from pd_jax.params import init_params, training_flops

    # --- weights and rows, on the host
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    cpu_time = on_cpu and flags.threads == 1
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    config, length = shape_of(flags.model), flags.branches * flags.seq_length
    lora = LoraConfig(dropout=0.0) if flags.use_lora else None
    with jax.default_device(reference_device()):
        params = init_params(config, jax.random.key(0, impl="rbg"), dtype if lora else "float32")
        adapters = None if lora is None else init_adapters(config, lora, jax.random.key(1, impl="rbg"))
    coordinates = equal_branches(length, flags.branches, flags.batch_size)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, *coordinates.column.shape))
    batch = {
        name: np.asarray(getattr(coordinates, name)) for name in ("branch", "column", "segment", "valid", "prompt")
    }
    batch |= {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}

    # --- who is timed
    builders: dict[str, Callable[[], tuple[Contender, Callable[[], float | None]]]] = {}
    torch: Any = import_torch(flags.threads) if flags.transformers else None
    if torch is not None:  # first: torch gives its memory back, jax keeps it
        builders[THEIRS] = partial(_theirs, torch, flags, config, params, lora, batch, dtype, device)
    for backend in flags.attention:
        for share in flags.targets:
            name = backend if share == 1 else f"{backend}, {100 * share:.0f} % of targets"
            weights = np.where(np.arange(length) % 64 < 64 * share, np.float32(1), 0)
            rows = batch | {"weights": np.broadcast_to(weights, tokens.shape)}
            builders[name] = partial(_ours, flags, config, params, adapters, lora, rows, dtype, backend)

    # --- their steps
    timings, peaks = {}, {}
    for names in [list(builders)] if on_cpu else [[name] for name in builders]:
        built = {}
        for name in names:
            with unless_out_of_memory(name):
                built[name] = builders[name]()
        timings |= fastest({n: contender for n, (contender, _) in built.items()}, flags.repeat, cpu_time)
        peaks |= {name: peak() for name, (_, peak) in built.items()}
        del built
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- the table
    work = training_flops(config, length, lora is not None) * flags.batch_size * length
    peak, source = peak_flops(cpu_time)
    kind = "all weights" if lora is None else f"LoRA r={lora.r}"
    print(
        f"\n{flags.model}, {kind}, {flags.batch_size} rows of {flags.branches} x {flags.seq_length} tokens, {dtype}, "
        f"remat {flags.remat}, on {device.device_kind}; MFU of {peak / 1e12:.3g} TFLOP/s ({source})"
    )
    print(f"{'':28}{'ms a step':>12}{'tokens/s':>12}{'MFU, %':>10}{'peak, GB':>10}{'x ' + THEIRS:>16}")
    for name, timing in timings.items():
        seconds, held = timing.seconds, peaks[name]
        ratio = f"{timings[THEIRS].seconds / seconds:.2f}" if THEIRS in timings else ""
        memory = "" if held is None else f"{held / 1e9:.2f}"
        rate, share = flags.batch_size * length / seconds, 100 * work / seconds / peak
        print(f"{name:28}{1e3 * seconds:12.1f}{rate:12,.0f}{share:10.1f}{memory:>10}{ratio:>16}", flush=True)


def _ours(
    flags: TrainFlags, config: Any, params: Any, adapters: Any, lora: Any, rows: dict, dtype: Any, backend: Backend
) -> tuple[Contender, Callable[[], float | None]]:
    """A step of `pd_jax.training`, compiled, and the compiler's account of its peak."""
    import jax
    import jax.numpy as jnp

    from pd_jax.mesh import make_mesh, place_batch
    from pd_jax.training import Optimisation, StepSettings, make_optimizer, make_step

    mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimizer, _ = make_optimizer(Optimisation(learning_rate=1e-5), 1000)
    trained, frozen = (params, {}) if lora is None else (adapters, params)
    # Copied: the state is donated, and on a CPU it would be the other contenders' too.
    trained, frozen = jax.tree.map(jnp.copy, jax.device_put(trained, here)), jax.device_put(frozen, here)
    state: Any = {"trained": trained, "opt": jax.jit(optimizer.init)(trained), "step": jnp.int32(0)}
    batch, step = (
        place_batch(mesh, 1, rows),
        make_step(config, optimizer, StepSettings(dtype, flags.remat, backend), lora)[0],
    )
    with jax.set_mesh(mesh):
        program = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    losses: list[float] = []

    def call() -> None:
        nonlocal state
        state, metrics = program(state, frozen, batch)
        losses.append(float(metrics["loss"]))  # and so it has ended
        if len(losses) == 1:
            print(f"loss of the first step: {losses[0]:.6f} ({backend})")

    return Contender(call), lambda: peak_bytes(program.memory_analysis())


def _theirs(
    torch: Any,
    flags: TrainFlags,
    config: Any,
    params: Any,
    lora: LoraConfig | None,
    batch: dict,
    dtype: str,
    device: Any,
) -> tuple[Contender, Callable[[], float | None]]:
    """The same step in transformers and torch, and the most memory that torch held on its device."""
    import numpy as np

    from pd_jax.columns import Coordinates, column_mask

    place = "cpu" if device.platform == "cpu" else "cuda"
    model = in_transformers(config, params, dtype if lora else "float32", place)
    if lora is not None:
        import peft

        names = list(lora.target_modules)
        model = peft.get_peft_model(model, peft.LoraConfig(r=lora.r, lora_alpha=int(lora.alpha), target_modules=names))
    if flags.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    coordinates = Coordinates(**{n: batch[n] for n in ("branch", "column", "segment", "valid", "prompt")})
    mask = np.where(np.asarray(column_mask(coordinates, coordinates)), 0, np.finfo(np.float32).min)[:, None]
    inputs = {
        "input_ids": torch.tensor(batch["tokens"].astype(np.int64), device=place),
        "attention_mask": torch.tensor(mask.astype(np.float32), device=place).to(getattr(torch, dtype)),
        "position_ids": torch.tensor(batch["column"].astype(np.int64), device=place),
        "use_cache": False,
    }
    labels = torch.tensor(batch["targets"].astype(np.int64), device=place).flatten()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    how = nullcontext if dtype == "float32" else partial(torch.autocast, place, torch.bfloat16)
    memory, losses = PeakMemory("torch"), []

    def call() -> None:
        with nullcontext() if place == "cpu" else memory:
            optimizer.zero_grad()
            with how():
                logits = model(**inputs).logits
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)
            nll.backward()
            optimizer.step()
            losses.append(nll.item())
            if len(losses) == 1:
                print(f"loss of the first step: {losses[0]:.6f} (transformers)")

    return Contender(call), lambda: memory.peak
