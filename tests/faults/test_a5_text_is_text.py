"""Rows that hold no text where text belongs: one line that names file, row and id, never the text "None"."""

import json

import pytest
import tiny

from pd_jax.data.fineweb import load_documents, segments
from pd_jax.data.squad import load_squad
from pd_jax.data.text import BadRows

GOOD = {"id": "g", "title": "T", "context": "Ann.", "question": "Who?", "answers": {"text": ["Ann"]}}
NO_TEXT = [None, float("nan"), True, 7, ["Ann", "Bob"], {"text": "Ann"}, "half \ud800"]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
@pytest.mark.parametrize("field", ["context", "question", "title", "answers"])
def test_questions(tmp_path, field, value):
    row = {**GOOD, "id": "bad", field: {"text": [value]} if field == "answers" else value}
    path = lines(tmp_path / "x.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=r"x\.jsonl: row 1: question 'bad'.*(not text|half of a character)") as error:
        load_squad(path)
    assert "\n" not in str(error.value)
    [context] = load_squad(path, bad=(bad := BadRows(skip=True)))
    assert [q.id for q in context.questions] == ["g"]
    assert bad.count == 1


@pytest.mark.parametrize("value", [None, float("nan"), True, ["b"]], ids=repr)
def test_ids(tmp_path, value):
    with pytest.raises(ValueError, match=r"x\.jsonl: row 1: 'id' is .*not text"):
        load_squad(lines(tmp_path / "x.jsonl", [GOOD, {**GOOD, "id": value}]))


def test_a_number_is_an_id(tmp_path):
    assert load_squad(lines(tmp_path / "x.jsonl", [{**GOOD, "id": 7}]))[0].questions[0].id == "7"


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_the_official_layout(tmp_path, value):
    qas = [{"id": i, "question": "Who?", "answers": [{"text": text}]} for i, text in (("g", "Ann"), ("bad", value))]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "Ann.", "qas": qas}]}]}))
    with pytest.raises(ValueError, match=r"x\.json: data\[0\]\.paragraphs\[0\]\.qas\[1\]: question 'bad': an answer"):
        load_squad(str(path))
    [context] = load_squad(str(path), bad=BadRows(skip=True))
    assert [q.answers for q in context.questions] == [("Ann",)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_documents(tmp_path, value, streaming):
    path = lines(tmp_path / "x.jsonl", [{"text": "a long tower"}, {"text": value}])
    documents = load_documents(path, streaming=streaming)
    with pytest.raises(ValueError, match=r"x\.jsonl': row 1: its text (is .*not text|has .*half of a character)"):
        list(segments(documents, tiny.tokenizer(), 64, 319, name=path, bad=BadRows()))
    [row] = segments(documents, tiny.tokenizer(), 64, 319, name=path, bad=(bad := BadRows(skip=True)))
    assert tiny.tokenizer().decode(row["ids"]) == "a long tower"
    assert bad.count == 1
