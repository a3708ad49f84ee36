"""Training: columnar pretraining, finetuning, and the one linear loop that both run."""

import dataclasses
import json
import math
from collections.abc import Callable
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
from rich.progress import track

from pd_jax.attention import Call, check_backend, target
from pd_jax.checkpoint import (
    find_model,
    fingerprint,
    load_config,
    load_eos_ids,
    load_params,
    load_tokenizer,
    save_model,
)
from pd_jax.columns import Coordinates
from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.data import fineweb, pipeline, squad
from pd_jax.errors import InputError
from pd_jax.flags import FinetuneFlags, PretrainFlags, TrainFlags
from pd_jax.layout import fit
from pd_jax.lora import init_adapters, load_adapter, save_adapter
from pd_jax.loss import weighted_nll
from pd_jax.model import Params, forward, head, init_params
from pd_jax.monitor import Monitor, Trace, flops_per_token, say
from pd_jax.resume import Checkpoints, check_base, check_output, start_processes, stop_signal, write_run
from pd_jax.sharding import SPECS, check_batch, check_model, make_mesh, param_shardings


@dataclass(frozen=True)
class Start:
    """What a run starts from; everything in it has been checked. `adapters` are those of --adapter; `base` is the name
    and the fingerprint of the frozen model of a LoRA run."""

    directory: Path
    config: ModelConfig
    adapters: Params | None
    lora: LoraConfig | None
    base: dict[str, str] | None
    tokenizer: Any
    end: int
    pad: int
    mesh: Mesh
    dtype: Any


# ---------------------------------------------------------------- the two stages


def pretrain(flags: PretrainFlags) -> None:
    """Columnar pretraining: web segments as branches without a background, every next token of a branch counts."""
    start_processes(flags)
    if finished(flags):
        return
    if flags.streaming and flags.workers:
        raise InputError(f"--workers {flags.workers} cannot share a stream; leave out --streaming or --workers")
    length = flags.branch_count * flags.seq_length
    start = prepare(flags, length)
    align = start.config.align or "left"
    documents = fineweb.load_documents(
        flags.dataset_name,
        flags.dataset_config,
        flags.dataset_split,
        flags.streaming,
        flags.max_samples,
        flags.local_files_only,
    )

    def batches(segments: fineweb.Documents, epochs: int | None = None) -> grain.DatasetIterator:
        return pipeline.pretrain_batches(
            segments,
            flags.branch_count,
            flags.seq_length,
            rows_per_step(flags),
            flags.seed,
            align,
            start.pad,
            flags.workers,
            epochs,
        )

    def cut(documents: fineweb.Documents) -> fineweb.Documents:
        return fineweb.segments(documents, start.tokenizer, flags.seq_length, start.end)

    held_out = None
    if flags.eval_dataset_name is not None:
        name, local = flags.eval_dataset_name, flags.local_files_only
        held_out = partial(batches, cut(fineweb.load_documents(name, max_samples=64, local_files_only=local)), 1)
        held_out()  # too few documents are refused here, not in the middle of the run
    data = batches(cut(documents))
    train(flags, start, data, flags.max_steps, length, held_out)


def finetune(flags: FinetuneFlags) -> None:
    """Finetuning on questions grouped by context: answer tokens and their end count."""
    start_processes(flags)
    if finished(flags):
        return
    start = prepare(flags, flags.max_length)
    align = start.config.align or "left"

    def samples(name: str, split: str, limit: int | None) -> list:
        contexts = squad.load_squad(name, split, flags.local_files_only)
        contexts = squad.select(contexts, flags.max_branches, flags.min_questions, limit)
        told = track(contexts, "tokenising", disable=jax.process_index() > 0)
        whole = [squad.to_tokens(context, start.tokenizer, start.end) for context in told]
        fitted = [fit(sample, flags.max_length) for sample in whole]
        kept = [sample for sample in fitted if sample is not None]
        cut = sum(new is not None and new is not old for new, old in zip(fitted, whole, strict=True))
        say(
            f"{name}: {len(kept)} contexts, {sum(len(s.branches) for s in kept)} questions; {cut} backgrounds "
            f"shortened and {len(whole) - len(kept)} contexts dropped to fit --max-length {flags.max_length}"
        )
        if not kept:
            raise InputError(
                f"no context of {name} fits --max-length {flags.max_length}: the shortest needs "
                f"{min(len(s) - len(s.background) for s in whole)} tokens; raise it or lower --max-branches"
            )
        return kept

    def batches(samples: list, size: int, epochs: int, limit: int | None = None) -> tuple[grain.DatasetIterator, int]:
        rows = pipeline.finetune_rows([len(s) for s in samples], flags.max_length, epochs, flags.seed)
        steps = -(-len(rows) // size)
        if limit is not None and limit < steps:
            steps, rows = limit, rows[: limit * size]
        used = sum(len(samples[i]) for row in rows for i in row) / (len(rows) * flags.max_length)
        say(f"{len(rows)} rows of {flags.max_length} tokens, {used:.0%} of them used")
        return (
            pipeline.finetune_batches(samples, rows, flags.max_length, size, align, start.pad, flags.workers),
            steps,
        )

    name = flags.eval_dataset_name or (None if Path(flags.dataset_name).exists() else flags.dataset_name)
    if name is None and (flags.max_eval_samples or flags.eval_batch_size):
        raise InputError(
            f"--max-eval-samples and --eval-batch-size: {flags.dataset_name} is a file and has no validation split; "
            "pass --eval-dataset-name too"
        )
    trained_on = samples(flags.dataset_name, flags.dataset_split, flags.max_train_samples)
    data, steps = batches(trained_on, rows_per_step(flags), flags.epochs, flags.max_steps)
    held_out = None
    if name is not None:
        kept = samples(name, "validation", flags.max_eval_samples)
        size = flags.eval_batch_size or rows_per_step(flags)
        check_batch(size, start.mesh)
        held_out = lambda: batches(kept, size, 1)[0]  # noqa: E731
    train(flags, start, data, steps, flags.max_length, held_out)


def finished(flags: TrainFlags) -> bool:
    """Whether this very run is over; says so. Raises `ValueError` when --output-dir holds something else."""
    over = not check_output(flags)
    if over:
        say(f"{flags.output_dir} holds the finished run of this very command; nothing to do")
    return over


def rows_per_step(flags: TrainFlags) -> int:
    return flags.batch_size * flags.gradient_accumulation_steps


def prepare(flags: TrainFlags, row_length: int) -> Start:
    """Read and check everything that a run on rows of so many tokens needs but its weights. Raises `ValueError`;
    writes nothing."""
    Trace.parse(flags.profile or "1:1")
    directory = find_model(flags.model_name, flags.local_files_only)
    adapter = None if flags.adapter is None else find_model(flags.adapter, flags.local_files_only)
    config = load_config(directory, flags.pair_indices, adapter)
    visibility, align = flags.visibility or config.visibility or "columns", flags.align or config.align or "left"
    if (config.visibility or visibility, config.align or align) != (visibility, align):
        say(
            f"{flags.model_name} was trained with visibility {config.visibility}, align {config.align}; this run "
            f"trains it with visibility {visibility}, align {align}"
        )
    bias = config.sibling_bias or flags.sibling_bias
    config = dataclasses.replace(config, sibling_bias=bias, visibility=visibility, align=align)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    eos = load_eos_ids(directory, tokenizer)
    mesh = make_mesh(*flags.mesh)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    adapters = lora = None
    if adapter is not None:
        adapters, lora = load_adapter(adapter, config, directory)  # rank and scale are those of the adapter
    elif flags.use_lora:
        lora = LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    if lora is not None and flags.sibling_bias:
        raise InputError(
            "--sibling-bias is a weight of the base, which --use-lora does not train; leave one of them out"
        )
    base = None
    if lora is not None:
        name = str(directory.absolute()) if Path(flags.model_name).is_dir() else flags.model_name
        base = {"name": name, "fingerprint": fingerprint(directory)}
        check_base(flags, base)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = jnp.dtype({"auto": "float32" if on_cpu else "bfloat16"}.get(flags.dtype, flags.dtype))
    with jax.set_mesh(mesh):
        call = Call(*target(), visibility, row_length, config.head_dim, dtype, config.sibling_bias)
    check_backend(flags.attention, call)
    return Start(
        directory=directory,
        config=config,
        adapters=adapters,
        lora=lora,
        base=base,
        tokenizer=tokenizer,
        end=tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0],
        pad=tokenizer.pad_token_id or 0,
        mesh=mesh,
        dtype=dtype,
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
            config.visibility or "columns",
            dtype,
            remat=flags.remat,
            backend=flags.attention,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, SPECS.act_btd),
            adapters=adapters,
            lora=lora,
            dropout_key=key,
        )
        return weighted_nll(hidden, head(params), rows["targets"], weights)

    def step(state: Params, frozen: Params, batch: Params) -> tuple[Params, Params]:
        share = batch["weights"] / jnp.maximum(jnp.sum(batch["weights"]), 1)
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
            "tokens": jnp.sum(batch["valid"].astype(jnp.float32)),
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
    return load_params(start.directory, start.config, dtype, shardings)


def placed(shapes: Any, places: Any, dtype: Any = None) -> Any:
    """The abstract arrays of a tree of shapes in a tree of shardings, all of `dtype` if one is given."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, places)


def abstract_state(trained: Params, shardings: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Params:
    """Shapes and shardings of the training state. The moments lie where their parameters lie: left to itself, jit
    would replicate them on every device."""
    here = NamedSharding(mesh, P())
    opt = jax.eval_shape(optimizer.init, trained)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, opt, shardings, transform_non_params=lambda _: here
    )

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
    row_length: int,
    held_out: Callable[[], grain.DatasetIterator] | None = None,
) -> None:
    """Train for `steps` optimiser steps, or until `data` ends, and write a model directory to flags.output_dir.

    Run again with the same flags, it resumes from its newest readable checkpoint.
    """
    output, position, ahead = Path(flags.output_dir), data.get_state(), None
    if not (output / "checkpoints").is_dir():
        ahead = next(data, None)  # of a stream only this tells whether there is a first batch
        if ahead is None:
            raise InputError(
                f"the data end before the first step, which takes {rows_per_step(flags)} rows of {row_length} tokens; "
                "use more data or smaller rows"
            )

    # -- everything that can be wrong with the call is known by now; from here on files are written
    trace = Trace(flags.profile, output / "profile")
    adapters = start.adapters
    if start.lora is not None and adapters is None:
        adapters = init_adapters(start.config, start.lora, jax.random.key(flags.seed))
    write_run(flags, start.base, finished=False)

    # -- step and state
    mesh = start.mesh
    optimizer, schedule = make_optimizer(flags, steps)
    step_fn, evaluate_fn = make_step(flags, start.config, start.lora, optimizer, start.dtype)
    with jax.set_mesh(mesh), Checkpoints(output / "checkpoints", flags.keep) as saved, stop_signal() as stop:
        if adapters is None:
            frozen: Params = {}
            shardings = param_shardings(start.config, mesh)
            trained = jax.eval_shape(partial(init_params, start.config), jax.random.key(0))
        else:
            frozen = load_weights(start, flags, start.dtype)
            shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), adapters)
            trained = adapters
        target = abstract_state(trained, shardings, optimizer, mesh)
        places = jax.tree.map(lambda x: x.sharding, target)
        resumed = saved.newest(target)
        if resumed is None:
            first = 0
            weights = (
                load_weights(start, flags, jnp.float32) if adapters is None else jax.device_put(adapters, shardings)
            )
            opt = jax.jit(optimizer.init, out_shardings=places["opt"])(weights)
            state = {"trained": weights, "opt": opt, "step": jax.device_put(jnp.int32(0), places["step"])}
            del weights, opt  # the first step takes their memory
        else:
            state, position, first = resumed
            data.set_state(position)
            ahead = None
            say(f"resuming {output} after step {first} of {steps}")
        run_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None))
        run_evaluate = jax.jit(evaluate_fn)
        place = partial(_place, NamedSharding(mesh, SPECS.batch_abt))

        def validation_loss() -> float:
            sums = np.zeros(2)
            for batch in held_out() if held_out is not None else ():
                sums += np.array(run_evaluate(state["trained"], frozen, place(1, batch)), np.float64)
            return float(sums[0] / max(sums[1], 1))

        # -- the loop: step n is on its way before the metrics of step n-1 are read
        flops = flops_per_token(start.config, start.lora, row_length) * row_length * rows_per_step(flags)
        step, pending, loss = first, None, math.inf
        with Monitor(output, first, steps, flags.logging_steps, schedule, flops) as monitor:

            def read(validation: float | None = None) -> None:
                """Wait for the pending step and log it."""
                nonlocal pending, loss
                if pending is None:
                    return
                number, numbers, batch_position = pending
                pending = None
                try:
                    monitor(number, numbers, validation)
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"{error}; its batch is the one at {json.dumps(batch_position)}; the last good checkpoint is "
                        f"{max(saved.steps(), default='none')}; lower --learning-rate or look at that batch"
                    ) from None
                if held_out is None:
                    loss = float(numbers["loss"])

            def save() -> None:
                """A checkpoint of now. What ranks it is the last validation loss, or without such data that of the
                step; a state whose loss is not finite is never saved."""
                read()
                saved.save(step, state, data.get_state() if ahead is None else position, loss)

            while step < steps and not stop.hit(step):
                if ahead is None:
                    position, ahead = data.get_state(), next(data, None)
                if ahead is None:
                    say(f"the data ended after step {step} of {steps}; finishing here")
                    break
                batch, ahead = ahead, None
                trace.before(step + 1)
                state, metrics = run_step(state, frozen, place(flags.gradient_accumulation_steps, batch))
                read()
                step += 1
                pending = (step, metrics, position)
                trace.after(step, metrics)
                if held_out is not None and (step % flags.eval_steps == 0 or step == steps):
                    loss = validation_loss()
                    read(loss)
                if step % flags.save_steps == 0:
                    save()
            stopped = stop.name is not None and step < steps
            if stopped and step not in saved.steps():
                save()
                saved.wait()
            read()

        # -- the end
        if stopped:
            say(f"stopped by {stop.name} after step {step} of {steps}; run the same command to resume")
            return
        if start.lora is None:
            save_model(output, state["trained"], start.config, start.directory)
        elif jax.process_index() == 0:
            assert start.base is not None
            save_adapter(output, state["trained"], start.lora, start.config, *start.base.values())
    write_run(flags, start.base, finished=True)
    say(f"finished {step} steps; the {'model' if start.lora is None else 'adapter'} is in {output}")


def _place(sharding: NamedSharding, accumulation: int, batch: dict[str, np.ndarray]) -> Params:
    """This process's rows [b * A, T] as global arrays [A, B, T]: dealt out to the micro-batches in turn, so that every
    micro-batch is the same for any number of processes."""
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.ascontiguousarray(rows.reshape(-1, accumulation, rows.shape[-1]).swapaxes(0, 1))
        )
        for name, rows in batch.items()
    }
