"""Batches for training, with grain: shuffled by seed, shared out over processes, resumable at any step.

A batch is a dict of the arrays of `pd_jax.layout.Layout`, [rows of this process, T]. What an iterator's `get_state()`
returns is JSON and the same on every process, so a run may be resumed with another number of them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import datasets
import grain
import numpy as np
from absl import flags

from pd_jax.config import VISIBILITIES, Align, Visibility
from pd_jax.data.fineweb import Documents, branch_sample
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError
from pd_jax.layout import Layout, Objective, TokenSample, build_layout, members, pack

RowArrays = dict[str, np.ndarray]  # the arrays of a `Layout` of one row, each [T]
SHUFFLE_WINDOW = 8192  # segments held to shuffle a stream


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How samples become the rows of a training run."""

    length: int  # tokens of a row
    align: Align
    pad_id: int
    seed: int
    mix: tuple[float, ...] | None = None  # shares of `VISIBILITIES` that samples draw from; None: none of their own


def lay_out(samples: Sequence[TokenSample], objective: Objective, settings: RowSettings) -> RowArrays:
    """One row of samples, each with a visibility drawn for it where `settings` mix them."""
    if settings.mix is not None:
        samples = [
            replace(sample, visibility=draw_visibility(sample, settings.mix, settings.seed)) for sample in samples
        ]
    layout = build_layout([samples], settings.length, settings.align, objective, settings.pad_id)
    return {f.name: layout[f.name][0] for f in fields(Layout)}


def draw_visibility(sample: TokenSample, shares: Sequence[float], seed: int) -> Visibility:
    """By the sample's own tokens and the seed alone: the same in any batch, process or resumed run."""
    texts = [text for turn in sample.turns for text in members(turn)]
    ids = [*sample.background, *(token for text in texts for token in (*text.prompt, *text.answer))]
    draw = zlib.crc32(np.asarray([seed, *ids], np.uint32).tobytes()) / 2**32
    place = np.searchsorted(np.cumsum(shares) / np.sum(shares), draw, side="right")
    return VISIBILITIES[int(place)]


class _Stream(grain.IterDataset):
    """A streamed `datasets` data set as a grain source whose position can be saved, the count of bad rows with it."""

    def __init__(self, documents: datasets.IterableDataset, bad: BadRows) -> None:
        super().__init__()
        self._documents, self._bad = documents, bad

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(self._documents, self._bad)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, documents: datasets.IterableDataset, bad: BadRows) -> None:
        super().__init__()
        self._documents, self._bad, self._rows = documents, bad, None

    def __next__(self) -> dict[str, Any]:
        if self._rows is None:
            self._rows = iter(self._documents)
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        return {**self._documents.state_dict(), "bad_rows": self._bad.count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._bad.count = state.get("bad_rows", 0)
        self._documents.load_state_dict({key: value for key, value in state.items() if key != "bad_rows"})
        self._rows = None


class _Shares(grain.MapDataset):
    """`rows` in such an order that grain, which deals the rows of a step out in turn, gives every process neighbours.

    What stands where in a batch is then the same for any number of processes, and so is dropout.
    """

    def __init__(self, rows: grain.MapDataset, rows_per_step: int, processes: int) -> None:
        super().__init__(rows)
        self._rows_per_step, self._processes = rows_per_step, processes

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, place = divmod(index, self._rows_per_step)
        turn, process = divmod(place, self._processes)
        return self._parent[step * self._rows_per_step + process * (self._rows_per_step // self._processes) + turn]


def _elastic(rows: grain.MapDataset, rows_per_step: int, workers: int) -> grain.DatasetIterator:
    """Batches of this process's share of `rows`, prepared by threads or by `workers` processes."""
    options = None
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which we do not use
        options = grain.MultiprocessingOptions(num_workers=workers)
    share = grain.sharding.ShardByJaxProcess()
    rows = _Shares(rows, rows_per_step, share.shard_count)
    return iter(grain.experimental.ElasticIterator(rows, rows_per_step, share, multiprocessing_options=options))


def pretrain_batches(
    segments: Documents,
    settings: RowSettings,
    *,
    branch_count: int,
    rows_per_step: int,
    workers: int = 0,
    epochs: int | None = None,
    bad: BadRows | None = None,
) -> grain.DatasetIterator:
    """Batches of `rows_per_step` rows (over all processes), each of `branch_count` segments; endless without `epochs`.

    A streamed data set is read once, in windows of shuffled segments, by every process in full; `bad` counts its rows
    that are left out, and the position that is saved holds the count.
    """

    def row(group: Sequence[dict[str, Any]]) -> RowArrays:
        return lay_out([branch_sample(group)], "all", settings)

    if isinstance(segments, datasets.IterableDataset):
        stream = grain.experimental.WindowShuffleIterDataset(
            _Stream(segments, bad or BadRows()), window_size=SHUFFLE_WINDOW, seed=settings.seed
        )
        stream = stream.batch(branch_count, drop_remainder=True, batch_fn=row)
        share = grain.sharding.ShardByJaxProcess()
        per_step = stream.batch(rows_per_step, drop_remainder=True)
        return iter(
            per_step.map(
                lambda batch: {
                    name: np.split(array, share.shard_count)[share.shard_index] for name, array in batch.items()
                }
            )
        )
    least = branch_count * (1 if epochs is None else rows_per_step)
    if len(segments) < least:
        raise InputError(
            f"the documents give {len(segments)} segments of --seq-length {settings.length // branch_count}, "
            f"{least} are needed (for {least // branch_count} rows of --branch-count {branch_count}); use more "
            "documents, a smaller --seq-length or fewer branches"
        )
    source: Any = segments  # indexed by row, as grain wants it
    rows = grain.MapDataset.source(source).shuffle(settings.seed).batch(branch_count, drop_remainder=True, batch_fn=row)
    return _elastic(rows.repeat(epochs), rows_per_step, workers)


def finetune_rows(sizes: Sequence[int], length: int, epochs: int, seed: int) -> list[list[int]]:
    """Which samples share a row: every sample once an epoch, in a new order each epoch, packed first-fit."""
    rows = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(sizes))
        rows += [[int(order[i]) for i in group] for group in pack([sizes[i] for i in order], length)]
    return rows


def finetune_batches(
    samples: Sequence[TokenSample],
    rows: list[list[int]],
    settings: RowSettings,
    *,
    rows_per_step: int,
    workers: int = 0,
) -> grain.DatasetIterator:
    """`rows` (lists of indices into `samples`) in order; the last batch is filled up with rows of PAD."""
    full = rows + [[]] * (-len(rows) % rows_per_step)

    def row(group: list[int]) -> RowArrays:
        return lay_out([samples[i] for i in group], "answers", settings)

    return _elastic(grain.MapDataset.source(full).map(row), rows_per_step, workers)
