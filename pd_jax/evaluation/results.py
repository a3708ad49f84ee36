"""What results.json and predictions-ROW.jsonl hold, as types: read here what a figure counts, and in which unit."""

from typing import Any, Literal, NotRequired, TypedDict

Metric = Literal["squad", "cmrc"]  # squad: words, English; cmrc: characters, Chinese


class Settings(TypedDict):
    """What a row's answers and measurements depend on: predictions made with others are not gone on with."""

    row: str  # its name, WAY or WAY=MODEL
    weights: list[str]  # sha256 of the model directory, then of the adapter if there is one
    data: str  # sha256 of the contexts
    eos_ids: list[int]  # token ids that end an answer
    device: str  # as torch calls it: cpu, cuda, tpu
    max_new_tokens: int  # tokens an answer, at most
    batch_size: int  # contexts answered at once
    repeats: int  # timed runs of each batch; 0: answers only
    dtype: str  # of weights and activations
    align: NotRequired[str | None]  # our rows: as asked for; None: as the model was trained
    pair_indices: NotRequired[list[int] | None]  # our rows: RoPE pairs as asked for; None: those that are stored


class Record(TypedDict):
    """One context as one row answered it. What a batch took together is shared evenly among its contexts."""

    ids: list[str]  # of the questions, in whose order the lists below are
    answers: list[str]  # whole, beyond the first line too
    ended: list[bool]  # with an end-of-sequence token; otherwise max_new_tokens ended it
    tokens: int  # of all answers, without the end-of-sequence tokens
    columns: int  # steps until the longest answer has ended; a serial way: until the last one has
    forwards: float  # calls of the model, the prefill included
    slots: float  # answers times columns computed, live or dead
    prefill_tokens: float  # prompt tokens fed, without padding
    seconds: float | None  # to answer, the median of the repeats; None: not timed
    first_token_seconds: float | None  # until the first token of a whole batch (a serial way: of one question)
    peak_bytes: int | None  # the most memory, of the accelerator or else of the process; None: not known


class QuestionEntry(TypedDict):
    id: str
    question: str
    answers: list[str]  # gold
    leaks: bool  # a gold answer occurs in a sibling's question or gold answers


class ContextEntry(TypedDict):
    title: str
    text: str
    questions: list[QuestionEntry]


class MachineEntry(TypedDict):
    """What the figures were measured with."""

    versions: dict[str, str | None]  # of python and of the packages; None: not installed
    platform: str
    device: str  # its kind, as JAX says it
    devices: int
    cpus: int | None  # that this process may use


class Estimate(TypedDict):
    """A mean over questions, in percent, and its paired difference to the reference row, in points."""

    value: float
    interval: list[float] | None  # low and high, 95 %; None: too few contexts
    difference: float
    difference_interval: list[float] | None


class Quality(TypedDict):
    """How well some of the questions were answered; there are no estimates where there are no questions."""

    questions: int
    em: NotRequired[Estimate]  # exact match
    f1: NotRequired[Estimate]


class Cost(TypedDict):
    """Means a context with all its questions; see `Record`. None: not measured for all of them."""

    forwards: float
    columns: float
    prefill_tokens: float
    seconds: float | None
    first_token_seconds: float | None
    tokens_per_second: float | None  # answer tokens only
    dead: float | None  # share of the slots, 0..1, in which an answer had ended already
    peak_bytes: int | None  # the most of all contexts


class QualityAndCost(Quality):
    cost: Cost


class RowSummary(QualityAndCost):
    leak_free: Quality  # of the questions that do not leak
    by_branches: dict[str, QualityAndCost]  # by the number of questions of a context: "2", or "5 to 8" of many
    by_index: dict[str, Quality]  # by the place of a question among its siblings, from 1; likewise


class Summary(TypedDict):
    """The table; a function of what was recorded."""

    reference: str  # the row that differences are taken against
    contexts: int
    questions: int
    rows: dict[str, RowSummary]


class SightEntry(TypedDict):
    """Whether a row's model looks at its siblings."""

    contexts: int  # that were looked at
    attention: list[list[list[float]]]  # [layer][head][background, own branch, siblings], mean shares
    effect: float  # mean change of a logit when siblings are hidden, over the logits' standard deviation


class Recorded(TypedDict):
    """Everything that was asked and answered."""

    flags: dict[str, Any]  # of scripts/evaluate.py
    machine: MachineEntry
    notes: list[str]  # sentences that the table must be read with
    settings: dict[str, Settings]  # by row
    contexts: list[ContextEntry]
    rows: dict[str, list[Record]]  # by row, one record a context
    sight: NotRequired[dict[str, SightEntry]]  # by row, of the rows whose branches see siblings


class Results(Recorded):
    """results.json."""

    summary: Summary


class DumpEntry(TypedDict):
    """One question in --dump-file: what the reference row (baseline) and our columns (parallel) said."""

    title: str
    context: str
    id: str
    question: str
    answers: list[str]  # gold
    leaks: bool
    baseline: str  # first line of the answer, as scored
    baseline_row: str
    baseline_em: float  # 0 or 1
    baseline_f1: float  # 0..1
    parallel: str
    parallel_row: str
    parallel_em: float
    parallel_f1: float
    predictions: dict[str, str]  # by row
