"""The tasks: every optimum is found again by brute force, on small instances and through the real layout and mask."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from pd_jax.columns import Coordinates, column_mask
from pd_jax.layout import Branch, TokenSample, build_layout, unanswered
from pd_jax.tasks import (
    END,
    PAD,
    TASKS,
    VOCABULARY,
    Task,
    chain,
    distinct,
    drawn,
    lookup,
    neighbour,
    number,
    odd,
    relay,
    total,
    vote,
)

names = pytest.mark.parametrize("name", TASKS)


# What a branch can know.


@cache
def seen_by(branch: tuple, column: tuple, prompt: tuple, visibility: str) -> list[list[int]]:
    """Whom every token of a row sees beside itself: `column_mask` in numpy, for the thousands of small rows below."""
    branches, columns = np.array(branch), np.array(column)
    seen = columns < columns[:, None]
    if visibility != "columns":
        visible = (branches == 0) | (branches == branches[:, None])
        seen &= visible | np.array(prompt) if visibility == "prompts" else visible
    return [np.flatnonzero(row).tolist() for row in seen]


class Eyes:
    """All that a model of any depth can know at a token, as one number, the token's colour.

    A colour stands for the token, its column and the colours of all tokens that the mask shows, which carry what they
    see in turn. Those come without order, as attention takes them. signal: "pairs" tells how far away the branch of
    every token is that it sees, as RoPE does, "bias" tells own from siblings', "none" does neither.
    """

    def __init__(self, visibility: str, signal: str) -> None:
        self.visibility, self.signal = visibility, signal
        self.known: dict[tuple, int] = {}

    def colours(self, layout) -> list[int]:
        """Of the tokens of the one row of a layout."""
        branch, column, prompt = (tuple(layout[name][0].tolist()) for name in ("branch", "column", "prompt"))
        colours: list[int] = []  # in column-major order whatever a token sees has its colour already
        for i, seen in enumerate(seen_by(branch, column, prompt, self.visibility)):
            others = [j for j in seen if branch[j] not in (0, branch[i])] if self.signal == "bias" else []
            far = [branch[j] - branch[i] if self.signal == "pairs" else 0 for j in range(len(colours))]
            key = (
                int(layout.tokens[0, i]),
                column[i],
                tuple(sorted((far[j], colours[j]) for j in seen if j not in others)),
                tuple(sorted((far[j], colours[j]) for j in others)),
            )
            colours.append(self.known.setdefault(key, len(self.known)))
        return colours


def best_score(task: Task, samples: list[TokenSample], visibility: str, signal: str = "pairs") -> float:
    """The mean score of the best model's decoded answers; `samples` are all samples, each as likely.

    The best model knows how often each token follows each colour. It says the most frequent one, and draws where the
    task draws.
    """
    eyes = Eyes(visibility, signal)
    follows: dict[int, Counter] = defaultdict(Counter)
    groups: dict[str, list[TokenSample]] = defaultdict(list)  # of samples with the same prompts
    for sample in samples:
        layout = build_layout([[sample]])
        for place, colour in enumerate(eyes.colours(layout)):
            if layout.weights[0, place]:
                follows[colour][int(layout.targets[0, place])] += 1
        groups[str(unanswered(sample))].append(sample)

    def decode(sample: TokenSample, answers: list[list[int]], ended: list[bool]) -> Iterator[tuple[float, float]]:
        """The probability and the score of every way to go on."""
        if all(ended):
            yield 1.0, task.score(sample, answers).mean()
            return
        branches = [Branch(b.prompt, answer) for b, answer in zip(sample.branches, answers, strict=True)]
        layout = build_layout([[TokenSample(sample.background, branches)]])
        colours = eyes.colours(layout)
        choices: list[list[tuple[int, float]]] = []
        for b, answer in enumerate(answers):
            colour = colours[np.flatnonzero(layout.branch[0] == b + 1)[-1]]
            # Where no sample leads, a branch has said something wrong; all that is judged is behind it.
            following = follows[colour] if colour in follows and not ended[b] else Counter([END])
            free = task.free(b + 1, len(answer))
            chances = [(t, n / following.total()) for t, n in following.items()]
            choices.append(chances if free else [(following.most_common(1)[0][0], 1.0)])
        for column in itertools.product(*choices):
            longer = [a if t == END else [*a, t] for a, (t, _) in zip(answers, column, strict=True)]
            chance = float(np.prod([p for _, p in column]))
            for p, score in decode(sample, longer, [t == END for t, _ in column]):
                yield chance * p, score

    total = 0.0
    for group in groups.values():
        # The prompts decide the right answers, but for free draws: there the score asks what was decoded.
        count = len(group[0].branches)
        total += len(group) * sum(p * score for p, score in decode(group[0], [[]] * count, [False] * count))
    return total / len(samples)


# All samples of small instances, each as likely, and what the task says of their optimum.


def ranges(*sizes: int) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def orders(size: int, length: int) -> Iterator[tuple[int, ...]]:
    return itertools.permutations(range(size), length)


def relays(secrets: int) -> list[TokenSample]:
    """Three branches whose names stand in one order: another order is another order of the branches."""
    ways = itertools.product(orders(secrets, 3), itertools.product(*[range(1, 3)] * 3))
    return [relay.sample_of(range(3), held, [(i + d) % 3 for i, d in enumerate(ahead)]) for held, ahead in ways]


def lookups(values: int) -> list[TokenSample]:
    """Two facts and two branches."""
    return [
        lookup.sample_of([(0, a, b), (1, c, d)], asked)
        for a, b, c, d in ranges(*[values] * 4)
        for asked in orders(2, 2)
    ]


INSTANCES: dict[str, tuple[list[TokenSample], dict[str, float | None]]] = {
    "drawn": ([drawn.sample_of(draws) for draws in ranges(5, 5, 5)], drawn.optimum(3)),
    "chain": ([chain.sample_of(numbers) for numbers in ranges(5, 5, 5)], chain.optimum(3)),
    "odd": ([odd.sample_of(np.reshape(bits, (3, 2)).tolist()) for bits in ranges(*[2] * 6)], odd.optimum(3)),
    "relay": (relays(secrets=5), relay.optimum(3, secrets=5)),
    "neighbour": ([neighbour.sample_of(secrets) for secrets in orders(5, 3)], neighbour.optimum(3)),
    "number": ([number.sample_of(numbers) for numbers in orders(5, 3)], number.optimum(3)),
    "distinct": ([distinct.sample_of(items, False) for items in orders(4, 4)], distinct.optimum(4)),
    "distinctsame": ([distinct.sample_of(items, True) for items in orders(4, 4)], distinct.optimum(4)),
    "vote": ([vote.sample_of(bits) for bits in ranges(*[2] * 5)], vote.optimum(5)),
    "lookup": (lookups(values=3), lookup.optimum(2, values=3)),
}


def test_the_numpy_mask_is_the_column_mask():
    layout = build_layout([task.samples(0, 1) for task in TASKS.values()])
    coordinates = Coordinates.of(layout)
    for visibility in ("columns", "isolated", "prompts"):
        allowed = np.asarray(column_mask(coordinates, coordinates, visibility))
        for row, size in enumerate(layout.valid.sum(1)):
            arrays = (tuple(layout[name][row, :size].tolist()) for name in ("branch", "column", "prompt"))
            seen = [[*others, i] for i, others in enumerate(seen_by(*arrays, visibility))]
            assert [sorted(places) for places in seen] == [np.flatnonzero(a).tolist() for a in allowed[row, :size]]


@names
@pytest.mark.parametrize("visibility", ["isolated", "prompts", "columns"])
def test_the_optimum_of_a_visibility(name, visibility):
    samples, optimum = INSTANCES[name]
    assert best_score(TASKS[name], samples, visibility) == pytest.approx(optimum[visibility])


@pytest.mark.parametrize("name", [name for name, (_, optimum) in INSTANCES.items() if optimum["no signal"] is not None])
def test_the_optimum_of_columns_without_a_signal(name):
    samples, optimum = INSTANCES[name]
    assert best_score(TASKS[name], samples, "columns", "none") == pytest.approx(optimum["no signal"])


@pytest.mark.parametrize("name", [name for name, (_, optimum) in INSTANCES.items() if optimum["no signal"] is None])
def test_low_without_a_signal(name):
    assert best_score(TASKS[name], INSTANCES[name][0], "columns", "none") < 0.1


@names
def test_sibling_bias_alone_gives_no_order(name):
    """It is worth nothing where branches differ by their order only, and as much as branch pairs everywhere else."""
    samples, optimum = INSTANCES[name]
    expected = optimum["no signal" if name in ("neighbour", "number", "distinctsame") else "columns"]
    assert best_score(TASKS[name], samples, "columns", "bias") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["neighbour", "number"])
def test_without_pairs_a_branch_alone_does_not_know_which_one_it_is(name):
    samples, _ = INSTANCES[name]
    assert best_score(TASKS[name], samples, "isolated", "none") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "isolated", "prompts", "columns", "no_signal"),
    [
        ("drawn", 0.4, 0.4, 1, []),
        ("chain", 0.4, 1, 1, []),
        ("odd", 0.375, 1, 1, []),
        ("relay", 1 / 7, 1, 1, [0.25]),
        ("neighbour", 0.25, 1, 1, [0.25]),
        ("number", 1, 1, 1, [0.25]),
        ("distinct", 0.09375, 0.09375, 1, [1 / 24]),
        ("distinctsame", 0.09375, 0.09375, 1, [1 / 24]),
        ("vote", 0.6875, 1, 1, [1]),
        ("lookup", 1, 1, 1, [0.915939]),
    ],
)
def test_the_optima_at_the_usual_number_of_branches(name, isolated, prompts, columns, no_signal):
    optimum = TASKS[name].optimum(TASKS[name].branches)
    assert list(optimum) == ["isolated", "prompts", "columns", "no signal"]
    numbers = [number for number in optimum.values() if number is not None]
    assert numbers == pytest.approx([isolated, prompts, columns, *no_signal], rel=1e-5)


# Samples and scores.


@pytest.mark.parametrize("name", ["drawn", "chain", "distinct", "distinctsame", "vote"])
def test_what_is_made_at_random_is_what_the_search_enumerates(name):
    samples, _ = INSTANCES[name]
    made = TASKS[name].samples(0, 2000, branches=[len(samples[0].branches)])
    assert set(map(str, made)) == set(map(str, samples))


@names
def test_samples(name):
    task = TASKS[name]
    assert task.name == name
    samples = task.samples((1, 2), 50, branches=task.counts)
    assert samples == task.samples((1, 2), 50, branches=task.counts)
    assert samples != task.samples((1, 3), 50, branches=task.counts)
    assert {len(sample.branches) for sample in samples} <= set(task.counts)
    assert len({len(sample.branches) for sample in samples}) > 1
    assert {len(sample.branches) for sample in task.samples(0, 9)} == {task.branches}
    assert task.vocabulary <= VOCABULARY
    for sample in samples:
        texts = [sample.background, *([*b.prompt, *b.answer] for b in sample.branches)]
        assert all(type(token) is int and PAD < token < task.vocabulary for text in texts for token in text)
        assert all(branch.end == END and END not in branch.answer for branch in sample.branches)
        assert task.score(sample, [branch.answer for branch in sample.branches]).all()
        assert unanswered(sample).branches == [Branch(branch.prompt) for branch in sample.branches]


@names
@pytest.mark.parametrize("branches", [[], [0], [4, 40]])
def test_a_number_of_branches_that_a_task_cannot_have(name, branches):
    with pytest.raises(ValueError, match=rf"branches is .*{name} takes"):
        TASKS[name].samples(0, 1, branches=branches)


def gold(name: str) -> tuple[TokenSample, list[list[int]]]:
    (sample,) = TASKS[name].samples(0, 1)
    return sample, [list(branch.answer) for branch in sample.branches]


@names
@pytest.mark.parametrize("wrong", [lambda a: [*a[:-1], PAD], lambda a: [*a, PAD], lambda a: a[:-1], lambda a: []])
def test_one_wrong_answer(name, wrong):
    """Wrong, too long, too short, none at all; in the last branch, on which no sum of a sibling hangs."""
    sample, answers = gold(name)
    right = TASKS[name].score(sample, [*answers[:-1], wrong(answers[-1])])
    whole = name in ("distinct", "distinctsame")
    assert right.dtype == bool
    assert right.tolist() == ([False] if whole else [True] * (len(answers) - 1) + [False])


@names
def test_an_answer_for_every_branch(name):
    sample, answers = gold(name)
    with pytest.raises(ValueError, match="argument"):
        TASKS[name].score(sample, answers[:-1])


def test_drawn_is_judged_by_the_draws_that_were_decoded():
    sample, other = drawn.sample_of([0, 0, 0, 0]), drawn.sample_of([1, 2, 3, 4])
    answers = [list(branch.answer) for branch in other.branches]
    assert drawn.score(sample, answers).tolist() == [True] * 4
    assert drawn.score(sample, [answers[0], [PAD, *answers[1][1:]], *answers[2:]]).tolist() == [True] + [False] * 3


@pytest.mark.parametrize("same", [False, True])
def test_any_distinct_items_will_do(same):
    def answers(items) -> list[list[int]]:
        return [list(branch.answer) for branch in distinct.sample_of(items, same).branches]

    sample = distinct.sample_of([0, 1, 2, 3], same)
    assert distinct.score(sample, answers([3, 1, 0, 2])).tolist() == [True]
    assert distinct.score(sample, answers([3, 1, 3, 2])).tolist() == [False]


# By task: the token of a sibling, as an index into its prompt and answer, that the last token of an answer hangs on.
LAST_OF_THE_ONE_BEFORE = ("drawn", "chain", "distinct", "distinctsame")
HANGS_ON_ALL = {"odd": -3, "relay": 1, "neighbour": 0, "vote": 0}


@pytest.mark.parametrize("name", [*LAST_OF_THE_ONE_BEFORE, *HANGS_ON_ALL])
def test_news_has_two_columns_to_arrive(name):
    (sample,) = TASKS[name].samples(0, 1)
    layout = build_layout([[sample]])
    columns = [layout.column[0][layout.branch[0] == b + 1] for b in range(len(sample.branches))]
    if name in HANGS_ON_ALL:
        assert all(own[-1] - other[HANGS_ON_ALL[name]] >= 2 for own, other in itertools.permutations(columns, 2))
    else:
        assert all(own[-1] - before[-1] == 2 for before, own in itertools.pairwise(columns))


def test_the_total_hangs_on_letters_that_a_hidden_branch_does_not_see():
    """Of one part: all 81 texts, of which a branch that sees none of it can only say the likeliest count."""
    counts: Counter[int] = Counter()
    for letters in itertools.product(range(total.ALPHABET), repeat=total.LETTERS):
        sample = total.sample_of([letters])
        (join,) = sample.later
        counts[join.answer[0]] += 1
        assert sample.branches[0].answer[-1] == join.answer[0]  # what the trunk sees says it
        assert total.score(sample, [sample.branches[0].answer, join.answer]).all()
        assert not total.score(sample, [sample.branches[0].answer, [join.answer[0] + 1]]).any()
    assert total.HIDDEN.optimum(1)["isolated"] == pytest.approx(max(counts.values()) / 81)
    joined, hidden = total.TASK.samples(3, 1)[0], total.HIDDEN.samples(3, 1)[0]
    assert [*joined.branches, *joined.later] == hidden.branches
