"""scripts/answer.py: the answers of every document alone, in the order of the input, whatever interrupts it."""

import json

import jax
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from pd_jax import ParallelDecoder, Sample
from pd_jax.files import load_config, save_model, write_params
from pd_jax.jobs import one_line
from pd_jax.params import init_params

DOCUMENTS = [
    {
        "id": f"d{i}",
        "background": f"Tower {i} is {'red ' * (1 + 5 * (i % 3))}.",
        "branches": ["How?", "Why?"][: 1 + i % 2],
    }
    for i in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose answers end now and then."""
    root = tmp_path_factory.mktemp("model")
    source = tiny.model_directory(root / "hf", vocab_size=320, pair_indices=(), num_hidden_layers=1)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(256, 320))}))
    config = load_config(source)
    params = init_params(config, jax.random.key(1))
    save_model(root / "columns", params, config, source)
    write_params(source, params, config)
    return root


@pytest.fixture
def answer(command, model):
    """scripts/answer.py with some arguments; its exit code."""

    def run(*arguments, name="columns") -> int:
        return command("answer", "--model-name", model / name, *arguments)

    return run


def write(path, rows=DOCUMENTS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SMALL = ("--max-new-tokens", 6, "--batch-size", 2)


def test_every_document_is_answered_as_alone_and_in_order(tmp_path, model, answer):
    assert answer("--input", write(tmp_path / "in.jsonl"), "--output", tmp_path / "out.jsonl", *SMALL) == 0
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == [row["id"] for row in DOCUMENTS]
    decoder = ParallelDecoder.from_pretrained(model / "columns")
    reasons = set()
    for row, asked in zip(out, DOCUMENTS, strict=True):
        (alone,) = decoder.generate([Sample(asked["background"], asked["branches"])], max_new_tokens=6)
        assert row["answers"] == [branch.text.strip() for branch in alone.branches]
        assert row["finish_reasons"] == [branch.finish_reason for branch in alone.branches]
        reasons |= set(row["finish_reasons"])
    assert reasons == {"eos", "length"}
    assert not list(tmp_path.glob("*.partial"))


def test_a_job_that_was_killed_goes_on_without_losing_or_repeating_a_line(tmp_path, answer, monkeypatch, capsys):
    source = write(tmp_path / "in.jsonl")
    assert answer("--input", source, "--output", tmp_path / "whole.jsonl", *SMALL) == 0
    calls, generate = [], ParallelDecoder.generate

    def killed(self, samples, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(samples))
        return generate(self, samples, **options)

    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    monkeypatch.setattr(ParallelDecoder, "generate", killed)
    assert answer("--input", source, "--output", out, *SMALL) == 130
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"line": 7, "id": "d6", "answ')  # cut while it was written
    monkeypatch.setattr(ParallelDecoder, "generate", generate)
    write(tmp_path / "other.jsonl", DOCUMENTS[:3])
    assert answer("--input", tmp_path / "other.jsonl", "--output", out, *SMALL) == 2
    assert "was made with input" in capsys.readouterr().err
    assert answer("--input", source, "--output", out, *SMALL) == 0
    assert "going on behind 4 of 9 documents" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert answer("--input", source, "--output", out, *SMALL) == 2
    assert "exists; choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "write {"),
        ('{"background": "a"}', "write {"),
        ('{"background": "a", "branches": "b"}', "branches is 'b'"),
        ('{"background": null, "branches": []}', "has no branches"),
        ('{"background": 7, "branches": ["a"]}', "background is 7"),
        ('{"branches": [""]}', "are empty"),
        ('{"branches": ["a"], "max_new_tokens": [1, 2]}', "one for each branch"),
        ('{"branches": ["a"], "max_new_tokens": 1.5}', "max_new_tokens is 1.5"),
        ('{"branches": ["a"], "question": "b"}', "unknown key 'question'"),
        ('{"branches": ["a"], "id": {}}', "id is"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path, answer, capsys, line, message):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(DOCUMENTS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    assert answer("--input", source, "--output", out, *SMALL) == 2
    error = capsys.readouterr().err
    assert f"{source}, line 3" in error
    assert message in error
    assert not out.exists()
    assert answer("--input", source, "--output", out, *SMALL, "--skip-bad-rows") == 0
    assert len(read(out)) == 1
    assert "1 bad rows of the data were skipped" in capsys.readouterr().out


def test_a_job_that_cannot_begin_leaves_nothing(tmp_path, answer, capsys):
    source = write(tmp_path / "in.jsonl")
    assert answer("--input", source, "--output", tmp_path / "out.jsonl", "--pair-indices", 1, 99, *SMALL) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_formats_and_limits(tmp_path, answer):
    rows = [{"id": "a", "background": "Red.", "branches": ["What?", "How?"], "max_new_tokens": [1, 2]}]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    assert answer("--input", tmp_path / "in.parquet", "--output", tmp_path / "a.jsonl", *SMALL) == 0
    assert answer("--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "b.jsonl", *SMALL) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    squad = tiny.squad(tmp_path / "squad.json", 3)
    assert answer("--input", squad, "--output", tmp_path / "c.jsonl", *SMALL) == 0
    assert [row["questions"] for row in read(tmp_path / "c.jsonl")] == [["0-0"], ["1-0", "1-1"], ["2-0", "2-1", "2-2"]]


def test_plain_is_transformers_greedy_token_for_token(tmp_path, model, answer, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source, out = write(tmp_path / "in.jsonl", DOCUMENTS[:4]), tmp_path / "out.jsonl"
    assert answer("--plain", "--input", source, "--output", out, *SMALL, name="hf") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model / "hf", dtype=torch.float32)
    tokenizer = tiny.tokenizer()
    for row, asked in zip(read(out), DOCUMENTS, strict=False):
        for said, prompt in zip(row["answers"], asked["branches"], strict=True):
            ids = [i for text in (asked["background"], prompt) for i in tokenizer(text)["input_ids"]]
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
            assert said == tokenizer.decode([i for i in whole if i < 256]).strip()  # what ends an answer is not said
    assert answer("--plain", "--align", "left", "--input", source, "--output", tmp_path / "x", name="hf") == 2
    assert "contradict" in capsys.readouterr().err


def replayed(page) -> list[dict]:
    """The records of a replay."""
    return json.loads(page.read_text(encoding="utf-8").split('type="application/json">')[1].split("</script>")[0])


def test_a_replay_shows_the_answers_of_the_job(tmp_path, answer, capsys, monkeypatch):
    documents = [*DOCUMENTS[:2], DOCUMENTS[0] | {"id": "long", "background": "long " * 40}]
    source, out, page = write(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl", tmp_path / "replay.html"
    assert answer("--input", source, "--output", out, "--attention", *SMALL) == 2
    assert "--attention is for --html" in capsys.readouterr().err
    monkeypatch.setattr("pd_jax.replay.MOST_TOKENS", 80)
    assert answer("--input", source, "--output", out, "--html", page, "--attention", *SMALL) == 0
    records = replayed(page)
    short = read(out)[:2]  # the third is too long for the page
    assert [made["title"] for made in records] == [row["id"] for row in short]
    assert f"{page}: a replay of 2 documents" in capsys.readouterr().out
    for made, row in zip(records, short, strict=True):
        cells = [*zip(made["branch"], made["kind"], made["text"], strict=True)]
        said = ["".join(t for b, k, t in cells if (b, k) == (n, 2)) for n in range(1, len(made["ends"]) + 1)]
        assert [text.strip() for text in said] == row["answers"]
        assert made["ends"] == row["finish_reasons"]
        assert len(made["attention"]) == 2  # the average, and one layer


def test_the_demo_s_replay_shows_what_it_printed(tmp_path, command, model, capsys):
    page, asked = tmp_path / "replay.html", ("--background", "It is red.", "--questions", "What?", "Why so?")
    flags = ("--model-name", model / "columns", "--max-new-tokens", 6, *asked)
    assert command("demo", *flags, "--attention") == 2
    assert command("demo", *flags, "--html", page) == 0
    (made,) = replayed(page)
    printed = capsys.readouterr().out
    for branch in (1, 2):
        cells = zip(made["branch"], made["kind"], made["text"], strict=True)
        said = "".join(text for b, kind, text in cells if (b, kind) == (branch, 2))
        assert f"  {one_line(said.strip())}\n" in printed
    assert made["attention"] is None
