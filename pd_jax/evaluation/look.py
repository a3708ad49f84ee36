"""Whether a row's model looks at its siblings: where its attention goes, and what hiding them changes in its logits."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pd_jax.data.squad import Context, to_tokens
from pd_jax.evaluation.results import Settings, SightEntry
from pd_jax.layout import unanswered
from pd_jax.machines import write_whole

if TYPE_CHECKING:
    from pd_jax.decoding import ParallelDecoder

MOST = 8  # contexts that are looked at: a forward of each, with all scores of a layer in memory


def look(decoder: "ParallelDecoder", contexts: Sequence[Context], max_new_tokens: int) -> SightEntry:
    """Of the first contexts, each with the answers that `decoder` gives."""
    attention, effect = [], []
    for context in contexts[:MOST]:
        sample = to_tokens(context, decoder.tokenizer, decoder.eos_ids[0])
        asked = unanswered(sample)
        (result,) = decoder.generate([asked], max_new_tokens=max_new_tokens)
        said = [replace(b, answer=r.token_ids) for b, r in zip(asked.branches, result.branches, strict=True)]
        layout = decoder.layout([replace(asked, branches=said)])
        attention.append(decoder.attention(layout)[0])
        effect.append(float(np.nanmean(decoder.sibling_effect(layout))))
    mass = np.mean(attention, axis=0)
    return {"contexts": len(attention), "attention": mass.round(4).tolist(), "effect": float(np.mean(effect))}


def look_once(
    load: "Callable[[], ParallelDecoder]",
    contexts: Sequence[Context],
    max_new_tokens: int,
    *,
    settings: Settings,
    path: Path,
) -> SightEntry:
    """`look`, unless `path` has it already from a run with the same settings."""
    with suppress(OSError, json.JSONDecodeError):
        made = json.loads(path.read_text(encoding="utf-8"))
        if made["settings"] == settings:
            return made["sight"]
    sight = look(load(), contexts, max_new_tokens)
    write_whole(path, json.dumps({"settings": settings, "sight": sight}) + "\n")
    return sight


def sight_line(name: str, sight: SightEntry) -> str:
    """What the report says of a row."""
    mass = np.asarray(sight["attention"])
    background, own, siblings = mass.mean((0, 1))
    layer, head = np.unravel_index(mass[..., 2].argmax(), mass.shape[:2])
    return (
        f"Sight of {name} ({sight['contexts']} contexts): attention on the background {background:.1%}, the own branch "
        f"{own:.1%}, siblings {siblings:.1%} (most in layer {layer + 1}, head {head + 1}: {mass[layer, head, 2]:.1%}); "
        f"hiding siblings changes the logits by {sight['effect']:.3f} of their standard deviation"
    )
