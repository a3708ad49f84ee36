"""JSON lines of rounds: what is read, what is refused with its place, and a finetuning run on them."""

import gzip
import json

import pytest
import tiny

from pd_jax.data.rounds import draw, holds_rounds, load_rounds
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError
from pd_jax.layout import Branch, build_layout
from pd_jax.training import FinetuneFlags, finetune

ROW = {
    "background": "The tower is red.",
    "rounds": [
        {
            "branches": [{"prompt": "Colour?", "answer": " red"}, {"prompt": "The river is long."}],
            "join": {"prompt": " Both:", "answer": " red and long"},
        },
        {"branches": [{"prompt": "Sure?", "answer": " yes"}]},
    ],
}
END = 7


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, bad=None):
    return load_rounds(path, tiny.tokenizer(), END, bad or BadRows())


def ids(text):
    return tiny.tokenizer()(text)["input_ids"]


def test_a_row_of_rounds(tmp_path):
    (sample,) = load(written(tmp_path / "a.jsonl", ROW))
    assert sample.background == ids("The tower is red.")
    assert sample.branches == [Branch(ids("Colour?"), ids(" red"), END), Branch(ids("The river is long."), [])]
    assert sample.later == [Branch(ids(" Both:"), ids(" red and long"), END), [Branch(ids("Sure?"), ids(" yes"), END)]]
    layout = build_layout([[sample]])
    answers = [" red", " red and long", " yes"]
    assert layout.weights.sum() == sum(len(ids(text)) + 1 for text in answers)  # and their ends


def test_a_round_may_begin_with_the_trunk(tmp_path):
    row = {"rounds": [{"join": {"answer": "Once"}}, {"branches": [{"prompt": "a"}]}]}
    (sample,) = load(written(tmp_path / "a.jsonl", row))
    assert (sample.background, sample.branches) == ([], [])
    assert sample.later == [Branch([], ids("Once"), END), [Branch(ids("a"), [])]]


def test_which_files_hold_rounds(tmp_path):
    assert holds_rounds(written(tmp_path / "a.jsonl", ROW))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert holds_rounds(str(tmp_path / "b.jsonl.gz"))
    assert load(str(tmp_path / "b.jsonl.gz")) == load(str(tmp_path / "a.jsonl"))
    assert not holds_rounds(str(tiny.squad(tmp_path / "squad.json") or tmp_path / "squad.json"))
    assert not holds_rounds(written(tmp_path / "c.jsonl", {"question": "a"}))
    assert not holds_rounds("rajpurkar/squad")
    (tmp_path / "d.jsonl.gz").write_bytes(b"not a gzip")
    assert not holds_rounds(str(tmp_path / "d.jsonl.gz"))


def changed(**parts):
    return {**ROW, **parts}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, "row 1 is int, not an object"),
        (changed(background=5), "'background' is 5"),
        (changed(backgrond=""), "row 1 has 'backgrond', which nothing reads"),
        (changed(rounds=[]), "'rounds' is not a list of one round or more"),
        (changed(rounds=[{}]), r"rounds\[0\] has neither 'branches' nor a 'join'"),
        (changed(rounds=[{"branches": "a"}]), r"rounds\[0\]: 'branches' is not a list"),
        (
            changed(rounds=[ROW["rounds"][1], {"branches": [{"answer": "a"}]}]),
            r"rounds\[1\].branches\[0\] has no prompt",
        ),
        (changed(rounds=[{"join": {"prompt": ""}}]), r"rounds\[0\].join has no prompt"),
        (changed(rounds=[{"join": {"prompt": None}}]), r"rounds\[0\].join: 'prompt' is null"),
        (changed(rounds=[{"branches": [{"prompt": "a", "answers": "b"}]}]), r"has 'answers', which nothing reads"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, row, message):
    path = written(tmp_path / "a.jsonl", ROW, row)
    with pytest.raises(InputError, match=message):
        load(path)
    bad = BadRows(skip=True)
    assert len(load(path, bad)) == bad.count == 1


def test_what_is_drawn_depends_on_the_seed(tmp_path):
    samples = load(written(tmp_path / "a.jsonl", *[changed(background=str(i)) for i in range(30)]))
    first, again, other = (draw(samples, 5, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert draw(samples, 5, None) == samples[:5]
    assert draw(samples, None, 0) == draw(samples, 99, 0) == samples


def test_finetuning_on_rounds(tmp_path):
    data = written(tmp_path / "rounds.jsonl", *[changed(background=f"{i} towers") for i in range(40)])
    options = {"model_name": str(tiny.model_directory(tmp_path / "model")), "random_init": True, "dataset_name": data}
    options |= {
        "output_dir": str(tmp_path / "run"),
        "max_length": 128,
        "max_steps": 2,
        "logging_steps": 1,
        "mesh": (1, 8, 1),
        "batch_size": 8,
    }
    with pytest.raises(InputError, match="--max-branches is for data in SQuAD's format"):
        finetune(FinetuneFlags(**options, max_branches=2))
    finetune(FinetuneFlags(**options))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert (tmp_path / "run" / "config.json").is_file()
