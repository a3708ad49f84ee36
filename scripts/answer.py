"""Answer a file: many documents, many questions each, all questions of a document at once.

    python scripts/answer.py --model-name ./parallel-decoder-squad --input samples.jsonl --output answers.jsonl
    python scripts/answer.py --model-name Qwen/Qwen3-0.6B --plain --input dev-v1.1.json --output answers.jsonl

A line of the input is {"id": "a", "background": "the text that all share", "branches": ["a prompt", "another"]}, if
wanted with "max_new_tokens" (a number, or one a branch); a .parquet file has these columns. Questions in SQuAD's format
are read too. Every line becomes {"id": "a", "answers": ["...", "..."], "finish_reasons": ["eos", "length"]}, in the
order of the input. Run again, it goes on where it was stopped. With --html the first documents can be watched.
"""  # fmt: skip

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pd_jax.cli import flag, given, parse, run
from pd_jax.config import Align, Visibility
from pd_jax.errors import InputError

if TYPE_CHECKING:
    from pd_jax import ParallelDecoder
    from pd_jax.jobs import Request, Settings

REPLAYED = 20  # documents


@dataclass(frozen=True)
class Flags:
    model_name: str = flag(
        "./parallel-decoder-squad", "model directory, pd_jax checkpoint, LoRA adapter or hub id", group="model"
    )
    base_model: str | None = flag(None, "what a LoRA adapter belongs to, if not what it names itself", group="model")
    plain: bool = flag(
        False, "stock weights as they are: isolated, ragged, no branch pairs; transformers' own answers", group="model"
    )
    visibility: Visibility | None = flag(
        None, "which siblings a branch sees; as in training if not given", group="model"
    )
    align: Align | None = flag(None, "how prompts share columns; as in training if not given", group="model")
    pair_indices: tuple[int, ...] | None = flag(None, "RoPE pairs if none are stored", group="model")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "auto: float32 on CPU, bfloat16 elsewhere", group="model"
    )
    local_files_only: bool = flag(False, "never ask the hub", group="model")
    input: str | None = flag(None, ".jsonl, .jsonl.gz or .parquet, or SQuAD's format; required", group="files")
    output: str | None = flag(None, "the file of answers, JSON lines; required", group="files")
    skip_bad_rows: bool = flag(False, "leave out lines that cannot be used, and count them", group="files")
    max_new_tokens: int = flag(
        32, "tokens of an answer at most, where the line does not say", group="answers", minimum=1
    )
    stop: tuple[str, ...] = flag((), "strings that end an answer", group="answers")
    batch_size: int = flag(8, "documents answered at once", group="answers", minimum=1)
    html: str | None = flag(
        None, f"file for a replay of the first {REPLAYED} documents, answered once more", group="replay"
    )
    attention: bool = flag(False, "with --html: where the attention of every token goes", group="replay")


def plainly(flags: Flags) -> Flags:
    """What --plain means. Raises `InputError` when something else is asked for too."""
    if not flags.plain:
        return flags
    for name in ("visibility", "align", "pair_indices"):
        if name in given(flags):
            raise InputError(f"--plain and --{name.replace('_', '-')} contradict each other; leave one out")
    return replace(flags, visibility="isolated", align="ragged", pair_indices=())


def replay(
    decoder: "ParallelDecoder", requests: "Sequence[Request]", settings: "Settings", path: Path, attention: bool
) -> None:
    """The page of the first documents, without those that are too long for it. They are answered again: what a stopped
    job had done has left no tokens."""
    from pd_jax.data.text import BadRows
    from pd_jax.jobs import answer_batches
    from pd_jax.replay import MOST_TOKENS, record, write_page

    batches = answer_batches(decoder, iter(requests[:REPLAYED]), settings, BadRows(skip=True))
    records = [
        record(decoder, sample, result, title=request.id, attention=attention)
        for request, sample, result in sorted(chain.from_iterable(batches), key=lambda answered: answered[0].line)
        if len(sample) + sum(len(branch.token_ids) for branch in result.branches) <= MOST_TOKENS
    ]
    write_page(records, path)
    print(f"{path}: a replay of {len(records)} documents")


def main() -> None:
    flags = plainly(parse(Flags, description=__doc__))
    if flags.attention and flags.html is None:
        raise InputError("--attention is for --html; pass both, or leave it out")
    if flags.input is None or flags.output is None:
        raise InputError("--input and --output are required: a file of documents and the file for their answers")
    path, output = Path(flags.input), Path(flags.output)
    from pd_jax.data.prints import data_prints
    from pd_jax.data.text import BadRows
    from pd_jax.files import find_source, fingerprint
    from pd_jax.jobs import Progress, Settings, answer_requests, load_decoder, open_answers, read_requests

    bad = BadRows(flags.skip_bad_rows)
    requests = list(read_requests(path, bad))  # a bad line is found before any work
    if not requests:
        raise InputError(f"{path} has no documents{bad.summary()}")
    model, adapter = find_source(flags.model_name, flags.base_model, flags.local_files_only)
    settings = Settings(flags.max_new_tokens, flags.stop, flags.batch_size)
    about = {
        "input": data_prints([flags.input])[flags.input],
        "weights": [fingerprint(part) for part in (model, adapter) if part is not None],
        "max_new_tokens": flags.max_new_tokens,
        "stop": list(flags.stop),
        "visibility": flags.visibility,
        "align": flags.align,
        "pair_indices": None if flags.pair_indices is None else list(flags.pair_indices),
        "dtype": flags.dtype,
        "skip_bad_rows": flags.skip_bad_rows,
    }
    with open_answers(output, about) as (file, done):
        if done:
            print(f"going on behind {len(done)} of {len(requests)} documents", flush=True)
        decoder = load_decoder(
            model,
            adapter,
            dtype=flags.dtype,
            visibility=flags.visibility,
            align=flags.align,
            pair_indices=flags.pair_indices,
            local_files_only=flags.local_files_only,
        )
        progress = Progress(len(requests) - len(done), lambda line: print(line, flush=True))
        answer_requests(decoder, requests, file, done, settings, bad, progress)
    print(f"{output}: {progress.line()}{bad.summary()}")
    if flags.html is not None:
        replay(decoder, requests, settings, Path(flags.html), flags.attention)


if __name__ == "__main__":
    run(main)
