"""SQuAD: questions grouped by the context they are about, from the hub or from a local file.

Two layouts are read. The official one nests `data[].paragraphs[].qas[]`; the hub's has one flat row a question (id,
title, context, question, answers{text[]}). Both become flat rows, and rows with the same context become one `Context`.
"""

import gzip
import json
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pd_jax.data.text import BadRows, tokenise, tokenise_background
from pd_jax.errors import InputError, check_text
from pd_jax.layout import Branch, Sample, TokenSample, fit, members

OFFICIAL_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/{}-v1.1.json"
OFFICIAL_FILES = {"train": "train", "validation": "dev"}  # split -> file name, for `rajpurkar/squad`
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
ADVICE = "pass a local SQuAD file (.json, .json.gz, .jsonl, .jsonl.gz or .parquet) as --dataset-name"

Located = tuple[str, Any]  # where a row stands (for messages), and the row or the `InputError` that reading it raised


@dataclass(frozen=True)
class Question:
    """A question and all its gold answers, stripped, at least one."""

    id: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """A text and the questions about it."""

    title: str
    text: str
    questions: tuple[Question, ...]


def load_squad(
    name: str, split: str = "train", local_files_only: bool = False, bad: BadRows | None = None
) -> list[Context]:
    """All contexts of `name`: a local file, a local copy of a hub repository, or a hub id; in the data's order.

    A local file is one split; `split` is ignored then. `bad` counts questions that cannot be used, where it skips them.
    Raises `InputError` for a path that is not there, a file that is not SQuAD data (which key is missing where), a
    question or an answer that is empty or no text (with its row and id), or an unreachable hub.
    """
    path = Path(name)
    if path.is_file():
        rows = file_rows(path)
    elif name.endswith(SUFFIXES):
        raise InputError(f"{name} does not exist; {ADVICE}")
    else:
        rows = _hub_rows(name, split, local_files_only)
    contexts = _group(rows, bad or BadRows())
    if not contexts:
        raise InputError(f"{name} has no questions; {ADVICE}")
    return contexts


def select(
    contexts: Iterable[Context], max_branches: int, min_questions: int, max_samples: int | None, seed: int | None = None
) -> list[Context]:
    """`max_samples` of the contexts that have `min_questions`, each with its first `max_branches` questions, in the
    data's order: drawn by `seed`, because neighbours are about one subject, or (None) the first."""
    if min_questions > max_branches:
        raise InputError(f"--min-questions {min_questions} is above --max-branches {max_branches}; lower one of them")
    chosen = [c for c in contexts if len(c.questions) >= min_questions]
    if seed is not None and max_samples is not None and max_samples < len(chosen):
        drawn = np.random.default_rng(seed).choice(len(chosen), max_samples, replace=False)
        chosen = [chosen[i] for i in sorted(drawn)]
    chosen = chosen[:max_samples]
    if not chosen:
        raise InputError(f"no context has {min_questions} questions; lower --min-questions (or raise the sample limit)")
    return [Context(c.title, c.text, c.questions[:max_branches]) for c in chosen]


def background_text(context: Context) -> str:
    return f"Context: {context.text}\n"


def prompt_text(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def answer_text(answer: str) -> str:
    return f" {answer}"


def to_sample(context: Context) -> Sample:
    """The context and its questions as text, for decoding."""
    return Sample(background_text(context), [prompt_text(q) for q in context.questions])


def to_tokens(context: Context, tokenizer: Any, end: int) -> TokenSample:
    """The context, its questions and their first gold answers as ids; the pieces are tokenised one by one."""

    def branch(question: Question) -> Branch:
        answer = tokenise(tokenizer, answer_text(question.answers[0]))
        return Branch(tokenise(tokenizer, prompt_text(question)), answer, end)

    background = tokenise_background(tokenizer, background_text(context))
    return TokenSample(background, [branch(q) for q in context.questions])


def fitted_samples(
    contexts: Sequence[Context], tokenizer: Any, end: int, length: int, name: str
) -> tuple[list[TokenSample], str]:
    """The samples of `contexts` within `length` tokens, and a line that counts what was shortened and dropped.

    Raises `InputError` when none of data set `name` fits.
    """
    return fit_all([to_tokens(context, tokenizer, end) for context in contexts], length, name)


def fit_all(whole: Sequence[TokenSample], length: int, name: str) -> tuple[list[TokenSample], str]:
    """The samples of data set `name` that fit into `length` tokens, and the line of `fitted_samples`."""
    fitted = [fit(sample, length) for sample in whole]
    kept = [sample for sample in fitted if sample is not None]
    cut = sum(new is not None and new is not old for new, old in zip(fitted, whole, strict=True))
    if not kept:
        raise InputError(
            f"no context of {name} fits --max-length {length}: the shortest needs "
            f"{min(len(s) - len(s.background) for s in whole)} tokens; raise it or lower --max-branches"
        )
    questions = sum(len(members(turn)) for sample in kept for turn in sample.turns)
    return kept, (
        f"{name}: {len(kept)} contexts, {questions} questions; {cut} backgrounds "
        f"shortened and {len(whole) - len(kept)} contexts dropped to fit --max-length {length}"
    )


def _get(value: Any, key: str, kind: Any, where: str) -> Any:
    """value[key], checked. `where` names the file and the place in it."""
    if not isinstance(value, dict) or key not in value:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{where} has no {key!r} (found: {found}); this is not SQuAD data; {ADVICE}")
    if not isinstance(value[key], kind):
        wanted = getattr(kind, "__name__", kind)
        raise InputError(f"{where}: {key!r} is {type(value[key]).__name__}, not {wanted}; {ADVICE}")
    return value[key]


def _group(rows: Iterable[Located], bad: BadRows) -> list[Context]:
    """Rows with the same context text become one `Context`, in order of first appearance."""
    titles: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for where, row in rows:
        try:
            title, context, question = _question(where, row)
        except InputError as error:
            bad.meet(error)
            continue
        titles.setdefault(context, title)
        questions.setdefault(context, []).append(question)
    return [Context(titles[text], text, tuple(asked)) for text, asked in questions.items()]


def _question(where: str, row: Any) -> tuple[str, str, Question]:
    """Title, context and question of a row; its answers as the hub or as the official file nests them."""
    if isinstance(row, InputError):
        raise row
    answers = _get(row, "answers", dict | list, where)
    if isinstance(answers, dict):
        given = _get(answers, "text", list, f"{where}.answers")
    else:
        given = [_get(answer, "text", object, f"{where}.answers[{i}]") for i, answer in enumerate(answers)]
    identity = row.get("id", where)
    if not isinstance(identity, int) or isinstance(identity, bool):  # a number names a question as well as text does
        check_text(identity, f"{where}: 'id'")
    named = f"{where}: question {str(identity)!r}"
    title = check_text(row.get("title", ""), f"{named}: 'title'")
    context = check_text(_get(row, "context", object, where), f"{named}: 'context'").strip()
    text = check_text(_get(row, "question", object, where), f"{named}: 'question'").strip()
    texts = tuple(check_text(answer, f"{named}: an answer").strip() for answer in given)
    if not text:
        raise InputError(f"{named} is empty; remove it from the data")
    if not texts or not all(texts):
        raise InputError(
            f"{named} has {'an empty answer' if texts else 'no answer'}; every question needs answers (unanswerable "
            "questions, as in SQuAD 2.0, are not supported)"
        )
    return title, context, Question(str(identity), text, texts)


def _article_rows(articles: list[Any], source: str) -> Iterator[Located]:
    """The official nested layout as rows."""
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{source}: data[{a}]")):
            place = f"{source}: data[{a}].paragraphs[{p}]"
            above = {"title": article.get("title", ""), "context": _get(paragraph, "context", object, place)}
            for q, qa in enumerate(_get(paragraph, "qas", list, place)):
                yield f"{place}.qas[{q}]", {**qa, **above} if isinstance(qa, dict) else qa


def file_rows(path: Path) -> Iterable[Located]:
    """The rows of a local file in either layout."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path} has no known suffix; {ADVICE}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return _numbered(pyarrow.parquet.read_table(path).to_pylist(), str(path))
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} is not a parquet file: {error}") from None
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        if ".jsonl" in path.suffixes:
            return _numbered([json_line(line) for line in text.split("\n") if line.strip()], str(path))
        return _json_rows(json.loads(text), str(path))
    except (OSError, zlib.error, EOFError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not readable as {'JSON lines' if '.jsonl' in path.name else 'JSON'}: {error}"
        ) from None


def json_line(line: str | bytes) -> Any:
    """What a line of JSON lines holds, or what is wrong with it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON: {error}")


def _json_rows(content: Any, source: str) -> Iterable[Located]:
    """A JSON value: a list of flat rows, or the official layout."""
    if isinstance(content, list):
        return _numbered(content, source)
    return _article_rows(_get(content, "data", list, source), source)


def _numbered(rows: Iterable[Any], source: str) -> Iterator[Located]:
    for i, row in enumerate(rows):
        where = f"{source}: row {i}"
        yield where, InputError(f"{where} is {row}") if isinstance(row, InputError) else row


def _hub_rows(name: str, split: str, local_files_only: bool) -> Iterable[Located]:
    """The rows of a hub data set (or a local copy of its repository), else those of the official file.

    Offline nothing is tried over the network: `datasets` would retry for half a minute before it gives up.
    """
    import datasets
    import huggingface_hub

    source, offline = name, local_files_only or huggingface_hub.is_offline_mode()
    try:
        if offline and not Path(name).is_dir():
            try:
                source = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
            except OSError:
                # Only with HF_HUB_OFFLINE=1 does `datasets` look into its own cache and stay off the network.
                if not huggingface_hub.is_offline_mode():
                    raise
        return _numbered(datasets.load_dataset(source, split=split), f"{name} [{split}]")
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        if offline or name != "rajpurkar/squad" or split not in OFFICIAL_FILES:
            raise InputError(f"data set {name!r} [{split}] cannot be loaded ({reason}); {ADVICE}") from None
    url = OFFICIAL_URL.format(OFFICIAL_FILES[split])
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return _json_rows(json.load(response), url)
    except (OSError, ValueError) as error:
        raise InputError(f"neither the hub ({reason}) nor {url} ({error}) can be reached; {ADVICE}") from None
