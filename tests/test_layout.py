"""Layouts: coordinates, targets, weights, packing and buckets, against the worked example and the definitions."""

from dataclasses import replace

import numpy as np
import pytest
from examples import EOS, Q1, Q3, STORY, WORKED, B, aligns, samples, stories
from hypothesis import given, settings, strategies as st

from pd_jax.layout import Branch, Sample, TokenSample, answer_columns, bucket, build_layout, fit, pack


def test_worked_example():
    layout = build_layout([[WORKED]], length=20, pad_id=7)
    np.testing.assert_array_equal(layout.tokens[0], [*B, 11, 21, 31, 12, 22, 32, 13, 23, 14, 7, 7, 7])
    np.testing.assert_array_equal(layout.branch[0], [0] * 8 + [1, 2, 3, 1, 2, 3, 1, 2, 1, 0, 0, 0])
    np.testing.assert_array_equal(layout.column[0], [*range(8), 8, 8, 8, 9, 9, 9, 10, 10, 11, 0, 0, 0])
    np.testing.assert_array_equal(layout.valid[0], [True] * 17 + [False] * 3)
    np.testing.assert_array_equal(layout.segment[0], [0] * 17 + [-1] * 3)
    np.testing.assert_array_equal(answer_columns(WORKED), [12, 12, 12])


def test_right_alignment_ends_prompts_in_one_column():
    layout = build_layout([[WORKED]], align="right")
    last = {b: layout.column[0][layout.branch[0] == b].max() for b in (1, 2, 3)}
    assert last == {1: 11, 2: 11, 3: 11}
    np.testing.assert_array_equal(answer_columns(WORKED, "right"), [12, 12, 12])


def test_ragged_answers_follow_their_prompts():
    sample = TokenSample(B, [Branch(Q1, [41, 42]), Branch(Q3, [51])])
    layout = build_layout([[sample]], align="ragged")
    for number, length in ((1, 6), (2, 3)):
        np.testing.assert_array_equal(layout.column[0][layout.branch[0] == number], 8 + np.arange(length))
    np.testing.assert_array_equal(answer_columns(sample, "ragged"), [12, 10])


def test_targets_and_weights_of_finetuning():
    """Answer tokens and the end count; the last prompt token predicts the first answer token of its own branch."""
    layout = build_layout([[TokenSample([1, 2], [Branch([11, 12], [41, 42], EOS), Branch([21], [51], EOS)])]])
    np.testing.assert_array_equal(layout.tokens[0], [1, 2, 11, 21, 12, 41, 51, 42])
    np.testing.assert_array_equal(layout.weights[0], [0, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(layout.targets[0][layout.weights[0] > 0], [51, 41, 42, EOS, EOS])
    assert EOS not in layout.tokens


def test_targets_and_weights_of_pretraining():
    sample = TokenSample([], [Branch([], [11, 12, 13]), Branch([], [21, 22], EOS)])
    layout = build_layout([[sample]], objective="all")
    np.testing.assert_array_equal(layout.tokens[0], [11, 21, 12, 22, 13])
    np.testing.assert_array_equal(layout.weights[0], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(layout.targets[0][:4], [12, 22, 13, EOS])


@given(st.lists(st.lists(samples, max_size=3), min_size=1, max_size=3), aligns, st.sampled_from(["answers", "all"]))
@settings(max_examples=60, deadline=None)
def test_any_layout(rows, align, objective):
    layout = build_layout(rows, align=align, objective=objective, length=200)
    for r, row in enumerate(rows):
        valid = layout.valid[r]
        assert valid.sum() == sum(map(len, row))
        assert not layout.weights[r][~valid].any()
        for s, sample in enumerate(row):
            mine = valid & (layout.segment[r] == s)
            branch, column = layout.branch[r][mine], layout.column[r][mine]
            assert len(set(zip(branch.tolist(), column.tolist(), strict=True))) == mine.sum()  # one token a place
            assert (np.diff(np.where(mine)[0]) == 1).all()
            order = list(zip(column.tolist(), branch.tolist(), strict=True))
            assert order == sorted(order)
            texts = [list(sample.background)] + [[*b.prompt, *b.answer] for b in sample.branches]
            start = answer_columns(sample, align)
            for number, text in enumerate(texts):
                of = branch == number
                assert layout.tokens[r][mine][of].tolist() == text
                following = text[1:] + ([sample.branches[number - 1].end] if number else [None])
                following = [x for x in following if x is not None]
                weights = layout.weights[r][mine][of]
                counted = layout.targets[r][mine][of][weights > 0].tolist()
                if objective == "all":
                    assert counted == following[: len(text)]
                else:
                    prompt = len(sample.branches[number - 1].prompt) if number else 0
                    assert counted == (following[prompt - 1 :] if number else [])
                    if number and len(text) > prompt:
                        assert column[of][prompt] == start[number - 1]


def test_a_fork_a_join_and_a_fork():
    layout = build_layout([[STORY]])
    np.testing.assert_array_equal(layout.tokens[0], [1, 2, 11, 21, 12, 41, 51, 42, 61, 62, 71, 72])
    np.testing.assert_array_equal(layout.branch[0], [0, 0, 1, 2, 1, 1, 2, 1, 0, 0, 3, 3])
    np.testing.assert_array_equal(layout.column[0], [0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(np.flatnonzero(layout.prompt[0]), [2, 3, 4, 8, 10])
    # Answers and their ends count; the trunk's background has no target, because the join begins with a prompt.
    np.testing.assert_array_equal(layout.weights[0], [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(layout.targets[0][layout.weights[0] > 0], [51, 41, 42, EOS, 62, EOS, 72])
    np.testing.assert_array_equal(answer_columns(STORY), [9])
    np.testing.assert_array_equal(answer_columns(replace(STORY, later=STORY.later[:1])), [7])


def test_what_a_join_says_without_a_prompt_is_the_trunk_s_next_token():
    story = TokenSample([1, 2], [Branch([11], [41])], later=[Branch((), [61, 62]), Branch((), [63])])
    for objective in ("answers", "all"):
        layout = build_layout([[story]], objective=objective)
        np.testing.assert_array_equal(layout.tokens[0], [1, 2, 11, 41, 61, 62, 63])
        first = float(objective == "all")
        np.testing.assert_array_equal(layout.weights[0], [first, 1, 1, 0, 1, 1, 0])
        np.testing.assert_array_equal(layout.targets[0][[1, 2, 4, 5]], [61, 41, 62, 63])
    # An end is a target already, and a prompt is none.
    story = TokenSample([1], [], later=[Branch([2], [3], EOS), Branch((), [4]), Branch([5], [6])])
    layout = build_layout([[story]], objective="all")
    np.testing.assert_array_equal(layout.weights[0], [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(layout.targets[0][layout.weights[0] > 0], [3, EOS, 6])


@given(stories, aligns)
@settings(max_examples=60, deadline=None)
def test_every_turn_stands_behind_the_one_before(story, align):
    """Its texts are those of a sample of its own, moved behind all columns so far, under numbers of their own."""
    layout = build_layout([[story]], align=align)
    column, number = len(story.background), 1
    seen = layout.column[0] < column
    np.testing.assert_array_equal(layout.tokens[0][seen], list(story.background))
    for turn in story.turns:
        joins = isinstance(turn, Branch)
        alone = build_layout([[TokenSample((), [turn] if joins else turn)]], align=align)
        size = alone.tokens.shape[1]
        width = 1 + alone.column.max(initial=-1)
        here = (layout.column[0] >= column) & (layout.column[0] < column + width)
        assert here.sum() == size
        np.testing.assert_array_equal(layout.tokens[0][here], alone.tokens[0])
        np.testing.assert_array_equal(layout.column[0][here], alone.column[0] + column)
        np.testing.assert_array_equal(layout.branch[0][here], 0 if joins else alone.branch[0] + number - 1)
        np.testing.assert_array_equal(layout.prompt[0][here], alone.prompt[0])
        if not joins:
            np.testing.assert_array_equal(layout.weights[0][here], alone.weights[0])
        column, number = column + width, number + (0 if joins else len(turn))
        seen |= here
    assert seen.all()
    assert len(story) == layout.tokens.shape[1]


def test_packed_samples_are_told_apart():
    layout = build_layout([[WORKED, WORKED]])
    np.testing.assert_array_equal(layout.segment[0], [0] * 17 + [1] * 17)
    np.testing.assert_array_equal(layout.column[0][:17], layout.column[0][17:])


def test_too_long_for_the_row():
    with pytest.raises(ValueError, match="a row of 17 tokens does not fit in 16"):
        build_layout([[WORKED]], length=16)
    with pytest.raises(ValueError, match="align 'middle' is not one of left, right, ragged"):
        build_layout([[WORKED]], align="middle")  # ty: ignore[invalid-argument-type]


@given(samples, st.integers(1, 60))
def test_fit_cuts_the_background_only(sample, length):
    fitted = fit(sample, length)
    need = len(sample) - len(sample.background)
    if need > length:
        assert fitted is None
    else:
        assert fitted is not None
        assert len(fitted) == min(length, len(sample))
        assert fitted.branches == sample.branches
        assert list(fitted.background) == list(sample.background)[: len(fitted.background)]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_pack(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity for group in bins)
    assert sum(sum(lengths[i] for i in group) <= capacity / 2 for group in bins) <= 1


@given(st.integers(1, 5000), st.sampled_from([1, 16, 64]))
def test_bucket(size, smallest):
    chosen = bucket(size, smallest)
    assert size <= chosen
    assert chosen == smallest or chosen < 2 * size
    assert bucket(chosen, smallest) == chosen


def test_samples_without_questions_are_refused():
    with pytest.raises(ValueError, match="has no branches"):
        Sample("text", [])
    with pytest.raises(ValueError, match=r"prompts \[1\] of 2 are empty"):
        Sample("text", ["a question", " "])
    with pytest.raises(ValueError, match="pass a list"):
        Sample("text", "a question")
