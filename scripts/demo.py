"""Answer several questions about one text at once and show the columns as they arrive.

    python scripts/demo.py --model-name ./parallel-decoder-squad
    python scripts/demo.py --model-name ./adapter --base-model Qwen/Qwen3-4B --background "..." --questions "..." "..."
"""  # fmt: skip

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pd_jax.cli import flag, given, parse, run
from pd_jax.config import Align, Visibility
from pd_jax.errors import InputError

if TYPE_CHECKING:
    from pd_jax import ParallelDecoder, Sample, SamplingParams

EXAMPLES = [
    (
        "The lighthouse of Arnholm was built in 1874 from grey granite. Its keeper, Ida Lund, lit the lamp every "
        "evening for thirty-one years, and her log books are now in the museum of the town.",
        ["When was the lighthouse built?", "Who lit the lamp?", "Where are the log books now?"],
    ),
    (
        "青石桥建于一九二三年，全长八十六米，横跨清水河。设计这座桥的是工程师林文远，桥头的石狮由当地工匠雕刻。",
        ["青石桥有多长？", "谁设计了这座桥？"],
    ),
]


@dataclass(frozen=True)
class Flags:
    model_name: str = flag(
        "./parallel-decoder-squad", "model directory, pd_jax checkpoint, LoRA adapter or hub id", group="model"
    )
    base_model: str | None = flag(None, "what a LoRA adapter belongs to, if not what it names itself", group="model")
    visibility: Visibility | None = flag(
        None, "which siblings a branch sees; as in training if not given", group="model"
    )
    align: Align | None = flag(None, "how prompts share columns; as in training if not given", group="model")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "auto: float32 on CPU, bfloat16 elsewhere", group="model"
    )
    pair_indices: tuple[int, ...] | None = flag(None, "RoPE pairs if none are stored", group="model")
    local_files_only: bool = flag(False, "never ask the hub", group="model")
    background: str | None = flag(None, "the text; without it two examples are answered", group="input")
    questions: tuple[str, ...] = flag((), "questions about it, one argument each", group="input")
    max_new_tokens: int = flag(32, "tokens of an answer at most", group="decoding", minimum=1)
    do_sample: bool = flag(False, "draw tokens at random instead of the likeliest", group="decoding")
    temperature: float = flag(1.0, "divides the logits when sampling", group="decoding")
    repetition_penalty: float = flag(1.0, "above 1: what a branch has said gets less likely", group="decoding")
    seed: int = flag(0, "of the random numbers", group="decoding", minimum=0)
    verbose: bool = flag(False, "say how large the cache is", group="output")
    show_linear: bool = flag(False, "print the prompts column by column, as the model reads them", group="output")
    html: str | None = flag(None, "file for a replay in a browser", group="output")
    attention: bool = flag(False, "with --html: where the attention of every token goes", group="output")


def samples(flags: Flags) -> "list[Sample]":
    from pd_jax.data.squad import Context, Question, to_sample

    if flags.background is None and not flags.questions:
        given = EXAMPLES
    elif flags.background is None or not flags.questions:
        raise InputError("--background and --questions belong together; pass both, or neither for the examples")
    else:
        given = [(flags.background, list(flags.questions))]
    if empty := [text for _, questions in given for text in questions if not text.strip()]:
        raise InputError(f"--questions has an empty one, {empty[0]!r}; leave it out")
    return [to_sample(Context("", text, tuple(Question("", q, ()) for q in questions))) for text, questions in given]


def linear(decoder: "ParallelDecoder", sample: "Sample") -> Iterator[str]:
    """The prefilled tokens in the model's order, one column a line, each as branch:text; branch 0 is the background."""
    layout = decoder.layout([sample])
    columns: dict[int, list[str]] = {}
    for token, branch, column in zip(layout.tokens[0], layout.branch[0], layout.column[0], strict=True):
        columns.setdefault(int(column), []).append(f"{branch}:{decoder.tokenizer.decode([int(token)])!r}")
    for column, tokens in columns.items():
        yield f"column {column:4}  " + "  ".join(tokens)


def answer(decoder: "ParallelDecoder", sample: "Sample", params: "SamplingParams", show_linear: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    print(f"\n{sample.background.strip()}\n")
    if show_linear:
        print("\n".join(linear(decoder, sample)), end="\n\n")
    answers = ["" for _ in sample.branches]

    def table() -> Table:
        grid = Table("branch", "prompt", "answer")
        for b, (prompt, text) in enumerate(zip(sample.branches, answers, strict=True), start=1):
            grid.add_row(str(b), Text(prompt), Text(text.strip()))
        return grid

    with Live(table(), console=console, auto_refresh=False) if console.is_terminal else console as live:
        for event in decoder.stream(sample, params=params):
            answers = [text + new for text, new in zip(answers, event.texts, strict=True)]
            if isinstance(live, Live):
                live.update(table(), refresh=True)
            else:
                print(f"column {event.column:3}  " + "  ".join(f"{b}:{new!r}" for b, new in enumerate(event.texts, 1)))
    if not console.is_terminal:
        print()
    for prompt, text in zip(sample.branches, answers, strict=True):
        print(f"{prompt}{text}\n")


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.verbose:
        logging.getLogger("pd_jax").setLevel(logging.INFO)
    from pd_jax import SamplingParams  # after parsing: --help does not wait
    from pd_jax.files import find_source
    from pd_jax.jobs import load_decoder

    # What can be wrong with the flags is found before the model is read.
    if "temperature" in given(flags) and not flags.do_sample:
        raise InputError(f"--temperature {flags.temperature} is for --do-sample; pass both, or leave it out")
    if flags.attention and flags.html is None:
        raise InputError("--attention is for --html; pass both, or leave it out")
    asked = samples(flags)
    params = SamplingParams(
        max_new_tokens=flags.max_new_tokens,
        do_sample=flags.do_sample,
        temperature=flags.temperature,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
    )
    model, adapter = find_source(flags.model_name, flags.base_model, flags.local_files_only)
    decoder = load_decoder(
        model,
        adapter,
        dtype=flags.dtype,
        visibility=flags.visibility,
        align=flags.align,
        pair_indices=flags.pair_indices,
        local_files_only=flags.local_files_only,
    )
    for sample in asked:
        answer(decoder, sample, params, flags.show_linear)
    if flags.html is not None:
        from pd_jax.replay import record, write_page

        again = [(sample, *decoder.generate([sample], params=params)) for sample in asked]  # the tokens of `stream`
        write_page([record(decoder, *each, attention=flags.attention) for each in again], Path(flags.html))
        print(f"written: {flags.html}")


if __name__ == "__main__":
    run(main)
