"""The training loop: arrays in their places, step after step, checkpoints, the model at the end."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from pd_jax.config import LoraConfig, ModelConfig
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError
from pd_jax.files import Base, load_params, prove_saving, save_adapter, save_model, write_run
from pd_jax.lora import init_adapters
from pd_jax.machines import Trace, peak_bytes, stop_signal
from pd_jax.mesh import abstract_arrays, param_shardings, place_batch
from pd_jax.params import Params, init_params, parameter_count, training_flops
from pd_jax.training.checkpoints import Checkpoints
from pd_jax.training.step import Optimisation, State, StepSettings, make_optimizer, make_step
from pd_jax.watching.monitor import Monitor, say
from pd_jax.watching.sight import door_line, sibling_share


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from; everything in it has been checked."""

    directory: Path  # of the model
    config: ModelConfig
    random_init: bool
    sibling_bias_start: float  # where a bias begins that the weights do not have
    adapters: Params | None  # those of --adapter
    lora: LoraConfig | None  # of a LoRA run
    base: Base | None  # the frozen model of a LoRA run
    tokenizer: Any
    end: int  # the token that closes an answer or a document
    pad: int
    mesh: Mesh


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long a run goes on, what it says and what it leaves behind."""

    output: Path
    flags: dict[str, Any]  # this and the next as run.json keeps them
    data: dict[str, str]  # what identifies each data set, by its name
    steps: int  # optimiser steps, at most
    accumulation: int  # micro-batches of a step
    rows: int  # of a step, over all micro-batches and devices
    row_length: int  # tokens
    logging_steps: int  # this and the next two: optimiser steps between ...
    eval_steps: int
    save_steps: int
    keep: int  # newest checkpoints, beside the best
    profile: str | None


# ---------------------------------------------------------------- arrays


def load_weights(start: Start, seed: int, dtype: Any) -> Params:
    """The starting parameters, in their shardings."""
    shardings = param_shardings(start.config, start.mesh)
    if start.random_init:
        init = partial(init_params, start.config, dtype=dtype, sibling_bias_start=start.sibling_bias_start)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    bias = start.sibling_bias_start
    return load_params(start.directory, start.config, dtype, shardings=shardings, sibling_bias_start=bias)


def abstract_state(trained: Params, shardings: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes and shardings of the training state. The moments lie where their parameters lie: left to itself, jit
    would replicate them on every device."""
    here = NamedSharding(mesh, P())
    opt = jax.eval_shape(optimizer.init, trained)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, opt, shardings, transform_non_params=lambda _: here
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    return {"trained": abstract_arrays(trained, shardings), "opt": abstract_arrays(opt, opt_shardings), "step": step}


# ---------------------------------------------------------------- the loop


def train(
    start: Start,
    run: Run,
    optimisation: Optimisation,
    settings: StepSettings,
    *,
    data: grain.DatasetIterator,
    held_out: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None,
    bad: BadRows | None = None,
) -> None:
    """Train for `run.steps` optimiser steps, or until `data` ends, and write a model directory to `run.output`.

    Run again with the same flags, it resumes from its newest readable checkpoint. `bad` has counted the rows that
    `data` left out.
    """
    output, steps, position, ahead = run.output, run.steps, data.get_state(), None
    if not (output / "checkpoints").is_dir():
        ahead = next(data, None)  # of a stream only this tells whether there is a first batch
        if ahead is None:
            raise InputError(
                f"the data end before the first step, which takes {run.rows} rows of {run.row_length} tokens; "
                "use more data or smaller rows"
            )

    # -- everything that can be wrong with the call is known by now; from here on files are written
    trace = Trace(run.profile, output / "profile", say)
    config, lora, mesh, adapters = start.config, start.lora, start.mesh, start.adapters
    if lora is not None and adapters is None:
        adapters = init_adapters(config, lora, jax.random.key(settings.seed))
    size = parameter_count(config) if lora is None else optax.tree_utils.tree_size(adapters)
    checkpoints = min(run.keep + 2, max(1, steps // run.save_steps))  # the best one and one on its way, too
    prove_saving(output, 4 * size * (1 + 3 * checkpoints))  # float32; a checkpoint has two moments of each number
    write_run(output, run.flags, start.base, run.data, finished=False)

    # -- step and state
    load = partial(load_weights, start, settings.seed)
    optimizer, schedule = make_optimizer(optimisation, steps)
    step_fn, evaluate_fn = make_step(config, optimizer, settings, lora)
    with jax.set_mesh(mesh), Checkpoints(output / "checkpoints", run.keep) as saved, stop_signal() as stop:
        if adapters is None:
            frozen: Params = {}
            shardings = param_shardings(config, mesh)
            trained = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        else:
            frozen = load(settings.dtype)
            if config.sibling_bias and "sibling_bias" not in adapters:
                adapters |= {"sibling_bias": frozen["layers"]["sibling_bias"].astype(jnp.float32)}
            shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), adapters)
            trained = adapters
        target = abstract_state(trained, shardings, optimizer, mesh)
        places: Any = jax.tree.map(lambda x: x.sharding, target)
        resumed = saved.newest(target)
        if resumed is None:
            first = 0
            weights = load(jnp.float32) if adapters is None else jax.device_put(adapters, shardings)
            opt = jax.jit(optimizer.init, out_shardings=places["opt"])(weights)
            state: State = {"trained": weights, "opt": opt, "step": jax.device_put(jnp.int32(0), places["step"])}
            del weights, opt  # the first step takes their memory
        else:
            state, position, first = resumed
            data.set_state(position)
            ahead = None
            say(f"resuming {output} after step {first} of {steps}")
        jitted, run_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None)), None
        run_evaluate = jax.jit(evaluate_fn)
        run_look = jax.jit(partial(sibling_share, config, lora), out_shardings=NamedSharding(mesh, P()))

        def validate() -> tuple[float, float]:
            """The validation loss, and the share of attention on siblings in the first rows."""
            sums, share = np.zeros(2), math.nan
            for batch in held_out() if held_out is not None else ():
                placed = place_batch(mesh, 1, batch)
                sums += np.array(run_evaluate(state["trained"], frozen, placed), np.float64)
                if math.isnan(share):
                    share = float(run_look(state["trained"], frozen, placed))
            return float(sums[0] / max(sums[1], 1)), share

        # -- the loop: step n is on its way before the metrics of step n-1 are read
        flops = training_flops(config, run.row_length, lora is not None) * run.row_length * run.rows
        step, pending, loss = first, None, math.inf
        with Monitor(
            output, first=first, steps=steps, every=run.logging_steps, schedule=schedule, flops=flops
        ) as monitor:

            def read(validation: tuple[float, float] | None = None) -> None:
                """Wait for the pending step and log it."""
                nonlocal pending, loss
                if pending is None:
                    return
                number, metrics, batch_position = pending
                pending = None
                try:
                    monitor(number, metrics, validation)
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"{error}; its batch is the one at {json.dumps(batch_position)}; the last good checkpoint is "
                        f"{max(saved.steps(), default='none')}; lower --learning-rate or look at that batch"
                    ) from None
                if held_out is None:
                    loss = float(metrics["loss"])

            def save(position: Any) -> None:
                """A checkpoint of now. What ranks it is the last validation loss, or without such data that of the
                step; a state whose loss is not finite is never saved."""
                read()
                saved.save(step, state, position, loss)

            while step < steps and not stop.hit(step):
                if ahead is None:
                    position = data.get_state()
                    try:
                        ahead = next(data, None)
                    except InputError:  # a bad row of a stream: nothing is lost, the rerun may skip it
                        if step > first:
                            save(position)
                            saved.wait()
                        raise
                if ahead is None:
                    say(f"the data ended after step {step} of {steps}; finishing here")
                    break
                batch, ahead = place_batch(mesh, run.accumulation, ahead), None
                if run_step is None:
                    run_step = jitted.lower(state, frozen, batch).compile()
                    held = peak_bytes(run_step.memory_analysis()) / 2**20
                    say(f"a step holds {held:,.1f} MiB of every device at the most, all weights and moments included")
                trace.before(step + 1)
                state, metrics = run_step(state, frozen, batch)
                read()
                step += 1
                pending = (step, metrics, position)
                trace.after(step, metrics)
                if held_out is not None and (step % run.eval_steps == 0 or step == steps):
                    validation = validate()
                    loss = validation[0]
                    read(validation)
                if step % run.save_steps == 0:
                    save(data.get_state())
            stopped = stop.name is not None and step < steps
            if stopped and step not in saved.steps():
                save(data.get_state() if ahead is None else position)
                saved.wait()
            read()

        # -- the end
        if stopped:
            say(f"stopped by {stop.name} after step {step} of {steps}; run the same command to resume")
            return
        if lora is None:
            save_model(output, state["trained"], config, start.directory)
        elif jax.process_index() == 0:
            assert start.base is not None
            name, base_print = start.base.values()
            save_adapter(output, state["trained"], lora, config, base=name, base_print=base_print)
        door = door_line(config, state["trained"])
    write_run(output, run.flags, start.base, run.data, finished=True)
    skipped = "" if bad is None else bad.summary()
    say(f"finished {step} steps; the {'model' if lora is None else 'adapter'} is in {output}{skipped}{door}")
