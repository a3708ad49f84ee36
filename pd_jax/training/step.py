"""One optimiser step: the loss of a batch of rows, its gradients, AdamW."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax import Array

from pd_jax.columns import Coordinates
from pd_jax.config import Backend, LoraConfig, ModelConfig, Remat
from pd_jax.loss import weighted_nll
from pd_jax.mesh import ACTIVATIONS_BTD
from pd_jax.model import forward, head
from pd_jax.params import Params, decays

Batch = dict[str, Array]  # the arrays of a `pd_jax.layout.Layout`, each [A, B, T]: A micro-batches of B rows


class State(TypedDict):
    """What a step takes and gives back, and what a checkpoint holds."""

    trained: Params  # float32: the model's weights, or the adapters of a LoRA run
    opt: Any  # optax's state: the moments lie where their weights lie
    step: Array  # int32 scalar: optimiser steps taken


class Metrics(TypedDict):
    """Of one step; float32 scalars."""

    loss: Array  # mean nll of the targets, weighted, in nats
    grad_norm: Array  # before clipping
    tokens: Array  # in all rows, PAD left out
    used: Array  # their share of the places
    sibling_bias: NotRequired[Array]  # its least and its greatest value after the step, [2]; where it is trained


# How far sibling_bias can move in a run, about: Adam moves a scalar by the learning rate a step at most, and a cosine
# halves that. At the model's own rate it would move by tenths, and a door that starts shut would stay shut.
BIAS_TRAVEL = 3.0


@dataclass(frozen=True)
class Optimisation:
    """AdamW after clipping, with linear warm-up and a cosine to zero."""

    learning_rate: float = 4e-4  # its peak
    warmup_ratio: float = 0.03  # share of the steps
    weight_decay: float = 0.01  # of what `pd_jax.params` says decays
    max_grad_norm: float = 1.0
    sibling_bias_lr: float | None = None  # the peak for sibling_bias; None: BIAS_TRAVEL in the run


@dataclass(frozen=True)
class StepSettings:
    """How a step computes, beside the model's own configuration."""

    dtype: Any = jnp.float32  # of activations and products; trained weights stay float32
    remat: Remat = "none"
    attention: Backend = "auto"
    seed: int = 0  # of dropout


def make_optimizer(optimisation: Optimisation, steps: int) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """The optimiser of a run of `steps` steps, and its schedule: the learning rate by step."""
    warmup = math.ceil(optimisation.warmup_ratio * steps)
    peak = optimisation.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, max(steps, warmup + 1))
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=optimisation.weight_decay, mask=decays)
    bias_peak = 2 * BIAS_TRAVEL / steps if optimisation.sibling_bias_lr is None else optimisation.sibling_bias_lr
    faster = optax.masked(optax.scale(bias_peak / peak if peak else 0.0), is_sibling_bias)
    return optax.chain(optax.clip_by_global_norm(optimisation.max_grad_norm), adamw, faster), schedule


def is_sibling_bias(params: Params) -> Params:
    """A tree like `params` of bools: True for sibling_bias."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "sibling_bias", params)


def make_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, settings: StepSettings, lora: LoraConfig | None = None
) -> tuple[Callable[[State, Params, Batch], tuple[State, Metrics]], Callable[[Params, Params, Batch], tuple]]:
    """(step, evaluate), both to be jitted. With `lora` the adapters are trained, beside frozen weights.

    step(state, frozen, batch) -> (state, metrics). The loss is one division, sum(weight * nll) / sum(weight) over all
    A x B rows: accumulation changes nothing but memory.
    evaluate(trained, frozen, batch) -> (sum of weighted nll, sum of weights).
    """

    visibility = config.visibility or "columns"

    def nll(trained: Params, frozen: Params, rows: Batch, weights: Array, key: Array | None) -> Array:
        params, adapters = (trained, None) if lora is None else (frozen, trained)
        hidden = forward(
            params,
            config,
            rows["tokens"],
            Coordinates.of(rows, visibility),
            visibility=visibility,
            dtype=settings.dtype,
            remat=settings.remat,
            backend=settings.attention,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, ACTIVATIONS_BTD),
            adapters=adapters,
            lora=lora,
            dropout_key=key,
        )
        return weighted_nll(hidden, head(params), rows["targets"], weights)

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        share = batch["weights"] / jnp.maximum(jnp.sum(batch["weights"]), 1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), state["step"]), share.shape[0])

        def accumulate(carry: tuple, micro: tuple) -> tuple[tuple, None]:
            rows, weights, key = micro
            loss, grads = jax.value_and_grad(nll)(state["trained"], frozen, rows, weights, key)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["trained"]))
        (loss, grads), _ = jax.lax.scan(accumulate, zero, (batch, share, keys))
        updates, opt = optimizer.update(grads, state["opt"], state["trained"])
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": optax.tree_utils.tree_norm(grads),
            "tokens": jnp.sum(batch["valid"].astype(jnp.float32)),
            "used": jnp.mean(batch["valid"].astype(jnp.float32)),
        }
        trained: Any = optax.apply_updates(state["trained"], updates)
        bias = trained.get("layers", trained).get("sibling_bias")  # of a LoRA run beside the adapters
        if bias is not None:
            metrics["sibling_bias"] = jnp.stack([jnp.min(bias), jnp.max(bias)])
        return {"trained": trained, "opt": opt, "step": state["step"] + 1}, metrics

    def evaluate(trained: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        return nll(trained, frozen, rows, rows["weights"], None), jnp.sum(rows["weights"])

    return step, evaluate
