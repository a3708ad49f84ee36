"""The training loop: arrays in their places, step after step, checkpoints, the model at the end."""

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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files import (
    load_params,
    save_adapter,
    save_model,
)
from pd_jax.lora import init_adapters
from pd_jax.mesh import (
    BATCH_ABT,
    param_shardings,
)
from pd_jax.params import Params, init_params, training_flops
from pd_jax.training.checkpoints import Checkpoints, write_run
from pd_jax.training.flags import TrainFlags
from pd_jax.training.monitor import (
    Monitor,
    Trace,
    say,
)
from pd_jax.training.processes import stop_signal
from pd_jax.training.step import Optimisation, StepSettings, make_optimizer, make_step


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


def rows_per_step(flags: TrainFlags) -> int:
    return flags.batch_size * flags.gradient_accumulation_steps


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
    optimisation = Optimisation(flags.learning_rate, flags.warmup_ratio, flags.weight_decay, flags.max_grad_norm)
    optimizer, schedule = make_optimizer(optimisation, steps)
    settings = StepSettings(start.dtype, flags.remat, flags.attention, flags.seed)
    step_fn, evaluate_fn = make_step(start.config, optimizer, settings, start.lora)
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
        place = partial(_place, NamedSharding(mesh, BATCH_ABT))

        def validation_loss() -> float:
            sums = np.zeros(2)
            for batch in held_out() if held_out is not None else ():
                sums += np.array(run_evaluate(state["trained"], frozen, place(1, batch)), np.float64)
            return float(sums[0] / max(sums[1], 1))

        # -- the loop: step n is on its way before the metrics of step n-1 are read
        flops = training_flops(start.config, row_length, start.lora is not None) * row_length * rows_per_step(flags)
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
