"""Questions about a sibling's passage: the answer stands in one sibling's prompt, and nowhere else in the set."""

import json

import pytest

from pd_jax.data.passages import PassageSettings, as_squad, passage_sets
from pd_jax.data.squad import Context, Question, load_squad


def contexts(count=40, articles=10) -> list[Context]:
    return [
        Context(
            f"article {i % articles}",
            f"The tower of town {i} has the colour c{i}x and many more words follow here.",
            (Question(f"q{i}", f"What colour is the tower of town {i}?", (f"c{i}x",)),),
        )
        for i in range(count)
    ]


SETTINGS = PassageSettings(branches=4, words=(5, 30))


def test_every_question_is_about_one_sibling():
    sets, told = passage_sets(contexts(), SETTINGS)
    assert len(sets) == 10
    assert len(told) == 40
    used = []
    for group in sets:
        assert "tower" not in group.text  # the background tells nothing
        for b, question in enumerate(group.questions):
            (answer,) = question.answers
            holders = [s for s, other in enumerate(group.questions) if f"colour {answer}" in other.text]
            assert len(holders) == 1
            assert holders != [b]
            used.append(question.text.split("\n")[0])
    assert len(set(used)) == 40  # every passage stands in one set
    for context in told:
        assert context.questions[0].answers[0] in context.text


def test_an_answer_that_another_passage_holds_too_is_not_asked():
    same = [Context(f"a{i}", f"Here is red and text number {i}.", (Question("", "q", ("red",)),)) for i in range(4)]
    with pytest.raises(ValueError, match="give no set of 4 passages"):
        passage_sets(same, SETTINGS)


def test_sets_depend_on_the_seed_alone():
    assert passage_sets(contexts(), SETTINGS) == passage_sets(contexts(), SETTINGS)
    assert passage_sets(contexts(), SETTINGS) != passage_sets(contexts(), PassageSettings(4, 300, (5, 30), 1))


@pytest.mark.parametrize(("settings", "message"), [(PassageSettings(1), "no siblings"), (SETTINGS, "use more data")])
def test_what_gives_no_set_is_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        passage_sets(contexts(articles=3), settings)


def test_the_file_is_read_as_it_was_made(tmp_path):
    sets, told = passage_sets(contexts(), SETTINGS)
    for made in (sets, told):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(as_squad(made)))
        assert sorted(load_squad(str(path)), key=str) == sorted(made, key=str)
