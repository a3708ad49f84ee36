"""Training: columnar pretraining, finetuning, and the one linear loop that both run."""

import dataclasses
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pd_jax.checkpoint import find_model, load_config, load_eos_ids, load_params, load_tokenizer, save_model
from pd_jax.columns import Coordinates
from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.data import fineweb, pipeline, squad
from pd_jax.flags import FinetuneFlags, PretrainFlags, TrainFlags
from pd_jax.layout import fit
from pd_jax.lora import init_adapters, load_adapter, save_adapter
from pd_jax.loss import weighted_nll
from pd_jax.model import SIBLING_BIAS_START, Params, forward, head, init_params
from pd_jax.sharding import SPECS, check_batch, check_model, make_mesh, param_shardings

console = Console(stderr=False, soft_wrap=True, highlight=False)

# Flags that may differ when a run is resumed: they do not change what is learned.
FREE_ON_RESUME = {"logging_steps", "save_steps", "eval_steps", "mesh", "attention", "local_files_only", "output_dir"}
KEEP = 2  # training checkpoints; the one before the newest is there in case the newest is damaged


@dataclass(frozen=True)
class Start:
    """What a run starts from; everything in it has been checked."""

    directory: Path
    config: ModelConfig
    lora: LoraConfig | None
    tokenizer: Any
    end: int
    pad: int
    mesh: Mesh
    dtype: Any


# ---------------------------------------------------------------- the two stages


def pretrain(flags: PretrainFlags) -> None:
    """Columnar pretraining: web segments as branches without a background, every next token of a branch counts."""
    start = prepare(flags)
    documents = fineweb.load_documents(
        flags.dataset_name,
        flags.dataset_config,
        flags.dataset_split,
        flags.streaming,
        flags.max_samples,
        flags.local_files_only,
    )

    def batches(documents: fineweb.Documents) -> grain.DatasetIterator:
        segments = fineweb.segments(documents, start.tokenizer, flags.seq_length, start.end)
        return pipeline.pretrain_batches(
            segments, flags.branch_count, flags.seq_length, rows_per_step(flags), flags.seed, flags.align, start.pad
        )

    held_out = None
    if flags.eval_dataset_name is not None:
        held_out = partial(batches, fineweb.load_documents(flags.eval_dataset_name, max_samples=64))
    train(flags, start, batches(documents), flags.max_steps, held_out)


def finetune(flags: FinetuneFlags) -> None:
    """Finetuning on questions grouped by context: answer tokens and their end count."""
    start = prepare(flags)

    def samples(name: str, split: str, limit: int | None) -> list:
        contexts = squad.load_squad(name, split, flags.local_files_only)
        contexts = squad.select(contexts, flags.max_branches, flags.min_questions, limit)
        whole = [squad.to_tokens(context, start.tokenizer, start.end) for context in contexts]
        fitted = [fit(sample, flags.max_length) for sample in whole]
        kept = [sample for sample in fitted if sample is not None]
        cut = sum(new is not None and new is not old for new, old in zip(fitted, whole, strict=True))
        console.print(
            f"{name}: {len(kept)} contexts, {sum(len(s.branches) for s in kept)} questions; {cut} backgrounds "
            f"shortened and {len(whole) - len(kept)} contexts dropped to fit --max-length {flags.max_length}"
        )
        if not kept:
            raise ValueError(
                f"no context of {name} fits --max-length {flags.max_length}: the shortest needs "
                f"{min(map(len, whole))} tokens; raise it or lower --max-branches"
            )
        return kept

    def batches(samples: list, epochs: int, limit: int | None = None) -> tuple[grain.DatasetIterator, int]:
        rows = pipeline.finetune_rows([len(s) for s in samples], flags.max_length, epochs, flags.seed)
        steps = -(-len(rows) // rows_per_step(flags))
        if limit is not None and limit < steps:
            steps, rows = limit, rows[: limit * rows_per_step(flags)]
        used = sum(len(samples[i]) for row in rows for i in row) / (len(rows) * flags.max_length)
        console.print(f"{len(rows)} rows of {flags.max_length} tokens, {used:.0%} of them used")
        return (
            pipeline.finetune_batches(samples, rows, flags.max_length, rows_per_step(flags), flags.align, start.pad),
            steps,
        )

    data, steps = batches(
        samples(flags.dataset_name, flags.dataset_split, flags.max_train_samples), flags.epochs, flags.max_steps
    )
    held_out = None
    name = flags.eval_dataset_name or (None if Path(flags.dataset_name).exists() else flags.dataset_name)
    if name is not None:
        kept = samples(name, "validation", flags.max_eval_samples)
        held_out = lambda: batches(kept, 1)[0]  # noqa: E731
    train(flags, start, data, steps, held_out)


def rows_per_step(flags: TrainFlags) -> int:
    return flags.batch_size * flags.gradient_accumulation_steps


def prepare(flags: TrainFlags) -> Start:
    """Read and check everything that a run needs but its weights. Raises `ValueError`; writes nothing."""
    if len(flags.mesh) != 3:
        raise ValueError(
            f"--mesh {' '.join(map(str, flags.mesh))} has {len(flags.mesh)} sizes; give data, fsdp, tensor"
        )
    directory = find_model(flags.model_name, flags.local_files_only)
    config = load_config(directory, flags.pair_indices)
    config = dataclasses.replace(config, sibling_bias=config.sibling_bias or flags.sibling_bias)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    eos = load_eos_ids(directory, tokenizer)
    mesh = make_mesh(*flags.mesh)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    lora = None
    if flags.use_lora or flags.adapter is not None:
        lora = LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = {"auto": "float32" if on_cpu else "bfloat16"}.get(flags.dtype, flags.dtype)
    return Start(
        directory=directory,
        config=config,
        lora=lora,
        tokenizer=tokenizer,
        end=tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0],
        pad=tokenizer.pad_token_id or 0,
        mesh=mesh,
        dtype=jnp.dtype(dtype),
    )


# ---------------------------------------------------------------- the step


def make_optimizer(flags: TrainFlags, steps: int) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """AdamW after clipping, with linear warm-up and a cosine to zero; and the schedule."""
    warmup = math.ceil(flags.warmup_ratio * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        flags.learning_rate / (warmup + 1), flags.learning_rate, warmup, max(steps, warmup + 1)
    )

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith("norm") and path[-1].key != "sibling_bias", params
        )

    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=flags.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(flags.max_grad_norm), adamw), schedule


def make_step(
    flags: TrainFlags, config: ModelConfig, lora: LoraConfig | None, optimizer: optax.GradientTransformation, dtype: Any
) -> tuple[Callable, Callable]:
    """(step, evaluate), both to be jitted.

    step(state, frozen, batch) -> (state, metrics): state {"trained", "opt", "step"}; batch arrays [A, B, T]. The loss
    is one division, sum(weight * nll) / sum(weight) over all A x B rows: accumulation changes nothing but memory.
    evaluate(trained, frozen, batch) -> (sum of weighted nll, sum of weights).
    """

    def nll(trained: Params, frozen: Params, rows: Params, weights: Array, key: Array | None) -> Array:
        params, adapters = (trained, None) if lora is None else (frozen, trained)
        hidden = forward(
            params,
            config,
            rows["tokens"],
            Coordinates.of(rows),
            flags.visibility,
            dtype,
            remat=flags.remat,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, SPECS.act_btd),
            adapters=adapters,
            lora=lora,
            dropout_key=key,
        )
        return weighted_nll(hidden, head(params), rows["targets"], weights)

    def step(state: Params, frozen: Params, batch: Params) -> tuple[Params, Params]:
        tokens = jnp.sum(batch["weights"])
        share = batch["weights"] / jnp.maximum(tokens, 1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(flags.seed), state["step"]), share.shape[0])

        def accumulate(carry: tuple, micro: tuple) -> tuple[tuple, None]:
            rows, weights, key = micro
            loss, grads = jax.value_and_grad(nll)(state["trained"], frozen, rows, weights, key)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["trained"]))
        (loss, grads), _ = jax.lax.scan(accumulate, zero, (batch, share, keys))
        updates, opt = optimizer.update(grads, state["opt"], state["trained"])
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree_utils.tree_norm(grads),
            "tokens": tokens,
            "used": jnp.mean(batch["valid"].astype(jnp.float32)),
        }
        trained = optax.apply_updates(state["trained"], updates)
        return {"trained": trained, "opt": opt, "step": state["step"] + 1}, metrics

    def evaluate(trained: Params, frozen: Params, batch: Params) -> tuple[Array, Array]:
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        return nll(trained, frozen, rows, rows["weights"], None), jnp.sum(rows["weights"])

    return step, evaluate


# ---------------------------------------------------------------- arrays


def load_weights(start: Start, flags: TrainFlags, dtype: Any) -> Params:
    """The starting parameters, in their shardings."""
    shardings = param_shardings(start.config, start.mesh)
    if flags.random_init:
        init = jax.jit(partial(init_params, start.config, dtype=dtype), out_shardings=shardings)
        return init(jax.random.key(flags.seed))
    added = start.config.sibling_bias and not load_config(start.directory, flags.pair_indices).sibling_bias
    if not added:
        return load_params(start.directory, start.config, dtype, shardings)
    place = shardings["layers"].pop("sibling_bias")
    params = load_params(start.directory, dataclasses.replace(start.config, sibling_bias=False), dtype, shardings)
    shape = (start.config.num_hidden_layers, start.config.num_attention_heads)
    params["layers"]["sibling_bias"] = jax.device_put(jnp.full(shape, SIBLING_BIAS_START, dtype), place)
    return params


def abstract_state(trained: Params, shardings: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Params:
    """Shapes and shardings of the training state. The moments lie where their parameters lie: left to itself, jit
    would replicate them on every device."""
    here = NamedSharding(mesh, P())
    opt = jax.eval_shape(optimizer.init, trained)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, opt, shardings, transform_non_params=lambda _: here
    )

    def placed(shapes: Any, places: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)

    return {
        "trained": placed(trained, shardings),
        "opt": placed(opt, opt_shardings),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=here),
    }


# ---------------------------------------------------------------- the loop


def train(
    flags: TrainFlags,
    start: Start,
    data: grain.DatasetIterator,
    steps: int,
    held_out: Callable[[], grain.DatasetIterator] | None = None,
) -> None:
    """Train for `steps` optimiser steps, or until `data` ends, and write a model directory to flags.output_dir.

    Run again with the same flags, it resumes from its newest readable checkpoint, or says that it has finished.
    """
    output = Path(flags.output_dir)
    checkpoints = output / "checkpoints"
    if not resumable(flags, output):
        console.print(f"{output} holds the finished run of this very command; nothing to do")
        return

    # -- optimiser, step, state
    mesh = start.mesh
    optimizer, schedule = make_optimizer(flags, steps)
    step_fn, evaluate_fn = make_step(flags, start.config, start.lora, optimizer, start.dtype)
    replicated = NamedSharding(mesh, P())
    with jax.set_mesh(mesh), _checkpointer(checkpoints) as saved, _stop_signal() as stop:
        params = frozen = {}
        if start.lora is None:
            shardings = param_shardings(start.config, mesh)
            trained = jax.eval_shape(partial(init_params, start.config), jax.random.key(0))
        else:
            frozen = load_weights(start, flags, start.dtype)
            adapters, lora = (
                (init_adapters(start.config, start.lora, jax.random.key(flags.seed)), start.lora)
                if flags.adapter is None
                else load_adapter(Path(flags.adapter), start.config)
            )
            start = dataclasses.replace(start, lora=lora)
            shardings = jax.tree.map(lambda _: replicated, adapters)
            trained = params = jax.device_put(adapters, shardings)
        state_shape = abstract_state(trained, shardings, optimizer, mesh)
        state, position, first = _restore(saved, state_shape, flags)
        if state is None:
            params = params or load_weights(start, flags, jnp.float32)
            places = jax.tree.map(lambda x: x.sharding, state_shape["opt"])
            opt = jax.jit(optimizer.init, out_shardings=places)(params)
            state = {"trained": params, "opt": opt, "step": jax.device_put(jnp.int32(0), replicated)}
        else:
            data.set_state(position)
            console.print(f"resuming {output} after step {first} of {steps}")
        del params
        places = jax.tree.map(lambda x: x.sharding, state_shape)
        run_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None))
        run_evaluate = jax.jit(evaluate_fn)
        place_batch = partial(_place, NamedSharding(mesh, SPECS.batch_abt), flags.gradient_accumulation_steps)

        def validation_loss(trained: Params) -> float | None:
            if held_out is None:
                return None
            sums = np.zeros(2)
            for batch in held_out():
                sums += np.array(run_evaluate(trained, frozen, place_batch(batch)), np.float64)
            return float(sums[0] / max(sums[1], 1))

        def save(step: int) -> None:
            record = {"flags": dataclasses.asdict(flags), "data": data.get_state()}
            saved.save_checkpointables_async(step, {"state": state}, custom_metadata=record, force=True)

        # -- the loop: step n is on its way before the metrics of step n-1 are read
        log = _Log(output / "metrics.jsonl", first, steps, flags.logging_steps, schedule)
        step, pending = first, None
        with log:
            while step < steps and not stop.hit:
                try:
                    batch = next(data)
                except StopIteration:
                    console.print(f"the data ended after step {step} of {steps}; finishing here")
                    break
                state, metrics = run_step(state, frozen, place_batch(batch))
                step += 1
                if pending is not None:
                    log(step - 1, pending, checkpoints)
                pending = metrics
                if step % flags.eval_steps == 0 or step == steps:
                    log(step, pending, checkpoints, validation_loss(state["trained"]))
                    pending = None
                if step % flags.save_steps == 0 and step < steps:
                    if pending is not None:
                        log(step, pending, checkpoints)  # a loss that is not finite must never be saved
                        pending = None
                    save(step)
            if pending is not None:
                log(step, pending, checkpoints)

        # -- the end
        if stop.hit and step < steps:
            save(step)
            saved.wait()
            console.print(f"stopped by {stop.hit} after step {step} of {steps}; run the same command to resume")
            return
        if start.lora is None:
            save_model(output, state["trained"], start.config, start.directory)
        else:
            save_adapter(output, state["trained"], start.lora, start.config, base=flags.model_name)
    shutil.rmtree(checkpoints, ignore_errors=True)
    _write_run(output, flags, finished=True)
    console.print(f"finished {step} steps; the {'model' if start.lora is None else 'adapter'} is in {output}")


def _place(sharding: NamedSharding, accumulation: int, batch: dict[str, np.ndarray]) -> Params:
    """This process's rows [A * b, T] as global arrays [A, B, T]."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows.reshape(accumulation, -1, rows.shape[-1]))
        for name, rows in batch.items()
    }


# ---------------------------------------------------------------- saving and resuming


def resumable(flags: TrainFlags, output: Path) -> bool:
    """True when this run is new or to be continued, False when it has finished. Raises `ValueError` for a directory
    that holds something else."""
    path = output / "run.json"
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"--output-dir {output} holds files of something else; choose an empty or a new directory")
        _write_run(output, flags, finished=False)
        return True
    run = json.loads(path.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(dataclasses.asdict(flags)))
    changed = [
        f"--{name.replace('_', '-')} {ours.get(name)} (was {run['flags'].get(name)})"
        for name in sorted(set(ours) | set(run["flags"]))
        if name not in FREE_ON_RESUME and ours.get(name) != run["flags"].get(name)
    ]
    if changed:
        raise ValueError(f"--output-dir {output} holds a run with other flags: {', '.join(changed)}; use another one")
    return not run["finished"]


def _write_run(output: Path, flags: TrainFlags, finished: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        return
    stage = output / ".run.json"
    stage.write_text(json.dumps({"flags": dataclasses.asdict(flags), "finished": finished}, indent=2) + "\n")
    stage.replace(output / "run.json")


@contextmanager
def _checkpointer(directory: Path) -> Iterator[Any]:
    """Orbax's asynchronous checkpointer; leaving the block waits for the save in flight."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    policies = ocp.training.preservation_policies
    with ocp.training.Checkpointer(
        directory.absolute(), preservation_policy=policies.LatestN(KEEP), cleanup_tmp_directories=True
    ) as checkpointer:
        yield checkpointer


def _restore(saved: Any, target: Params, flags: TrainFlags) -> tuple[Params | None, Any, int]:
    """(state, data position, step) of the newest readable checkpoint, or (None, None, 0)."""
    for checkpoint in reversed(saved.checkpoints):
        try:
            state = saved.load_checkpointables(checkpoint.step, {"state": target})["state"]
            record = saved.checkpointables_metadata(checkpoint.step).custom_metadata
            return state, record["data"], int(checkpoint.step)
        except Exception as error:  # orbax raises one type for everything; the cause is at the end of the chain
            cause: BaseException = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__  # ty: ignore[invalid-assignment]
            console.print(f"warning: checkpoint {checkpoint.step} cannot be read ({cause}); trying the one before")
    return None, None, 0


class _Stop:
    """Which signal asked us to stop, if any; the second one stops at once."""

    hit: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = signal.Signals(number).name


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    stop, numbers = _Stop(), (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------- what a person watches


class _Log:
    """One line and one metrics.jsonl object a logged step, and a progress bar on a terminal.

    A resumed run continues metrics.jsonl: lines after the step that it resumes from are dropped first.
    """

    def __init__(self, path: Path, first: int, steps: int, every: int, schedule: Callable[[Any], Any]) -> None:
        self.steps, self.every, self.schedule = steps, every, schedule
        kept = []
        if path.is_file():
            kept = [x for x in path.read_text().splitlines() if x.endswith("}") and json.loads(x)["step"] <= first]
        if jax.process_index() == 0:
            path.write_text("".join(x + "\n" for x in kept))
        self.file = path.open("a") if jax.process_index() == 0 else None
        self.since, self.seen, self.tokens = time.monotonic(), first, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=steps, completed=first)

    def __enter__(self) -> "_Log":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()

    def __call__(self, step: int, metrics: Params, checkpoints: Path, validation: float | None = None) -> None:
        loss, tokens = float(metrics["loss"]), float(metrics["tokens"])
        self.bar.update(self.task, completed=step)
        self.tokens += tokens
        if not math.isfinite(loss):
            kept = sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
            raise FloatingPointError(
                f"the loss of step {step} is {loss}; last good checkpoint: {kept[-1] if kept else 'none'} in "
                f"{checkpoints}; lower --learning-rate or look at the data of that step"
            )
        if step % self.every and step != self.steps and validation is None:
            return
        now = time.monotonic()
        rate = (step - self.seen) / (now - self.since)
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": float(self.schedule(step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": self.tokens / (now - self.since),
            "token_utilisation": float(metrics["used"]),
        }
        record |= {} if validation is None else {"validation_loss": validation}
        self.since, self.seen, self.tokens = now, step, 0.0
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        left = time.strftime("%H:%M:%S", time.gmtime((self.steps - step) / rate)) if rate else "?"
        console.print(
            f"step {step}/{self.steps}  loss {loss:.4f}  "
            + (f"validation {validation:.4f}  " if validation is not None else "")
            + f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  used {record['token_utilisation']:.0%}  left {left}"
        )
