"""Answer several questions about one text at once and show the columns as they arrive.

    python scripts/demo.py
    python scripts/demo.py --model-name ./parallel-decoder-squad
    python scripts/demo.py --model-name ./adapter --base-model Qwen/Qwen3-4B --background "..." --questions "..." "..."
    python scripts/demo.py --background "..." --questions "..." "..." --follow-up "..." --follow-up "= In short:"
    python scripts/demo.py --interactive

Without a model it takes the small one of this repository (scripts/quickstart-columns), which knows a made-up world. A
follow-up is asked behind the answers, and nothing is read again; one that begins with = is no question: the text itself
goes on with what stands behind the =, and has seen all answers. --interactive reads follow-ups from the keyboard.
"""  # fmt: skip

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pd_jax.cli import flag, given, parse, run
from pd_jax.config import Align, Visibility
from pd_jax.errors import InputError

if TYPE_CHECKING:
    from pd_jax import Event, ParallelDecoder, Sample, SamplingParams
    from pd_jax.jobs import Lanes

SMALL = Path(__file__).parent / "quickstart-columns"
ABOUT_SMALL = (
    "The small model of this repository answers (0.7 M parameters). It knows short English and Chinese sentences of a "
    "made-up world (where people live and were born, what they do, keep and play), told in the text or in a sibling's "
    "question, and nothing else. A real one: python scripts/demo.py --model-name Qwen/Qwen3-0.6B --pair-indices "
    "--visibility isolated --align ragged"
)
# Of that world, about people whom its training never saw. The second: every branch is asked what a sibling was told.
EXAMPLES = [
    (
        "Dario Holt was born in early June. Clara Ibsen plays the organ. Clara Ibsen lives in Port Marden. "
        "Dario Holt works as a night baker.",
        ["What does Clara Ibsen play?", "When was Dario Holt born?", "What does Dario Holt work as?"],
    ),
    (
        "Paula Moor plays the little organ. Edith Caspari was born in late March.",
        [
            "Edith Caspari lives in Lindow. What animal does Paula Moor keep?",
            "Paula Moor keeps a white parrot. What does Edith Caspari work as?",
            "Edith Caspari works as a school pilot. Where does Edith Caspari live?",
        ],
    ),
    (
        "赵志梅的职业是小学厨师。赵志梅住在新石桥县。赵志梅爱喝杏仁茶。陈玉平出生于七月中旬。陈玉平养了一只黑色山羊。",
        ["赵志梅住在哪里？", "赵志梅爱喝什么？", "陈玉平养了一只什么动物？"],
    ),
]


@dataclass(frozen=True)
class Flags:
    model_name: str | None = flag(
        None,
        "model directory, pd_jax checkpoint, LoRA adapter or hub id; default: the small model of this repository",
        group="model",
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
    background: str | None = flag(None, "the text; without it three examples are answered", group="input")
    questions: tuple[str, ...] = flag((), "questions about it, one argument each", group="input")
    follow_up: tuple[str, ...] = flag((), "asked behind the answers, one by one; = begins a join", group="input")
    interactive: bool = flag(False, "go on with lines from the keyboard, until an empty one", group="input")
    max_new_tokens: int = flag(32, "tokens of an answer at most", group="decoding", minimum=1)
    do_sample: bool = flag(False, "draw tokens at random instead of the likeliest", group="decoding")
    temperature: float = flag(1.0, "divides the logits when sampling", group="decoding")
    repetition_penalty: float = flag(1.0, "above 1: what a branch has said gets less likely", group="decoding")
    seed: int = flag(0, "of the random numbers", group="decoding", minimum=0)
    verbose: bool = flag(False, "say how large the cache is", group="output")
    json: bool = flag(False, "print one JSON object a text instead", group="output")
    show_linear: bool = flag(False, "print the prompts column by column, as the model reads them", group="output")
    html: str | None = flag(None, "file for a replay in a browser", group="output")
    attention: bool = flag(False, "with --html: where the attention of every token goes", group="output")


def contexts(flags: Flags) -> list[tuple[str, list[str]]]:
    """Texts and the questions about them."""
    if flags.background is None and not flags.questions:
        return EXAMPLES
    if flags.background is None or not flags.questions:
        raise InputError("--background and --questions belong together; pass both, or neither for the examples")
    if empty := [text for text in flags.questions if not text.strip()]:
        raise InputError(f"--questions has an empty one, {empty[0]!r}; leave it out")
    return [(flags.background, list(flags.questions))]


def linear(decoder: "ParallelDecoder", sample: "Sample") -> Iterator[str]:
    """The prefilled tokens in the model's order, one column a line, each as branch:text; branch 0 is the background."""
    layout = decoder.layout([sample])
    columns: dict[int, list[str]] = {}
    for token, branch, column in zip(layout.tokens[0], layout.branch[0], layout.column[0], strict=True):
        columns.setdefault(int(column), []).append(f"{branch}:{decoder.tokenizer.decode([int(token)])!r}")
    for column, tokens in columns.items():
        yield f"column {column:4}  " + "  ".join(tokens)


def say(text: str) -> None:
    """A paragraph; on a terminal between words where lines end."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(text), soft_wrap=not console.is_terminal)
    print(flush=True)


def typed() -> Iterator[str]:
    """Lines until an empty one, or the end."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def turns(
    decoder: "ParallelDecoder", sample: "Sample", questions: list[str], later: Iterator[str], params: "SamplingParams"
) -> Iterator[tuple[list[str], Callable[[], Iterator["Event"]]]]:
    """What is asked, turn by turn, and what asks it."""
    from pd_jax.data.squad import Question, prompt_text

    session = decoder.session(sample.background)
    yield questions, partial(session.stream_fork, sample.branches, params=params)
    for line in later:
        if line.lstrip().startswith("="):
            text = line.lstrip()[1:].strip()
            yield [text], partial(session.stream_join, text, params=params)
        else:
            yield [line], partial(session.stream_fork, [prompt_text(Question("", line, ()))], params=params)


def show(questions: list[str], events: Iterator["Event"]) -> "Lanes":
    """The answers; on a terminal they grow there column by column, elsewhere they are said by `plain`."""
    from rich.console import Console
    from rich.live import Live

    from pd_jax.jobs import Lanes

    console, lanes = Console(highlight=False), Lanes(questions)
    lanes.take(next(events))  # what is logged on the way to the first column would tear the picture
    if not console.is_terminal:
        for event in events:
            lanes.take(event)
        return lanes
    with Live(lanes, console=console, auto_refresh=False) as live:
        live.refresh()
        for event in events:
            lanes.take(event)
            if lanes.over:  # whole answers may be longer than the screen
                live.vertical_overflow = "visible"
            live.refresh()
    return lanes


def plain(lanes: "Lanes") -> str:
    """One line a branch."""
    from pd_jax.jobs import one_line

    pairs = zip(lanes.questions, lanes.answers, strict=True)
    return "\n".join(f"{b}  {question}  {one_line(answer.strip())}" for b, (question, answer) in enumerate(pairs, 1))


def as_json(background: str, said: Sequence[tuple[list[str], "Lanes"]]) -> str:
    def content(questions: list[str], lanes: "Lanes") -> dict:
        answers = [
            {"question": question, "answer": answer, "finish_reason": reason}
            for question, answer, reason in zip(questions, lanes.answers, lanes.reasons, strict=True)
        ]
        return {"answers": answers, "columns": lanes.columns}

    (first, *later) = said
    more = {"later": [content(*turn) for turn in later]} if later else {}
    return json.dumps({"background": background, **content(*first), **more}, ensure_ascii=False)


def main() -> None:
    flags = parse(Flags, description=__doc__)
    if flags.verbose:
        logging.getLogger("pd_jax").setLevel(logging.INFO)
    if flags.model_name is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # too small for anything else
    from pd_jax import SamplingParams  # after parsing: --help does not wait
    from pd_jax.data.squad import Context, Question, to_sample
    from pd_jax.files import find_source
    from pd_jax.jobs import load_decoder

    # What can be wrong with the flags is found before the model is read.
    if "temperature" in given(flags) and not flags.do_sample:
        raise InputError(f"--temperature {flags.temperature} is for --do-sample; pass both, or leave it out")
    if flags.json and flags.show_linear:
        raise InputError("--json and --show-linear contradict each other; leave one out")
    if flags.json and flags.interactive:
        raise InputError("--json and --interactive contradict each other; leave one out")
    if flags.html is not None and (flags.follow_up or flags.interactive):
        raise InputError("--html shows the first answers only; leave out --follow-up and --interactive, or --html")
    if flags.follow_up and flags.background is None:
        raise InputError("--follow-up goes on with --background and --questions; pass them too")
    if empty := [text for text in flags.follow_up if not text.strip(" =")]:
        raise InputError(f"--follow-up has an empty one, {empty[0]!r}; leave it out")
    if flags.attention and flags.html is None:
        raise InputError("--attention is for --html; pass both, or leave it out")
    asked = contexts(flags)
    params = SamplingParams(
        max_new_tokens=flags.max_new_tokens,
        do_sample=flags.do_sample,
        temperature=flags.temperature,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
    )
    model, adapter = find_source(flags.model_name or str(SMALL), flags.base_model, flags.local_files_only)
    decoder = load_decoder(
        model,
        adapter,
        dtype=flags.dtype,
        visibility=flags.visibility,
        align=flags.align,
        pair_indices=flags.pair_indices,
        local_files_only=flags.local_files_only,
    )
    if flags.model_name is None and not flags.json:
        say(ABOUT_SMALL)
    samples = [to_sample(Context("", text, tuple(Question("", q, ()) for q in questions))) for text, questions in asked]
    for (text, questions), sample in zip(asked, samples, strict=True):
        if not flags.json:
            say(text.strip())
        if flags.show_linear:
            print("\n".join(linear(decoder, sample)), end="\n\n")
        if flags.follow_up or (flags.interactive and sample is samples[-1]):
            later = chain(flags.follow_up, typed() if flags.interactive else ())
            parts = turns(decoder, sample, questions, later, params)
        else:
            parts = iter([(questions, partial(decoder.stream, sample, params=params))])
        said = []
        for asked_now, ask in parts:
            try:
                said.append((asked_now, show(asked_now, ask())))
            except InputError as error:
                if not (flags.interactive and said):
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            if not flags.json:
                print("" if sys.stdout.isatty() else plain(said[-1][1]) + "\n", flush=True)
        if flags.json:
            print(as_json(sample.background, said), flush=True)
    if flags.html is not None:
        from pd_jax.replay import record, write_page

        again = [(sample, *decoder.generate([sample], params=params)) for sample in samples]  # the tokens of `stream`
        write_page([record(decoder, *each, attention=flags.attention) for each in again], Path(flags.html))
        print(f"written: {flags.html}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
