"""The made-up world: the same every time, disjoint where it must be, and readable by the scripts."""

import json
import random
import re
from pathlib import Path

import pytest

from pd_jax.data import squad, synthetic
from pd_jax.data.synthetic import CHINESE, ENGLISH


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    synthetic.write_world(directory, documents=60, train=300, dev=120)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.train_tokenizer()


def _paragraphs(path: Path) -> list[dict]:
    return [p for article in json.loads(path.read_text(encoding="utf-8"))["data"] for p in article["paragraphs"]]


def _people(text: str) -> set[str]:
    """Every full name in `text`."""
    english = "|".join(ENGLISH.names[0]), "|".join(ENGLISH.names[1])
    chinese = ("".join(part) for part in CHINESE.names)
    return set(re.findall(rf"(?:{english[0]}) (?:{english[1]})", text)) | set(
        re.findall("".join(f"[{part}]" for part in chinese), text)
    )


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(world, tmp_path):
    synthetic.write_world(tmp_path / "again", documents=60, train=300, dev=120)
    synthetic.write_world(tmp_path / "other", documents=60, train=300, dev=120, seed=1)
    for name in ("documents.jsonl", "train.json", "dev.json"):
        assert (world / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (world / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_nobody_of_the_evaluation_occurs_in_training(world):
    seen = _people((world / "documents.jsonl").read_text(encoding="utf-8"))
    seen |= _people((world / "train.json").read_text(encoding="utf-8"))
    unseen = _people((world / "dev.json").read_text(encoding="utf-8"))
    assert len(seen) > 200
    assert len(unseen) > 100
    assert not seen & unseen
    assert not {(q["question"]) for p in _paragraphs(world / "train.json") for q in p["qas"]} & {
        q["question"] for p in _paragraphs(world / "dev.json") for q in p["qas"]
    }


@pytest.mark.parametrize("name", ["train.json", "dev.json"])
def test_every_answer_stands_at_its_start_in_the_sentence_that_is_asked_for(world, name):
    for paragraph in _paragraphs(world / name):
        context = paragraph["context"]
        for qa in paragraph["qas"]:
            (answer,) = qa["answers"]
            if answer["answer_start"] == -1:
                continue  # it stands in a sibling's note
            start, stop = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            assert context[start:stop] == answer["text"]
            sentence = re.split(r"[.。]", context[:start])[-1]
            assert _people(qa["question"]) == _people(sentence)


def test_values_of_one_context_do_not_contain_one_another():
    rng = random.Random(3)
    for language in (ENGLISH, CHINESE):
        for _ in range(200):
            values = [fact.value for fact in synthetic.make_facts(language, 6, False, rng)]
            assert all(a not in b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)


def test_a_relation_is_shared_only_when_all_are_used_and_then_by_two_people():
    rng = random.Random(4)
    for count, most in ((5, 1), (6, 2)):
        for _ in range(50):
            facts = synthetic.make_facts(ENGLISH, count, False, rng)
            assert len({fact.question for fact in facts}) == count
            asked = [fact.question.replace(fact.person, "") for fact in facts]
            assert max(map(asked.count, asked)) == most


def test_the_squad_reader_takes_the_files_and_answers_are_ragged(world, tokenizer):
    contexts = squad.select(squad.load_squad(str(world / "train.json")), 4, 2, None)
    assert len(contexts) == 300
    assert {len(context.questions) for context in contexts} == {3, 4}
    samples = [squad.to_tokens(context, tokenizer, tokenizer.eos_token_id) for context in contexts]
    lengths = {len(branch.answer) for sample in samples for branch in sample.branches}
    assert lengths == {1, 2, 3, 4}
    within = [len({len(branch.answer) for branch in sample.branches}) > 1 for sample in samples]
    assert sum(within) > 0.7 * len(samples)
    assert {context.text.isascii() for context in contexts} == {True, False}


def test_an_answer_is_a_run_of_the_contexts_tokens(world, tokenizer):
    space = tokenizer.encode(" ")
    for context in squad.load_squad(str(world / "dev.json")):
        sample = squad.to_tokens(context, tokenizer, tokenizer.eos_token_id)
        background = "".join(f"<{token}>" for token in sample.background)
        for branch in sample.branches:
            answer = branch.answer[len(space) :] if branch.answer[: len(space)] == space else branch.answer
            assert "".join(f"<{token}>" for token in answer) in background


@pytest.mark.parametrize(
    "text", ["Mira Toll lives in New Harlow.", "林建芳住在东白石村。", "naïve 🙂\n\t1874年", " a  b "]
)
def test_the_tokenizer_reads_back_what_it_wrote(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= synthetic.VOCABULARY


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    assert synthetic.train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_documents_are_web_text_in_both_languages(world):
    texts = [json.loads(line)["text"] for line in (world / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 60
    assert {text.isascii() for text in texts} == {True, False}
    assert all(text.startswith("Context: ") and "\nAnswer: " in text for text in texts)


def test_a_note_is_asked_for_by_a_sibling_and_stands_nowhere_else(world):
    """So no branch that does not see its siblings does better than the best guess."""
    paragraphs = _paragraphs(world / "dev-notes.json")
    assert len(paragraphs) == 120
    for paragraph in paragraphs:
        texts = [qa["question"] for qa in paragraph["qas"]]
        for own, qa in enumerate(paragraph["qas"]):
            (answer,) = qa["answers"]
            assert answer["answer_start"] == -1
            assert answer["text"] not in paragraph["context"]
            assert answer["text"] not in texts[own]
            assert sum(answer["text"] in text for text in texts) == 1
    shares = [any(q["answers"][0]["answer_start"] == -1 for q in p["qas"]) for p in _paragraphs(world / "train.json")]
    assert 0.35 < sum(shares) / len(shares) < 0.65


def test_the_best_guess_is_the_likeliest_value():
    """Among values drawn as the world draws them, for every relation, the most frequent is as frequent as it says."""
    rng, shares = random.Random(0), []
    for language in (ENGLISH, CHINESE):
        for relation in language.relations:
            drawn = [language.space.join(filter(None, map(rng.choice, relation.parts))) for _ in range(4000)]
            shares.append(max(map(drawn.count, set(drawn))) / len(drawn))
    assert abs(sum(shares) / len(shares) - synthetic.best_guess()) < 0.01
