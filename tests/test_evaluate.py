"""The metric, the statistics, and whole evaluations of small random models through the script's main."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
import unicodedata
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pd_jax.data.squad import Context, Question
from pd_jax.evaluation import EvaluateFlags
from pd_jax.evaluation.metrics import (
    answer_of,
    estimate,
    leaks,
    normalize,
    score,
    summarize,
)
from pd_jax.evaluation.report import tables
from pd_jax.evaluation.run import evaluate, measure
from pd_jax.files import load_config, save_model, write_params
from pd_jax.params import init_params

# The metric -----------------------------------------------------------------------------------------------------------


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


# Statistics -----------------------------------------------------------------------------------------------------------


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


def test_measure_throws_away_runs_in_which_something_compiled():
    calls = []

    def run():
        calls.append(None)
        if len(calls) == 1:
            jax.jit(lambda x: x + 1)(1.0)
        return len(calls)

    assert measure(run, 0) == (1, None)
    calls.clear()
    result, seconds = measure(run, 2)
    assert result == len(calls) == 3
    assert seconds is not None


def record(answers: list[str], **changes) -> dict:
    made = {"ids": [], "answers": answers, "ended": [True] * len(answers), "tokens": 4, "peak_bytes": None}
    made |= {"columns": 5, "forwards": 5.0, "slots": 10.0, "prefill_tokens": 30.0, "seconds": 2.0}
    return made | {"first_token_seconds": 1.0} | changes


def question(answer: str, leaks: bool = False) -> dict:
    return {"id": "", "question": "", "answers": [answer], "leaks": leaks}


def test_the_summary_of_constructed_records():
    results = {
        "flags": {"metric": "squad", "against": "b", "seed": 0},
        "contexts": [
            {"questions": [question("red"), question("blue", leaks=True)]},
            {"questions": [question("red"), question("blue"), question("dark green")]},
        ],
        "rows": {
            "a": [
                record(["red", "blue"], peak_bytes=7),
                record(["red\nQuestion:", "red", "green"], tokens=6, seconds=3.0, slots=20.0, peak_bytes=9),
            ],
            "b": [record(["red", "red"]), record(["red", "red", "red"], seconds=None)],
        },
    }
    summary = summarize(results)
    a, b = summary["rows"]["a"], summary["rows"]["b"]
    assert (summary["reference"], summary["contexts"], summary["questions"]) == ("b", 2, 5)
    assert (a["em"]["value"], a["em"]["difference"], b["em"]["value"]) == pytest.approx((60, 20, 40))
    assert a["f1"]["value"] == pytest.approx(100 * (3 + 2 / 3) / 5)
    assert (a["leak_free"]["questions"], a["leak_free"]["em"]["value"]) == (4, pytest.approx(50))
    assert [a["by_branches"][k]["em"]["value"] for k in (2, 3)] == pytest.approx([100, 100 / 3])
    assert [a["by_branches"][k]["cost"]["tokens_per_second"] for k in (2, 3)] == [2, 2]
    assert [a["by_index"][k]["em"]["value"] for k in (1, 2, 3)] == [100, 50, 0]
    assert [a["by_index"][k]["questions"] for k in (1, 2, 3)] == [2, 2, 1]
    assert a["em"]["interval"] is a["em"]["difference_interval"] is None  # two contexts say nothing about others
    shown = {title: lines for title, _, lines in tables({"summary": summary})}
    assert shown["EM % by number of branches"] == [
        ["2", "2", "100.0", "50.0", "+50.0"],
        ["3", "3", "33.3", "33.3", "+0.0"],
    ]
    assert shown["F1 % by branch index"][2] == ["3", "1", "66.7", "0.0", "+66.7"]
    assert (a["cost"]["seconds"], a["cost"]["tokens_per_second"], a["cost"]["peak_bytes"]) == (2.5, 2, 9)
    assert a["cost"]["dead"] == pytest.approx(1 - (4 + 2 + 6 + 3) / 30)
    assert b["cost"]["seconds"] is b["cost"]["tokens_per_second"] is b["cost"]["peak_bytes"] is None
    for context in results["contexts"]:
        for q in context["questions"]:
            q["leaks"] = True
    assert summarize(results)["rows"]["a"]["leak_free"] == {"questions": 0}


# Whole evaluations ----------------------------------------------------------------------------------------------------

EOS = tuple(range(256, 320))
SCRIPT = str(Path(__file__).parents[1] / "scripts" / "evaluate.py")
OURS = ["sequential", "isolated", "columns"]


def script(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """One random model twice: `flax` (orbax) and `hf` (safetensors); a fifth of the vocabulary ends an answer."""
    root = tmp_path_factory.mktemp("models")
    source = tiny.model_directory(root / "hf", pair_indices=(), tie_word_embeddings=False, num_hidden_layers=1)
    eos = {"eos_token_id": list(EOS), "do_sample": True, "temperature": 2.0}
    (source / "generation_config.json").write_text(json.dumps(eos))
    config = load_config(source)
    params = init_params(config, jax.random.key(1))
    save_model(root / "flax", params, config, source)
    write_params(source, params, config)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three contexts of one size (one shape to compile), two questions each; a fourth has one only."""
    paragraphs = [
        {
            "context": f"{name}: red.",
            "qas": [
                {"id": f"{name}{i}", "question": text, "answers": [{"text": "red", "answer_start": 5}]}
                for i, text in enumerate(texts)
            ],
        }
        for name, texts in {"A": ["Is?", "What?"], "B": ["How so?", "Why?"], "C": ["Who?", "It?"], "D": ["No"]}.items()
    ]
    path = tmp_path_factory.mktemp("data") / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "letters", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="module")
def finished(models, data, tmp_path_factory) -> tuple[EvaluateFlags, dict]:
    output = tmp_path_factory.mktemp("finished")
    flags = EvaluateFlags(
        ft_model=str(models / "flax"),
        dataset_name=str(data),
        rows=tuple(OURS),
        max_new_tokens=6,
        output_dir=str(output),
        dump_file=str(output / "dump.json"),
        against="isolated",
    )
    return flags, evaluate(flags)


def test_our_rows(finished):
    results = finished[1]
    assert list(results["rows"]) == OURS
    assert (results["summary"]["contexts"], results["summary"]["questions"]) == (3, 6)
    answers = {name: [record["answers"] for record in records] for name, records in results["rows"].items()}
    assert answers["isolated"] == answers["sequential"]  # no branch pairs: ordinary decoding of each branch alone
    assert answers["columns"] != answers["isolated"]
    for records in results["rows"].values():
        for made in records:
            assert made["tokens"] <= 6 * len(made["answers"])
            assert made["seconds"] > 0
            assert made["first_token_seconds"] > 0
    serial, isolated = (results["rows"][name] for name in ("sequential", "isolated"))
    assert any(any(made["ended"]) for made in isolated)
    for alone, together in zip(serial, isolated, strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["forwards"] == together["columns"] < alone["forwards"] == alone["columns"]
        assert together["prefill_tokens"] < alone["prefill_tokens"]
        assert alone["slots"] == alone["forwards"] == alone["tokens"] + sum(alone["ended"])
        assert together["slots"] == 2 * together["forwards"]


def test_any_row_runs_with_a_control_beside(finished, models, tmp_path, monkeypatch, capsys):
    flags, results = finished
    config, control = load_config(models / "hf"), models / "control"
    save_model(control, init_params(config, jax.random.key(2)), config, models / "hf")
    rows = ("isolated", f"isolated={control}", f"sequential={control}", f"columns={models / 'flax'}")
    made = evaluate(dataclasses.replace(flags, rows=rows, repeats=0, output_dir=str(tmp_path), dump_file=None))
    assert list(made["rows"]) == [rows[2], *rows[:2], rows[3]]  # in the table's order
    answers = [[record["answers"] for record in made["rows"][row]] for row in rows]
    assert answers[0] == [record["answers"] for record in results["rows"]["isolated"]]
    assert answers[1] == answers[2] != answers[0]
    assert answers[3] == [record["answers"] for record in results["rows"]["columns"]]
    assert made["settings"][rows[1]]["weights"] != made["settings"]["isolated"]["weights"]
    assert len(list(tmp_path.glob("predictions-*.jsonl"))) == 4
    assert script(monkeypatch, "--from", tmp_path / "results.json", "--against", rows[1]) == 0
    assert f"EM against {rows[1]}" in (tmp_path / "report.html").read_text()
    assert script(monkeypatch, "--from", tmp_path / "results.json", "--against", "prompts") == 2
    assert "--against prompts is not a row of" in capsys.readouterr().err


def test_a_control_is_a_row_of_transformers_too(models, data, tmp_path):
    pytest.importorskip("torch")
    asked = EvaluateFlags(dataset_name=str(data), max_new_tokens=6, repeats=0, output_dir=str(tmp_path))
    rows = (f"hf-sequential={models / 'hf'}", f"isolated={models / 'flax'}")
    made = evaluate(dataclasses.replace(asked, rows=rows))["rows"]
    assert [r["answers"] for r in made[rows[0]]] == [r["answers"] for r in made[rows[1]]]


def test_files_are_enough_to_recompute_the_table(finished):
    flags, results = finished
    output = Path(flags.output_dir)
    stored = json.loads((output / "results.json").read_text())
    again = summarize(stored)
    assert again == results["summary"]
    assert stored["machine"]["versions"]["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", stored["settings"]["columns"]["weights"][0])
    assert stored["flags"] == json.loads(json.dumps(dataclasses.asdict(flags)))
    report = (output / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3
    assert "http" not in re.sub(r"base64,[^\"]*", "", report)
    dumped = json.loads(Path(flags.dump_file).read_text())
    assert len(dumped) == 6
    for entry in dumped:
        assert entry["answers"]
        assert (entry["baseline_row"], entry["parallel_row"]) == ("isolated", "columns")
        assert entry["parallel"] == entry["predictions"]["columns"]
        assert entry["parallel_em"] == score(entry["parallel"], entry["answers"])[0]


def test_from_renders_without_running(finished, tmp_path, monkeypatch, capsys):
    flags, _ = finished
    copy = tmp_path / "results.json"
    copy.write_text((Path(flags.output_dir) / "results.json").read_text())
    assert script(monkeypatch, "--from", copy) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in OURS)
    assert (tmp_path / "report.html").read_text() == (Path(flags.output_dir) / "report.html").read_text()
    copy.write_text('{"rows": {}}')
    assert script(monkeypatch, "--from", copy) == 2
    assert "is not a results.json of this script" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    flags, results = finished
    shorter = dataclasses.replace(flags, rows=("isolated", "columns"), output_dir=str(tmp_path))
    whole = (Path(flags.output_dir) / "predictions-columns.jsonl").read_text().splitlines(keepends=True)
    half = tmp_path / "predictions-columns.jsonl"
    half.write_text("".join(whole[:2]) + whole[2][:40])  # one context, and one cut off in the middle
    complete = tmp_path / "predictions-isolated.jsonl"
    complete.write_text((Path(flags.output_dir) / "predictions-isolated.jsonl").read_text())
    resumed = evaluate(shorter)
    assert resumed["rows"]["isolated"] == results["rows"]["isolated"]  # measurements too: nothing was run again
    assert resumed["rows"]["columns"][0] == results["rows"]["columns"][0]
    assert [r["answers"] for r in resumed["rows"]["columns"]] == [r["answers"] for r in results["rows"]["columns"]]
    assert len(half.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"predictions-isolated.jsonl was made with max_new_tokens 6 \(now 7\); use"):
        evaluate(dataclasses.replace(shorter, max_new_tokens=7))


def test_a_batch_gives_the_answers_of_its_contexts_alone(finished, tmp_path):
    flags, results = finished
    together = evaluate(
        dataclasses.replace(flags, rows=("isolated",), batch_size=3, repeats=0, output_dir=str(tmp_path))
    )
    batched, alone = together["rows"]["isolated"], results["rows"]["isolated"]
    assert [made["answers"] for made in batched] == [made["answers"] for made in alone]
    assert sum(made["forwards"] for made in batched) == pytest.approx(max(made["columns"] for made in alone))
    assert together["summary"]["rows"]["isolated"]["cost"]["seconds"] is None


def test_transformers_rows_answer_as_ours_do(models, data, tmp_path, monkeypatch, capsys):
    """Without branch pairs, `isolated` and both plain baselines are the same computation."""
    pytest.importorskip("torch")
    arguments = ["--base-model", models / "hf", "--ft-model", models / "flax", "--dataset-name", data]
    arguments += ["--max-new-tokens", 6, "--output-dir", tmp_path, "--repeats", 0, "--batch-size", 3]
    arguments += ["--rows", "hf-sequential", "hf-batched", "hf-one-prompt", "isolated"]
    assert script(monkeypatch, *arguments) == 0
    assert "hf-one-prompt" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    sequential, batched, isolated = (rows[name] for name in ("hf-sequential", "hf-batched", "isolated"))
    for name in ("answers", "tokens", "ended"):
        assert [r[name] for r in sequential] == [r[name] for r in batched] == [r[name] for r in isolated]
    assert any(any(r["ended"]) for r in sequential)
    assert [r["columns"] for r in batched] == [r["columns"] for r in isolated]
    assert [r["prefill_tokens"] for r in batched] == [r["prefill_tokens"] for r in sequential]
    assert sum(r["prefill_tokens"] for r in rows["hf-one-prompt"]) < sum(r["prefill_tokens"] for r in sequential)


def test_hf_rows_of_a_columnar_checkpoint_say_what_they_leave_out(models, data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    columnar = shutil.copytree(models / "hf", tmp_path / "columnar")
    config = json.loads((columnar / "config.json").read_text())
    (columnar / "config.json").write_text(json.dumps(config | {"pd_jax": {"pair_indices": [2, 4, 6]}}))
    arguments = ["--base-model", columnar, "--dataset-name", data, "--output-dir", tmp_path / "out"]
    assert script(monkeypatch, *arguments, "--rows", "hf-batched", "--repeats", 0, "--max-new-tokens", 1) == 0
    assert "was trained with RoPE pairs [2, 4, 6] on the branch axis" in capsys.readouterr().out


def test_one_prompt_with_its_cache_equals_feeding_everything_again(models):
    torch = pytest.importorskip("torch")
    from pd_jax.evaluation.baselines import Transformers

    tokenizer = tiny.tokenizer()
    model = Transformers(models / "hf", tokenizer, EOS, "float32", "cpu")
    context = Context(
        "", "The tower is red.", (Question("1", "Which?", ("a",)), Question("2", "What else is?", ("b",)))
    )
    decoded = model.one_prompt([context], 5)
    pieces = ["Context: The tower is red.\n", "Question 1: Which?\n", "Question 2: What else is?\n"]
    ids = [i for piece in pieces for i in tokenizer(piece)["input_ids"]]
    for cue, answer, ended in zip(["Answer 1:", "\nAnswer 2:"], decoded.ids[0], decoded.ended[0], strict=True):
        ids += tokenizer(cue)["input_ids"]
        for wanted in [*answer, None] if ended else answer:
            with torch.inference_mode():
                logits = model._model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
            chosen = int(logits.argmax())
            if wanted is None:
                assert chosen in EOS
            else:
                assert chosen == wanted
                ids.append(chosen)


def test_without_torch_the_hf_rows_are_skipped(models, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    common = ["--base-model", models / "hf", "--dataset-name", data, "--output-dir", tmp_path]
    assert script(monkeypatch, *common) == 2
    assert "nothing to run" in capsys.readouterr().err
    arguments = [*common, "--ft-model", models / "flax", "--rows", "hf-batched", "isolated", "--max-new-tokens", 6]
    assert script(monkeypatch, *arguments, "--repeats", 0, "--batch-size", 3) == 0
    assert "the hf rows are skipped: torch is not installed (pip install 'pd_jax[hf]')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run: give --base-model"),
        (["--ft-model", "{flax}", "--rows", "column"], "--rows column: no such row; choose from hf-sequential"),
        (["--ft-model", "{flax}", "--rows", "hf-batched"], "row hf-batched needs --base-model"),
        (["--ft-model", "{flax}", "--against", "hf-batched"], "--against hf-batched is not one of the rows that run"),
        (["--ft-model", "{flax}", "--ft-base-model", "{hf}"], "is no adapter"),
        (["--ft-model", "{adapter}"], "is a LoRA adapter; pass the model it belongs to as --ft-base-model"),
        (["--ft-model", "{nowhere}"], "nowhere is not a directory"),
        (
            ["--ft-model", "{flax}", "--pair-indices", "2"],
            "pair_indices [2] was asked for, but the weights were trained",
        ),
        (["--ft-model", "{empty}"], "has no weights, neither params/ nor model*.safetensors"),
        (["--ft-model", "{flax}", "--dataset-name", "nothing.json"], "nothing.json does not exist"),
        (["--ft-model", "{flax}", "--min-questions", "9", "--max-branches", "9"], "no context has 9 questions"),
        (["--ft-model", "{flax}", "--max-new-tokens", "0"], "--max-new-tokens 0 is below 1"),
    ],
)
def test_bad_input(models, data, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(models / "flax", tmp_path / "empty", ignore=shutil.ignore_patterns("params"))
    places = {"flax": models / "flax", "hf": models / "hf"} | {k: tmp_path / k for k in ("adapter", "nowhere", "empty")}
    given = ["--dataset-name", str(data), *(a.format(**places) for a in arguments)]
    assert script(monkeypatch, *given, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_flax_checkpoint_as_base_model_names_the_converter(models, data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    arguments = ["--base-model", models / "flax", "--dataset-name", data, "--output-dir", tmp_path / "out"]
    assert script(monkeypatch, *arguments) == 2
    assert "convert/flax_to_hf.py --checkpoint" in capsys.readouterr().err
