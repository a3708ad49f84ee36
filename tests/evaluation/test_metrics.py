"""Exact match and F1 against independent ones, and the intervals of the bootstrap."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pd_jax.data.squad import Context, Question
from pd_jax.evaluation.metrics import answer_of, estimate, leaks, normalize, score


def words_again(text: str) -> list[str]:
    """SQuAD's normalisation once more, character by character."""
    kept, word = [], ""
    ascii_marks = {chr(c) for c in range(33, 127) if not chr(c).isalnum()}
    for letter in text.lower():
        if letter in ascii_marks:
            continue
        if letter.isspace():
            kept, word = [*kept, word], ""
        else:
            word += letter
    return [w for w in [*kept, word] if w not in ("", "a", "an", "the")]


def score_again(prediction: str, answers: list[str]) -> tuple[float, float]:
    best_exact, best_f1 = 0.0, 0.0
    for answer in answers:
        gold, said = words_again(answer), words_again(prediction)
        left, common = list(gold), 0
        for word in said:
            if word in left:
                left.remove(word)
                common += 1
        best_exact = max(best_exact, float(gold == said))
        if common:
            precision, recall = common / len(said), common / len(gold)
            best_f1 = max(best_f1, 2 * precision * recall / (precision + recall))
        elif gold == said:
            best_f1 = 1.0
    return best_exact, best_f1


ENGLISH = st.lists(
    st.sampled_from(["the", "The", "a", "an", "A.", "red", "Red,", "blue", "an-", "U.S.", " ", "\t"])
).map(" ".join)


@given(ENGLISH, st.lists(ENGLISH, min_size=1, max_size=4))
def test_the_metric_equals_an_independent_one(prediction, answers):
    assert score(prediction, answers) == pytest.approx(score_again(prediction, answers))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3), st.sampled_from(["squad", "cmrc"]), st.data())
def test_a_gold_answer_is_worth_everything(answers, metric, data):
    assert score(data.draw(st.sampled_from(answers)), answers, metric) == (1, 1)


@given(st.text(), st.text(), st.sampled_from(["squad", "cmrc"]))
def test_scores_are_shares_and_f1_is_symmetric(a, b, metric):
    exact, f1 = score(a, [b], metric)
    assert exact in (0, 1)
    assert 0 <= f1 <= 1
    assert f1 == pytest.approx(score(b, [a], metric)[1])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat", "cat"),
        ("U.S.A.", "usa"),
        ("theatre and anthem", "theatre and anthem"),
        ("a-b the, c", "ab c"),
        ("“The” 24–10", "“ ” 24–10"),
        ("A.", ""),
    ],
)
def test_normalisation(text, wanted):
    assert normalize(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [
        ("Denver Broncos", ["The Denver Broncos", "Broncos"], (1, 1)),
        ("the Broncos won", ["Denver Broncos"], (0, 1 / 2)),
        ("red red blue", ["red blue blue"], (0, 2 / 3)),
        ("", ["red"], (0, 0)),
    ],
)
def test_known_scores(prediction, answers, wanted):
    assert score(prediction, answers) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [
        ("《红楼梦》。", ["红楼梦"], (1, 1)),
        ("红色的塔", ["蓝色的塔", "红色"], (0, 3 / 4)),  # the longest common run: 色的塔
        ("塔红", ["红塔"], (0, 1 / 2)),  # a bag of characters would give 1
        ("1998年5月", ["1998年"], (0, 2 * 2 / (4 + 2))),  # numbers are one unit
        ("iPhone手机", ["iphone 手机"], (0, 1)),  # the official script keeps spaces in the exact match
    ],
)
def test_chinese_scores(prediction, answers, wanted):
    assert score(prediction, answers, "cmrc") == pytest.approx(wanted)


@given(st.text("红楼梦塔色的", max_size=8), st.text("红楼梦塔色的", min_size=1, max_size=8))
def test_chinese_f1_equals_a_search_over_all_runs(prediction, gold):
    runs = {prediction[i:j] for i in range(len(prediction)) for j in range(i + 1, len(prediction) + 1)}
    shared = max((len(run) for run in runs if run in gold), default=0)
    wanted = 2 * shared / (len(prediction) + len(gold))
    assert score(prediction, [gold], "cmrc")[1] == pytest.approx(wanted)
    assert all(unicodedata.category(c) == "Lo" for c in gold)


def test_only_the_first_line_is_scored():
    assert answer_of(" red \nQuestion: What else?") == "red"
    assert answer_of("\n\n") == ""


def test_leaks():
    context = Context(
        "",
        "...",
        (
            Question("said by a sibling's question", "q", ("The Red tower", "x1")),
            Question("a sibling's answer", "Who built the red tower?", ("Ann",)),
            Question("also a sibling's answer", "q", ("someone", "Ann!")),
            Question("only inside a longer word", "q", ("An", "some")),
            Question("empty once normalised", "q", (".",)),
            Question("only its own", "Is blue blue?", ("blue",)),
        ),
    )
    assert [leaks(context, i) for i in range(6)] == [True, True, True, False, False, False]
    chinese = Context("", "", (Question("1", "谁？", ("红楼",)), Question("2", "谁？", ("《红楼梦》",))))
    assert [leaks(chinese, i, "cmrc") for i in range(2)] == [True, False]


def test_bootstrap_of_identical_rows_is_exactly_zero():
    scores = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    first, second = estimate(np.stack([scores, scores]), np.repeat(np.arange(20), 3), reference=0, seed=1)
    assert first == second
    assert second["difference"] == 0
    assert second["difference_interval"] == [0, 0]
    low, high = first["interval"]
    assert low < first["value"] < high


def test_bootstrap_is_paired():
    """A row that is right once more in every context: each row's mean is uncertain, the difference is not."""
    base = np.array([[0, 0, 0, 0], [1, 1, 1, 0]] * 20, float)
    shifted = base.copy()
    shifted[:, 3] = 1
    rows = estimate(np.stack([base.ravel(), shifted.ravel()]), np.repeat(np.arange(40), 4), reference=0, seed=0)
    assert rows[1]["difference_interval"] == pytest.approx([25, 25])
    assert rows[1]["interval"][1] - rows[1]["interval"][0] > 10


def test_bootstrap_interval_has_the_width_of_the_sampling_error():
    """Contexts and not questions are the unit: 50 contexts whose 8 answers are all right or all wrong."""
    scores = np.repeat(np.arange(50) % 2, 8).astype(float)
    (row,) = estimate(scores[None], np.repeat(np.arange(50), 8), reference=0, seed=0)
    half = (row["interval"][1] - row["interval"][0]) / 2
    assert half == pytest.approx(100 * 1.96 * 0.5 / 50**0.5, rel=0.1)
