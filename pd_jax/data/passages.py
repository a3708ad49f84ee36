"""Questions about a sibling's passage: a task on real text that a branch can answer only by looking at its siblings.

Of any data set in SQuAD's format. A set has K branches; every prompt holds a short passage of its own and a question
about the passage of another branch of the set, and the background holds none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pd_jax.data.squad import Context, Question
from pd_jax.errors import InputError


@dataclass(frozen=True)
class PassageSettings:
    """How sets are made."""

    branches: int = 4  # K
    sets: int = 300  # at most
    words: tuple[int, int] = (30, 85)  # of a passage, least and most
    seed: int = 0


def passage_sets(contexts: Sequence[Context], settings: PassageSettings) -> tuple[list[Context], list[Context]]:
    """(sets, the same questions with the passage that they are about as their background: what looking can reach).

    The passages of a set come from articles that differ, and each stands in one set only; a question is used where its
    passage holds the answer and no other passage of the set does. Raises `InputError` for fewer than two branches and
    when `contexts` are too few for one set.
    """
    if settings.branches < 2:
        raise InputError(f"a set of {settings.branches} branches has no siblings; take 2 or more")
    least, most = settings.words
    short = [context for context in contexts if least <= len(context.text.split()) <= most]
    rng = np.random.default_rng(settings.seed)
    waiting = [short[i] for i in rng.permutation(len(short))]
    seen, told = [], []
    while len(seen) < settings.sets:
        members, waiting = _members(waiting, settings.branches)
        if members is None:
            break
        number, shift = len(seen), int(rng.integers(1, settings.branches))
        asked = [members[(b + shift) % len(members)] for b in range(len(members))]
        chosen = [_question(context, members, rng) for context in asked]
        if any(question is None for question in chosen):
            continue
        questions = []
        for b, (own, about, question) in enumerate(zip(members, asked, chosen, strict=True)):
            assert question is not None
            text = f"{own.text}\nAbout another passage: {question.text}"
            questions.append(Question(f"{number}-{b}-{question.id}", text, question.answers))
            told.append(Context(about.title, f"{about.text} [{number}-{b}]", (questions[-1],)))
        seen.append(Context(f"set {number}", f"Passages, set {number}.", tuple(questions)))
    if not seen:
        raise InputError(
            f"{len(contexts)} contexts, {len(short)} of {least} to {most} words, give no set of {settings.branches} "
            "passages from different articles; use more data, other --words or fewer --branches"
        )
    return seen, told


def _members(waiting: list[Context], count: int) -> tuple[list[Context] | None, list[Context]]:
    """The first `count` contexts of different articles, and the others; None where there are not so many."""
    members: dict[str, Context] = {}
    rest = []
    for context in waiting:
        if len(members) < count and context.title not in members:
            members[context.title] = context
        else:
            rest.append(context)
    return (list(members.values()) if len(members) == count else None), rest


def _question(about: Context, members: Sequence[Context], rng: np.random.Generator) -> Question | None:
    """One of the questions whose answer stands in no other passage."""
    others = [context.text.lower() for context in members if context is not about]
    good = [q for q in about.questions if not any(a.lower() in text for a in q.answers for text in others)]
    return good[int(rng.integers(len(good)))] if good else None


def as_squad(contexts: Sequence[Context]) -> dict[str, Any]:
    """In the official format."""
    articles: dict[str, list[Any]] = {}
    for context in contexts:
        qas = [
            {"id": q.id, "question": q.text, "answers": [{"text": answer, "answer_start": 0} for answer in q.answers]}
            for q in context.questions
        ]
        articles.setdefault(context.title, []).append({"context": context.text, "qas": qas})
    return {"version": "1.1", "data": [{"title": title, "paragraphs": parts} for title, parts in articles.items()]}
