"""Sessions: many forks over one background, read once, against a call for every fork and against transformers; and many
passages, as branches with the question in the trunk, against one background of all of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pd_jax.benchmarks.ablation import Cell, Recipe, run_cell
from pd_jax.benchmarks.models import in_transformers, shape_of, tokens_only
from pd_jax.benchmarks.timing import Contender, Timing, fastest, import_torch
from pd_jax.cli import flag
from pd_jax.layout import Branch, TokenSample, members
from pd_jax.tasks import total

SESSION, CALLS, KEPT = "session", "a call a fork", "transformers, kept cache"


@dataclass(frozen=True)
class SessionsFlags:
    model: str = flag("29m", "shape of the random weights: 29m or a hub id like Qwen/Qwen3-0.6B")
    background: int = flag(4096, "tokens of the background", minimum=1)
    forks: int = flag(5, "forks over it, one after the other", minimum=1)
    questions: int = flag(8, "branches of every fork", minimum=1)
    prompt: int = flag(16, "tokens of every question", minimum=1)
    new_tokens: int = flag(32, "tokens of every answer; none ends earlier", minimum=1)
    passages: tuple[int, ...] = flag((4, 16), "how many passages are read; 0: none", minimum=0)
    passage_length: int = flag(512, "tokens of a passage", minimum=1)
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: float32 on a CPU, bfloat16 elsewhere")
    transformers: bool = flag(True, "compare with transformers where torch is installed")
    learn: bool = flag(True, "train small models that count in branches and say the total in a join, minutes")
    threads: int = flag(2, "on a CPU: 1 counts the process's own time, more the clock's", minimum=1)
    repeat: int = flag(3, "calls of which the fastest counts", minimum=1)


def with_kept_cache(
    model: Any, torch: Any, background: list[int], forks: list[list[list[int]]], new: int
) -> list[list[list[int]]]:
    """What transformers answers to every fork, its prompts equally long: the background is read once, into a cache that
    is copied for every branch of every fork."""
    from transformers import DynamicCache

    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    with torch.no_grad():
        kept = DynamicCache(config=model.config)
        given = torch.tensor([background], device=model.device)
        model(given, past_key_values=kept, use_cache=True, logits_to_keep=1)
        answers = []
        for prompts in forks:
            copied = copy.deepcopy(kept)
            copied.batch_repeat_interleave(len(prompts))
            ids = torch.tensor([background + prompt for prompt in prompts], device=model.device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=copied, **settings)
            answers.append(out[:, ids.shape[1] :].tolist())
    return answers


def time_sessions(flags: SessionsFlags) -> None:
    """Print whole seconds, how many times as fast as a call a fork, and memory as a share of the least cache that holds
    everything once."""
    import jax
    import numpy as np

    from pd_jax.decoding import ParallelDecoder, cache_bytes
    from pd_jax.params import init_params

    on_cpu = jax.devices()[0].platform == "cpu"
    cpu_time = on_cpu and flags.threads == 1
    dtype: Any = flags.dtype if flags.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    longest = max(flags.passages, default=0) * flags.passage_length + flags.background + 64 * flags.new_tokens
    config, rng = replace(shape_of(flags.model), max_position_embeddings=max(longest, 32768)), np.random.default_rng(0)
    params = init_params(config, jax.random.key(0, impl="rbg"), dtype)
    torch: Any = import_torch(flags.threads) if flags.transformers else None
    theirs = None if torch is None else in_transformers(config, params, dtype, "cpu" if on_cpu else "cuda")
    vocabulary = config.vocab_size
    # Isolated, without waiting and without pairs: what every contender computes is the same.
    decoder = ParallelDecoder(
        config, params, tokens_only(vocabulary), (), dtype=dtype, visibility="isolated", align="ragged"
    )

    def bytes_of(tokens: int) -> float:
        return cache_bytes(config, samples=1, tokens=tokens, branches=0, columns=0, dtype=dtype) / 1e6

    # --- forks
    new, questions = flags.new_tokens, flags.questions
    background = rng.integers(vocabulary, size=flags.background).tolist()
    forks = rng.integers(vocabulary, size=(flags.forks, questions, flags.prompt)).tolist()
    said: dict[str, Any] = {}
    # Room for everything, and for the static size of the last block that is read.
    kept = flags.forks * questions * (flags.prompt + new)
    room = kept + questions * flags.prompt

    def session() -> None:
        ours = decoder.session(background, room=room)
        results = [ours.fork(prompts, max_new_tokens=new) for prompts in forks]
        said[SESSION] = [[list(b.token_ids) for b in result.branches] for result in results]

    def calls() -> None:
        samples = [TokenSample(background, [Branch(prompt) for prompt in prompts]) for prompts in forks]
        results = [decoder.generate([sample], max_new_tokens=new)[0] for sample in samples]
        said[CALLS] = [[list(b.token_ids) for b in result.branches] for result in results]

    contenders = {SESSION: Contender(session, compiles=True), CALLS: Contender(calls, compiles=True)}
    if theirs is not None:

        def with_transformers() -> None:
            said[KEPT] = with_kept_cache(theirs, torch, background, forks, new)

        contenders[KEPT] = Contender(with_transformers)
    timings = fastest(contenders, flags.repeat, cpu_time)
    title = f"{flags.forks} forks of {questions} questions over {flags.background} tokens, {flags.model} {dtype}"
    _show(title, timings, CALLS, bytes_of(flags.background + kept))
    for name in said:  # later forks of a session stand in later columns, and so say something else
        same = np.mean(np.asarray(said[name][0]) == np.asarray(said[CALLS][0]))
        print(f"{name}: {same:.1%} of the first fork's tokens are those of {CALLS!r}")

    # --- passages
    for count in (n for n in flags.passages if n):
        passages = rng.integers(vocabulary, size=(count, flags.passage_length)).tolist()
        question = rng.integers(vocabulary, size=flags.prompt).tolist()
        _show(
            f"{count} passages of {flags.passage_length} tokens and a question",
            fastest(_readers(decoder, passages, question, new), flags.repeat, cpu_time),
            "one background",
            bytes_of(count * flags.passage_length + flags.prompt + new),
        )

    if flags.learn:
        _show_learned()


def _show_learned() -> None:
    """Isolated branches count, and whoever says the total is the trunk, or a branch that does not see them."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="total: 4 branches count, isolated, and the total is said by")
    for name in ("", "columns decoded", "right, %", "best, %", "at step"):
        shown.add_column(name, justify="right" if name else "left")
    for who, task in (("a join", total.TASK), ("a branch", total.HIDDEN)):
        (run,) = run_cell(Cell("total", "pairs1", "isolated"), [0], Recipe(), task)
        (sample,) = task.samples(0, 1)
        columns = sum(max(len(text.answer) for text in members(turn)) for turn in sample.turns)
        right, best = run["accuracy"]["isolated"], run["optimum"]["isolated"] or 0.0
        shown.add_row(who, str(columns), f"{100 * right:.1f}", f"{100 * best:.1f}", str(run["steps"]))
    (sample,) = total.TASK.samples(0, 1)
    alone = sum(len(text.answer) for turn in sample.turns for text in members(turn))
    shown.add_row("one branch that counts all by itself", str(alone), "", "", "")
    Console(width=110).print(shown)


def _readers(decoder: Any, passages: list[list[int]], question: list[int], new: int) -> dict[Any, Contender]:

    size = len(passages) * len(passages[0]) + 2 * (len(question) + new)

    def branches() -> None:
        session = decoder.session([], room=size)
        session.fork(passages, max_new_tokens=0)
        session.join(question, max_new_tokens=new)

    def one_background() -> None:
        sample = TokenSample([token for passage in passages for token in passage], [Branch(question)])
        decoder.generate([sample], max_new_tokens=new)

    calls: dict[str, Callable[[], None]] = {"branches and a join": branches, "one background": one_background}
    return {name: Contender(call, compiles=True) for name, call in calls.items()}


def _show(title: str, timings: dict[str, Timing], reference: str, least: float) -> None:
    """A table; `least` are the MB of a cache that holds every token once."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for name in ("", "s", f"x {reference}", "MB", "MB / cache"):
        shown.add_column(name, justify="right" if name else "left")
    for name, timing in timings.items():
        memory = (
            ("", "") if timing.megabytes is None else (f"{timing.megabytes:.0f}", f"{timing.megabytes / least:.2f}")
        )
        ratio = timings[reference].seconds / timing.seconds
        shown.add_row(name, f"{timing.seconds:.2f}", f"{ratio:.2f}", *memory)
    Console(width=110).print(shown)
