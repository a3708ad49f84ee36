"""Exact match and F1 with intervals, and the table of an evaluation. numpy only: a table is rendered without jax."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pd_jax.data.squad import Context
from pd_jax.evaluation.results import Cost, Estimate, Metric, Quality, Record, Recorded, RowSummary, Summary

RESAMPLES = 2000  # bootstrap draws
FEWEST = 10  # contexts for an interval; a bootstrap of fewer is too narrow
MOST_GROUPS = 8  # numbers of branches, or places, that are looked at one by one

CMRC_PUNCTUATION = "-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』"


def normalize(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces (https://rajpurkar.github.io/SQuAD-explorer)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _cmrc_normalize(text: str) -> str:
    return "".join(c for c in text.lower().strip() if c not in CMRC_PUNCTUATION)


def _cmrc_segments(text: str) -> list[str]:
    """Chinese characters one by one, other words whole."""
    return re.findall(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+|[^\w\s]", _cmrc_normalize(text))


def _longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] + [row[j] + 1 if x == y else 0 for j, y in enumerate(b)]
        best = max(best, *row)
    return best


def _f1(gold: list[str], predicted: list[str], shared: int) -> float:
    if not gold or not predicted:
        return float(gold == predicted)  # as SQuAD 2.0's script; 1.1's gives 0 where both are empty
    return 2 * shared / (len(gold) + len(predicted))


def score(prediction: str, answers: Sequence[str], metric: Metric = "squad") -> tuple[float, float]:
    """(exact match, F1), each in 0..1, against the best of the gold answers.

    squad: normalised text, F1 over the bag of words. cmrc: punctuation removed, F1 over the longest common run of
    characters (github.com/ymcui/cmrc2018, with runs of letters in place of nltk's words).
    """
    if metric == "squad":
        words = normalize(prediction).split()
        golds = [normalize(answer).split() for answer in answers]
        shared = [(Counter(words) & Counter(gold)).total() for gold in golds]
        exact = any(words == gold for gold in golds)
    else:
        words = _cmrc_segments(prediction)
        golds = [_cmrc_segments(answer) for answer in answers]
        shared = [_longest_common_run(words, gold) for gold in golds]
        exact = _cmrc_normalize(prediction) in {_cmrc_normalize(answer) for answer in answers}
    return float(exact), max(_f1(gold, words, n) for gold, n in zip(golds, shared, strict=True))


def answer_of(text: str) -> str:
    """What is scored: the first line. A model that was not finetuned to stop goes on with the next question."""
    return text.strip().split("\n")[0].strip()


def leaks(context: Context, index: int, metric: Metric = "squad") -> bool:
    """Whether a gold answer of question `index` occurs in a sibling's question or gold answers."""

    def flat(text: str) -> str:
        return f" {normalize(text)} " if metric == "squad" else _cmrc_normalize(text)

    siblings = [q for i, q in enumerate(context.questions) if i != index]
    texts = [flat(text) for q in siblings for text in (q.text, *q.answers)]
    golds = [flat(answer) for answer in context.questions[index].answers]
    return any(gold in text for gold in golds if gold.strip() for text in texts)


@lru_cache(maxsize=4)
def _draws(n: int, seed: int) -> np.ndarray:
    """How often each of `n` contexts is drawn, [RESAMPLES, n]: the same for every row, and for EM and F1."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)


def estimate(scores: np.ndarray, context: np.ndarray, reference: int, seed: int) -> list[Estimate]:
    """Means in percent with 95 % intervals, and paired differences to row `reference`, from a bootstrap by context.

    scores [rows, questions] in 0..1, context [questions]: which context each question is about. Questions of one
    context are not independent, so whole contexts are drawn, the same ones for every row.
    """
    _, owner = np.unique(context, return_inverse=True)
    counts = np.bincount(owner)
    sums = np.stack([np.bincount(owner, weights=row) for row in scores])  # [rows, contexts]
    draws = _draws(len(counts), seed)
    means = 100 * (sums @ draws.T) / (counts @ draws.T)  # [rows, RESAMPLES]
    value = 100 * sums.sum(axis=1) / counts.sum()

    def interval(drawn: np.ndarray) -> list[float] | None:
        if len(counts) < FEWEST:
            return None
        return [float(x) for x in np.percentile(drawn, (2.5, 97.5))]

    return [
        {
            "value": float(value[row]),
            "interval": interval(means[row]),
            "difference": float(value[row] - value[reference]),
            "difference_interval": interval(means[row] - means[reference]),
        }
        for row in range(len(scores))
    ]


def ranges(values: np.ndarray) -> dict[str, tuple[int, int]]:
    """Which `values` are looked at together: label -> the first and the last. Each by itself; where they are more than
    MOST_GROUPS, those between two powers of two (1, 2, 3 to 4, 5 to 8, ...)."""
    there = np.unique(values)
    group = there if len(there) <= MOST_GROUPS else np.ceil(np.log2(there))
    parts = [there[group == g] for g in np.unique(group)]
    ends = [(int(part[0]), int(part[-1])) for part in parts]
    return {str(first) if first == last else f"{first} to {last}": (first, last) for first, last in ends}


def summarize(recorded: Recorded) -> Summary:
    """The table from what was recorded; a pure function of results.json."""
    flags, contexts, records = recorded["flags"], recorded["contexts"], recorded["rows"]
    questions = [(c, b, q) for c, context in enumerate(contexts) for b, q in enumerate(context["questions"])]
    context, branch = np.array([c for c, _, _ in questions]), np.array([b for _, b, _ in questions])
    width = np.array([len(contexts[c]["questions"]) for c in context])
    free = np.array([not q["leaks"] for _, _, q in questions])
    scores = np.array(
        [
            [score(answer_of(row[c]["answers"][b]), q["answers"], flags["metric"]) for c, b, q in questions]
            for row in records.values()
        ]
    ).transpose(2, 0, 1)  # [EM and F1, rows, questions]
    names = list(records)
    reference = names.index(flags["against"] or names[0])

    def quality(keep: np.ndarray) -> list[Quality]:
        """Of every row, on the questions to `keep`: bool [questions]."""
        if not keep.any():
            return [{"questions": 0} for _ in names]
        em, f1 = (estimate(part[:, keep], context[keep], reference, flags["seed"]) for part in scores)
        return [{"questions": int(keep.sum()), "em": e, "f1": f} for e, f in zip(em, f1, strict=True)]

    whole, leak_free = quality(np.ones(len(questions), bool)), quality(free)
    widths, places = ranges(width), ranges(branch + 1)
    branches = {k: quality((width >= a) & (width <= z)) for k, (a, z) in widths.items()}
    index = {k: quality((branch + 1 >= a) & (branch + 1 <= z)) for k, (a, z) in places.items()}
    rows: dict[str, RowSummary] = {}
    for r, name in enumerate(names):
        by_width = {k: [x for x in records[name] if a <= len(x["answers"]) <= z] for k, (a, z) in widths.items()}
        rows[name] = {
            **whole[r],
            "leak_free": leak_free[r],
            "cost": _cost(records[name]),
            "by_branches": {k: {**q[r], "cost": _cost(by_width[k])} for k, q in branches.items()},
            "by_index": {k: q[r] for k, q in index.items()},
        }
    return {"reference": names[reference], "contexts": len(contexts), "questions": len(questions), "rows": rows}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _measured(values: Sequence[float | None]) -> float | None:
    """The mean, if all were measured."""
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None


def _cost(records: Sequence[Record]) -> Cost:
    tokens, slots = _mean([r["tokens"] for r in records]), _mean([r["slots"] for r in records])
    live = _mean([r["tokens"] + sum(r["ended"]) for r in records])
    seconds = _measured([r["seconds"] for r in records])
    return {
        "forwards": _mean([r["forwards"] for r in records]),
        "columns": _mean([r["columns"] for r in records]),
        "prefill_tokens": _mean([r["prefill_tokens"] for r in records]),
        "seconds": seconds,
        "first_token_seconds": _measured([r["first_token_seconds"] for r in records]),
        "tokens_per_second": tokens / seconds if seconds else None,
        "dead": 1 - live / slots if slots else None,
        "peak_bytes": max((r["peak_bytes"] for r in records if r["peak_bytes"] is not None), default=None),
    }
