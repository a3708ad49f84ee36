import copy
import gzip
import json
import os
from pathlib import Path

import pytest
import tiny
from tokenizers import processors

from pd_jax.data import squad
from pd_jax.data.squad import Context, Question, load_squad, select, to_sample, to_tokens
from pd_jax.data.text import tokenise_samples
from pd_jax.layout import Sample

QAS = [
    {"id": "a1", "question": " Where does Ann live? ", "answers": [{"text": " Rome ", "answer_start": 0}]},
    {"id": "a2", "question": "Where is Bob?", "answers": [{"text": "Oslo"}, {"text": "in Oslo"}]},
]
OFFICIAL = {
    "version": "1.1",
    "data": [
        {"title": "A", "paragraphs": [{"context": "Ann: Rome. Bob: Oslo.\n", "qas": QAS}]},
        {"title": "B", "paragraphs": [{"context": "Nothing is known.", "qas": []}]},
        {
            "title": "C",
            "paragraphs": [{"context": "塔是红色的。", "qas": [{**QAS[1], "id": "c1", "question": "塔？"}]}],
        },
    ],
}
WANTED = [
    Context(
        "A",
        "Ann: Rome. Bob: Oslo.",
        (Question("a1", "Where does Ann live?", ("Rome",)), Question("a2", "Where is Bob?", ("Oslo", "in Oslo"))),
    ),
    Context("C", "塔是红色的。", (Question("c1", "塔？", ("Oslo", "in Oslo")),)),
]
# One row a question, the rows of a context not next to one another.
FLAT = [
    {"id": q.id, "title": c.title, "context": c.text, "question": q.text, "answers": {"text": list(q.answers)}}
    for c, q in [(WANTED[i], WANTED[i].questions[j]) for i, j in ((0, 0), (1, 0), (0, 1))]
]


def write(path: Path, content) -> str:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_official_files(tmp_path, name):
    assert load_squad(write(tmp_path / name, OFFICIAL)) == WANTED


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz"])
def test_flat_rows_are_grouped_by_context(tmp_path, name):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FLAT)
    assert load_squad(write(tmp_path / name, lines if "jsonl" in name else FLAT)) == WANTED


def test_a_line_separator_inside_a_text_does_not_end_a_json_line(tmp_path):
    row = {**FLAT[0], "context": "one\u2028two"}
    assert load_squad(write(tmp_path / "x.jsonl", json.dumps(row, ensure_ascii=False)))[0].text == "one\u2028two"


def test_parquet_and_a_local_copy_of_a_hub_repository(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("x.parquet", "repository/data/validation-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(FLAT), tmp_path / name)
    assert load_squad(str(tmp_path / "x.parquet")) == WANTED
    assert load_squad(str(tmp_path / "repository"), "validation") == WANTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json is not readable as JSON"),
        ({"rows": []}, r"x.json has no 'data' \(found: \['rows'\]\)"),
        ({"data": [{"title": "A"}]}, r"x.json: data\[0\] has no 'paragraphs'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context'"),
        ({"data": [{"paragraphs": ["text"]}]}, r"data\[0\].paragraphs\[0\] has no 'context' \(found: str\)"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}, r"qas\[0\] has no 'answers'"),
        ({"data": {"a": 1}}, "x.json: 'data' is dict, not list"),
        ([{"id": "7", "context": "c", "answers": {"text": ["a"]}}], "x.json: row 0 has no 'question'"),
        ([{**FLAT[0], "answers": {"text": "Rome"}}], "row 0.answers: 'text' is str, not list"),
        ([FLAT[1], {**FLAT[0], "question": " "}], "row 1: question 'a1' is empty"),
        ([{**FLAT[0], "answers": {"text": []}}], "question 'a1' has no answer"),
        ([{**FLAT[0], "answers": {"text": ["Rome", " "]}}], "question 'a1' has an empty answer"),
        ({"data": []}, "x.json has no questions"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_squad(write(tmp_path / "x.json", content))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.json", "missing.json does not exist; pass a local SQuAD file"),
        ("rajpurkar/squad", r"'rajpurkar/squad' \[train\] cannot be loaded .* pass a local SQuAD file"),
    ],
)
def test_what_is_not_here_fails_at_once_offline(name, message):
    with pytest.raises(ValueError, match=message):
        load_squad(name)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"x\.csv has no known suffix"):
        load_squad(write(tmp_path / "x.csv", "a,b"))
    for name in ("x.json.gz", "x.parquet"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(ValueError, match=name):
            load_squad(str(tmp_path / name))


def test_the_official_file_stands_in_for_the_hub(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    source = write(tmp_path / "dev-v1.1.json", OFFICIAL)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(squad, "OFFICIAL_URL", f"file://{tmp_path}/{{}}-v1.1.json")
    assert load_squad("rajpurkar/squad", "validation") == WANTED
    Path(source).unlink()
    with pytest.raises(ValueError, match=r"neither the hub \(no route\) nor file://.*dev-v1.1.json .* can be reached"):
        load_squad("rajpurkar/squad", "validation")
    with pytest.raises(ValueError, match=r"'other/data' \[train\] cannot be loaded \(no route\)"):
        load_squad("other/data")


def test_some_contexts_are_drawn_by_the_seed_and_stay_in_order():
    contexts = [Context(str(i), str(i), (Question("", "q", ("a",)),)) for i in range(100)]
    drawn = select(contexts, 1, 1, 10, seed=3)
    places = [int(context.title) for context in drawn]
    assert places == sorted(set(places))
    assert len(places) == 10
    assert max(places) > 20  # not the first
    assert select(contexts, 1, 1, 10, seed=3) == drawn != select(contexts, 1, 1, 10, seed=4)
    assert select(contexts, 1, 1, 10) == contexts[:10]
    assert select(contexts, 1, 1, 200, seed=3) == contexts


def test_select():
    contexts = [Context("", str(n), tuple(Question(f"{n}{i}", "q", ("a",)) for i in range(n))) for n in range(1, 6)]
    chosen = select(contexts, max_branches=3, min_questions=2, max_samples=3)
    assert [(c.text, [q.id for q in c.questions]) for c in chosen] == [
        ("2", ["20", "21"]),
        ("3", ["30", "31", "32"]),
        ("4", ["40", "41", "42"]),
    ]
    assert len(select(contexts, 3, 1, None)) == 5
    with pytest.raises(ValueError, match="--min-questions 4 is above --max-branches 3"):
        select(contexts, 3, 4, None)
    with pytest.raises(ValueError, match="no context has 6 questions"):
        select(contexts, 6, 6, None)


def test_a_text_begins_as_the_model_s_texts_do():
    """With Llama 3's and Mistral's tokenizers: once, before the background, also of a sample without one."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    begin, context = tokenizer.pad_token_id, Context("", "Red.", (Question("", "What?", ("Red",)),))
    plain, empty = to_tokens(context, tokenizer, 0), Sample("", ["a"])
    assert tokenise_samples([empty], tokenizer, 336)[0].background == []
    template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.bos_token = "<|endoftext|>"
    begun = to_tokens(context, tokenizer, 0)
    assert begun.background == [begin, *plain.background]
    assert begun.branches == plain.branches
    assert tokenise_samples([to_sample(context), empty], tokenizer, 336)[0].background == begun.background
    assert tokenise_samples([empty], tokenizer, 336)[0].background == [begin]


def test_pieces_are_tokenised_one_by_one():
    tokenizer, context = tiny.tokenizer(), WANTED[0]
    sample, text = to_tokens(context, tokenizer, 319), to_sample(context)
    assert text.background == "Context: Ann: Rome. Bob: Oslo.\n"
    assert text.branches == ["Question: Where does Ann live?\nAnswer:", "Question: Where is Bob?\nAnswer:"]
    assert tokenizer.decode(sample.background) == text.background
    assert [tokenizer.decode(branch.prompt) for branch in sample.branches] == text.branches
    assert [tokenizer.decode(branch.answer) for branch in sample.branches] == [" Rome", " Oslo"]
    assert {branch.end for branch in sample.branches} == {319}


DATA = Path(os.environ.get("PD_JAX_DATA", Path(__file__).parents[3] / "shared" / "data")) / "squad"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set PD_JAX_DATA")
@pytest.mark.parametrize(
    ("name", "contexts", "questions", "with_two"),
    [
        ("dev-v1.1.rebuilt", 2067, 10570, 2056),
        ("train-v1.1.part", 678, 4370, 669),
        ("squadshifts-new_wiki_v1.0", 1581, 7938, 1580),
        ("squadshifts-amazon_reviews_v1.0", 2050, 9885, 2047),
        ("train-mix", 4309, 22193, 4296),
    ],
)
def test_counts_of_the_real_files(name, contexts, questions, with_two):
    loaded = load_squad(str(DATA / f"{name}.json.gz"))
    assert len(loaded) == contexts
    assert sum(len(context.questions) for context in loaded) == questions
    assert len(select(loaded, 100, 2, None)) == with_two
