"""Hugging Face's name, shape and order of axes for every tensor of a model: one table, read both ways."""

import math
from typing import NamedTuple

from pd_jax.config import ModelConfig
from pd_jax.params import Weight, weights_of


class Entry(NamedTuple):
    """One tensor: Hugging Face's name for it and its place in `Params`."""

    name: str  # "model.layers.3.self_attn.q_proj.weight"
    path: tuple[str, ...]  # its keys in `Params`
    layer: int | None  # its place along L; None for embed, norm and lm_head
    shape: tuple[int, ...]  # in our axes, without L
    order: tuple[int, ...]  # our axes in Hugging Face's order: outputs, then inputs
    hf_shape: tuple[int, ...]  # in the file: [out, in] for a projection


def key_table(config: ModelConfig) -> dict[str, Entry]:
    """Every tensor of a model by its Hugging Face name, in the order in which exports write them."""

    def entry(weight: Weight, layer: int | None) -> Entry:
        name = weight.hf if layer is None else f"model.layers.{layer}.{weight.hf}"
        path = (weight.name,) if layer is None else ("layers", weight.name)
        shape, inputs = weight.shape(config), len(weight.summed)
        order = (*range(inputs, len(shape)), *range(inputs))
        hf_shape = shape if layer is None else (math.prod(shape),)  # what is no kernel of a layer is a vector there
        if inputs:
            hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        return Entry(name, path, layer, shape, order, hf_shape)

    weights = weights_of(config)
    inside = [weight for weight in weights if weight.in_layers]
    first, *last = [weight for weight in weights if not weight.in_layers]
    entries = [entry(first, None)]
    entries += [entry(weight, layer) for layer in range(config.num_hidden_layers) for weight in inside]
    entries += [entry(weight, None) for weight in last]
    return {entry.name: entry for entry in entries}
