import dataclasses
import os
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from runs import finetune_flags, inputs, metrics, pretrain_flags

from pd_jax.columns import Coordinates
from pd_jax.config import LoraConfig
from pd_jax.data import pipeline, squad
from pd_jax.files import load_config, load_params, load_tokenizer
from pd_jax.layout import Branch, TokenSample, build_layout, fit
from pd_jax.lora import init_adapters
from pd_jax.loss import weighted_nll
from pd_jax.mesh import BATCH_ABT, make_mesh, param_shardings, place_batch
from pd_jax.model import forward, head, logits
from pd_jax.params import init_params
from pd_jax.training.loop import abstract_state
from pd_jax.training.stages import finetune, pretrain
from pd_jax.training.step import Optimisation, StepSettings, make_optimizer, make_step

ROOT = Path(__file__).parents[2]
CONFIG = tiny.config()
OPTIMISATION = Optimisation(learning_rate=1e-2)


def random_rows(rows: int, length: int = 48, seed: int = 0) -> dict[str, np.ndarray]:
    """Finetuning rows with ragged answers, some rows nearly empty: their weights differ widely."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(1, 300, rng.integers(low, high)).tolist()

    samples = [
        [TokenSample(ids(0, 12), [Branch(ids(1, 5), ids(1, 8 if r % 2 else 2), 9) for _ in range(1 + r % 3)])]
        for r in range(rows)
    ]
    layout = build_layout(samples, length)
    return {name: layout[name] for name in layout}


def stacked(rows: dict[str, np.ndarray], accumulation: int) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v.reshape(accumulation, -1, v.shape[-1])) for k, v in rows.items()}


@cache
def start() -> dict:
    """A fresh training state, as numpy."""
    optimizer, _ = make_optimizer(OPTIMISATION, 10)

    def state() -> dict:
        params = init_params(CONFIG, jax.random.key(0))
        return {"trained": params, "opt": optimizer.init(params), "step": jnp.int32(0)}

    return jax.device_get(jax.jit(state)())


@cache
def compiled_step(remat: str = "none") -> Callable:
    step = jax.jit(make_step(CONFIG, make_optimizer(OPTIMISATION, 10)[0], StepSettings(remat=remat))[0])

    def run(rows: dict[str, np.ndarray], accumulation: int = 1) -> tuple[dict, dict]:
        with one_device():
            return step(start(), {}, stacked(rows, accumulation))

    return run


def one_device():
    return jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1]))


# ---------------------------------------------------------------- targets


@pytest.mark.slow
def test_flat_shift_answers_the_neighbour_and_per_branch_targets_their_own():
    """The fault of the PyTorch experiment: labels shifted in flat, column-sorted order are the next branch's tokens.

    Two branches ask `[key, ASK]`; the answer is key + 40. With flat labels the second branch learns the first one's
    answer; with per-branch targets each learns its own.
    """
    ask, keys = 5, 40
    config = tiny.config(vocab_size=96, hidden_size=64, head_dim=32, num_attention_heads=2, pair_indices=(1, 2, 3))

    def batch(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
        chosen = rng.integers(0, keys, (rows, 2))
        samples = [[TokenSample([], [Branch([10 + a, ask], [50 + a], 1) for a in row])] for row in chosen]
        layout = build_layout(samples)
        return {name: layout[name] for name in layout}

    def flat(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = ~rows["prompt"] & rows["valid"]
        following = np.roll(answer, -1, axis=1)
        following[:, -1] = False
        return rows | {"targets": np.roll(rows["tokens"], -1, axis=1), "weights": following.astype(np.float32)}

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 400))

    @jax.jit
    def step(params, opt, rows):
        def loss(params):
            hidden = forward(params, config, rows["tokens"], Coordinates.of(rows))
            return weighted_nll(hidden, head(params), rows["targets"], rows["weights"]) / rows["weights"].sum()

        updates, opt = optimizer.update(jax.grad(loss)(params), opt)
        return optax.apply_updates(params, updates), opt

    def answers(change) -> tuple[int, int]:
        """Of 180 questions to the second branch: how many get the right answer, how many the neighbour's."""
        rng = np.random.default_rng(0)
        params = init_params(config, jax.random.key(0))
        opt = optimizer.init(params)
        for _ in range(400):
            params, opt = step(params, opt, change(batch(rng, 32)))
        test = batch(np.random.default_rng(1), 400)
        different = np.flatnonzero(test["tokens"][:, 0] != test["tokens"][:, 1])[:180]
        out = logits(params, forward(params, config, test["tokens"], Coordinates.of(test)))
        said = np.asarray(out[different, 3].argmax(-1))  # flat order: key1 key2 ASK1 ASK2 answer1 answer2
        own, neighbour = test["tokens"][different, 5], test["tokens"][different, 4]
        return int((said == own).sum()), int((said == neighbour).sum())

    assert answers(flat) == (0, 180)
    assert answers(lambda rows: rows) == (180, 0)


# ---------------------------------------------------------------- the step


def test_accumulation_changes_nothing():
    """1 x 4 rows and 4 x 1 rows with very different weights: the same loss and the same update."""
    rows = random_rows(4)
    assert len(set(rows["weights"].sum(1).tolist())) > 2
    whole, first = compiled_step()(rows, 1)
    parts, second = compiled_step()(rows, 4)
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-5)
    # Adam divides by the gradient's size: compare its first moment, which is the gradient itself.
    gradients = [optax.tree_utils.tree_get(state["opt"], "mu") for state in (whole, parts)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), *gradients)


def test_the_loss_is_the_mean_over_weighted_targets():
    rows = random_rows(4)
    out = jax.jit(lambda p: logits(p, forward(p, CONFIG, rows["tokens"], Coordinates.of(rows))))(start()["trained"])
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), rows["targets"][..., None], -1)[..., 0]
    expected = (nll * rows["weights"]).sum() / rows["weights"].sum()
    np.testing.assert_allclose(compiled_step()(rows)[1]["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_recomputing_changes_nothing(remat):
    plain, recomputed = (compiled_step(policy)(random_rows(4))[1]["grad_norm"] for policy in ("none", remat))
    np.testing.assert_allclose(plain, recomputed, rtol=1e-5)


def test_padding_rows_change_nothing():
    rows = random_rows(4)
    empty = build_layout([[], []], rows["tokens"].shape[1])
    some = {name: np.concatenate([array[:2], empty[name]]) for name, array in rows.items()}
    mixed = {name: array[[2, 0, 3, 1]] for name, array in some.items()}
    first, second = compiled_step()(some)[1], compiled_step()(mixed)[1]
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-5)
    alone = {name: array[[0, 1, 0, 1]] for name, array in rows.items()}
    np.testing.assert_allclose(first["loss"], compiled_step()(alone)[1]["loss"], rtol=1e-6)
    nothing = compiled_step()({name: array[[2, 2, 3, 3]] for name, array in some.items()})[1]
    assert float(nothing["loss"]) == 0
    assert float(nothing["grad_norm"]) == 0


def test_only_adapters_are_trained_and_only_they_have_moments():
    lora = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "down_proj"))
    optimizer, _ = make_optimizer(OPTIMISATION, 10)
    step = jax.jit(make_step(CONFIG, optimizer, StepSettings(), lora)[0])
    adapters = init_adapters(CONFIG, lora, jax.random.key(1))
    state = {"trained": adapters, "opt": optimizer.init(adapters), "step": jnp.int32(0)}
    losses = []
    with one_device():
        for _ in range(8):
            state, metrics = step(state, start()["trained"], stacked(random_rows(3), 1))
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    sizes = jax.tree.map(jnp.size, optax.tree_utils.tree_get(state["opt"], "mu"))
    assert sizes == jax.tree.map(jnp.size, adapters)


def test_norms_do_not_decay():
    """With a zero gradient only weight decay moves a parameter."""
    optimizer, _ = make_optimizer(dataclasses.replace(OPTIMISATION, weight_decay=0.1, warmup_ratio=0), 10)

    @jax.jit
    def unmoved() -> dict:
        params = init_params(tiny.config(sibling_bias=True), jax.random.key(0))
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    updates = unmoved()
    moved = {jax.tree_util.keystr(p) for p, u in jax.tree_util.tree_leaves_with_path(updates) if np.any(u)}
    kernels = {f"['layers']['{name}']" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert moved == kernels | {"['embed']"}


def test_warmup_then_cosine():
    _, schedule = make_optimizer(dataclasses.replace(OPTIMISATION, learning_rate=1.0, warmup_ratio=0.1), 100)
    rates = np.array([schedule(i) for i in range(101)])
    assert (np.diff(rates[:11]) > 0).all()
    assert rates[10] == 1.0
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[100] < 1e-6


# ---------------------------------------------------------------- sharding


def run_sharded(mesh_sizes: tuple[int, ...], steps: int, lora: bool = False) -> tuple[list[float], dict]:
    """Losses of `steps` steps of 8 rows on a mesh, and the last state."""
    devices = jax.devices()[: int(np.prod(mesh_sizes))]
    mesh = make_mesh(*mesh_sizes, devices=devices)
    optimizer, _ = make_optimizer(OPTIMISATION, steps)
    with jax.set_mesh(mesh):
        shardings = param_shardings(CONFIG, mesh)
        params = jax.device_put(start()["trained"], shardings)
        shape = abstract_state(params, shardings, optimizer, mesh)
        places = jax.tree.map(lambda x: x.sharding, shape)
        state = {
            "trained": params,
            "opt": jax.jit(optimizer.init, out_shardings=places["opt"])(params),
            "step": jax.device_put(jnp.int32(0), places["step"]),
        }
        step = jax.jit(make_step(CONFIG, optimizer, StepSettings())[0], out_shardings=(places, None))
        batch_place = jax.sharding.NamedSharding(mesh, BATCH_ABT)
        losses = []
        for i in range(steps):
            state, metrics = step(state, {}, jax.device_put(stacked(random_rows(8, seed=i), 1), batch_place))
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
    return losses, state


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 2), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(mesh):
    alone, _ = run_sharded((1, 1, 1), 20)
    losses, state = run_sharded(mesh, 20)
    np.testing.assert_allclose(losses, alone, rtol=2e-4)
    assert losses[-1] < losses[0] - 0.5
    q = state["trained"]["layers"]["q"]
    assert q.addressable_shards[0].data.size == q.size // (mesh[1] * mesh[2])
    mu = optax.tree_utils.tree_get(state["opt"], "mu")
    jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding, p.sharding), mu, state["trained"])


# ---------------------------------------------------------------- runs


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", partial(lambda all: all[:2], jax.devices()))


TWO = {"batch_size": 2, "mesh": (1, 2, 1)}


@pytest.mark.slow
@pytest.mark.usefixtures("two_devices")
def test_the_stages_follow_one_another(tmp_path, caplog):
    """Pretraining writes what finetuning starts from; settings and tokenizer travel along; both learn. The step and the
    evaluation compile once a run."""
    first, second = tmp_path / "pretrained", tmp_path / "finetuned"

    def compiled(train: Callable[[], None]) -> tuple[int, int]:
        caplog.clear()
        with jax.log_compiles():
            train()
        return tuple(sum(f"Compiling jit({name})" in line for line in caplog.messages) for name in ("step", "evaluate"))

    wide = {"branch_count": 3, "seq_length": 12, "max_steps": 30, "learning_rate": 3e-3}
    wide |= {"eval_dataset_name": inputs()["web"], "eval_steps": 15}
    assert compiled(lambda: pretrain(pretrain_flags(first, **TWO, **wide))) == (1, 1)
    losses = [m["loss"] for m in metrics(first)]
    validation = [m["validation_loss"] for m in metrics(first) if "validation_loss" in m]
    assert len(validation) == 2
    assert validation[1] < validation[0] < losses[0]
    assert [m["step"] for m in metrics(first)] == list(range(1, 31))
    assert losses[-1] < losses[0] - 1
    flags = finetune_flags(second, model_name=str(first), epochs=6, learning_rate=3e-3, eval_steps=3, **TWO)
    assert compiled(lambda: finetune(flags)) == (1, 1)
    assert metrics(second)[-1]["loss"] < metrics(second)[0]["loss"] - 1
    validation = [m["validation_loss"] for m in metrics(second) if "validation_loss" in m]
    assert len(validation) == -(-len(metrics(second)) // 3)
    assert validation[-1] < metrics(second)[0]["loss"] - 1
    config = load_config(second)
    assert config == dataclasses.replace(CONFIG, visibility="columns", align="left")
    assert {"tokenizer.json", "config.json", "params"} <= {p.name for p in second.iterdir()}
    before = load_params(first, config)["layers"]["q"]
    assert not np.array_equal(before, load_params(second, config)["layers"]["q"])
    assert compiled(lambda: finetune(flags)) == (0, 0)  # finished: says so and changes nothing


# ---------------------------------------------------------------- data


def row_settings(length: int, **changes) -> pipeline.RowSettings:
    return pipeline.RowSettings(**{"length": length, "align": "left", "pad_id": 0, "seed": 0} | changes)


def test_a_mix_draws_a_visibility_for_every_sample_by_the_shares():
    """By the sample and the seed alone, however the samples are packed."""
    samples = [TokenSample([i], [Branch([7], [8], 9)]) for i in range(300)]

    def drawn(rows: list[list[int]], **changes) -> dict[int, int]:
        """The background's token of every sample, and its visibility."""
        settings = row_settings(9, **changes)
        found = {}
        for batch in pipeline.finetune_batches(samples, rows, settings, rows_per_step=2):
            for tokens, branch, valid, kind in zip(
                *(batch[name] for name in ("tokens", "branch", "valid", "visibility")), strict=True
            ):
                found |= {int(tokens[i]): int(kind[i]) for i in np.flatnonzero(valid & (branch == 0))}
        return found

    alone, packed = [[i] for i in range(300)], [[i, i + 1, i + 2] for i in range(0, 300, 3)]
    mixed = drawn(packed, mix=(2.0, 1.0, 1.0))
    assert drawn(alone, mix=(2.0, 1.0, 1.0)) == mixed
    counts = np.bincount(list(mixed.values()), minlength=3)
    assert np.abs(counts / 300 - [0.5, 0.25, 0.25]).max() < 4 * 0.5 / 300**0.5
    assert drawn(packed, mix=(2.0, 1.0, 1.0), seed=1) != mixed
    assert set(drawn(packed, mix=(0.0, 0.0, 1.0)).values()) == {2}
    assert set(drawn(packed).values()) == {-1}  # without a mix, none of their own


def test_finetuning_sees_every_sample_once_an_epoch():
    sizes = [5, 9, 3, 7, 10, 2, 8]
    rows = pipeline.finetune_rows(sizes, 12, epochs=3, seed=0)
    seen = [i for row in rows for i in row]
    assert sorted(seen) == sorted(list(range(7)) * 3)
    assert seen[:7] != seen[7:14]
    assert all(sum(sizes[i] for i in row) <= 12 for row in rows)
    assert rows == pipeline.finetune_rows(sizes, 12, epochs=3, seed=0)
    samples = [TokenSample(range(size - 2), [Branch([7], [8], 9)]) for size in sizes]
    batches = list(pipeline.finetune_batches(samples, rows, row_settings(12), rows_per_step=2))
    assert all(batch["tokens"].shape == (2, 12) for batch in batches)
    assert sum(batch["valid"].sum() for batch in batches) == 3 * sum(sizes)


@pytest.mark.slow
def test_workers_change_nothing():
    sizes = [5, 9, 3, 7, 10, 2, 8]
    samples = [TokenSample(range(size - 2), [Branch([7], [8], 9)]) for size in sizes]
    rows = pipeline.finetune_rows(sizes, 12, epochs=2, seed=0)

    def batches(workers: int) -> list[dict[str, np.ndarray]]:
        return list(pipeline.finetune_batches(samples, rows, row_settings(12), rows_per_step=2, workers=workers))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == -(-len(rows) // 2)
    for one, two in zip(alone, shared, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_micro_batch_is_the_same_for_any_number_of_processes(monkeypatch, accumulation):
    """What two processes read stands where one process puts it: dropout does not depend on their number."""
    samples = [TokenSample([i, i], [Branch([7], [8], 9)]) for i in range(16)]
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    place = partial(place_batch, mesh, accumulation)

    def batches(process: int, processes: int) -> list[dict]:
        share = grain.sharding.ShardOptions(process, processes)
        monkeypatch.setattr(grain.sharding, "ShardByJaxProcess", lambda: share)
        rows = [[i] for i in range(16)]
        return list(pipeline.finetune_batches(samples, rows, row_settings(5), rows_per_step=8))

    def micro(batch: dict) -> np.ndarray:
        """The first token of every row, [A, B]."""
        return np.asarray(place(batch)["tokens"])[..., 0]

    for one, *two in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        np.testing.assert_array_equal(micro(one), np.concatenate([micro(part) for part in two], axis=1))
        assert not np.array_equal(micro(two[0]), micro(two[1]))


@pytest.mark.slow
def test_rows_of_squad_are_full():
    """Contexts packed at --max-length 1024: at least 0.85 of the tokens are used, and packing 8,000 takes no time."""
    data = Path(os.environ.get("PD_JAX_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (data / "squad").is_dir():
        pytest.skip(f"no data beside the checkout: {data / 'squad'} is absent; set PD_JAX_DATA")
    tokenizer = load_tokenizer(data / "qwen-tokenizer")
    contexts = squad.select(squad.load_squad(str(data / "squad" / "train-mix.json.gz")), 3, 2, None)
    fitted = [fit(squad.to_tokens(context, tokenizer, 1), 1024) for context in contexts]
    sizes = [len(sample) for sample in fitted if sample is not None]
    began = time.monotonic()
    rows = pipeline.finetune_rows(sizes, 1024, epochs=2, seed=0)
    assert time.monotonic() - began < 2
    assert 2 * sum(sizes) / (len(rows) * 1024) > 0.95


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "/nowhere/model"}, "/nowhere/model"),
        ({"dataset_name": "/nowhere/web.jsonl"}, "documents '/nowhere/web.jsonl' cannot be loaded"),
        ({"pair_indices": (3,)}, r"pair_indices \[3\] was asked for, but the weights were trained with \[2, 4, 6\]"),
        ({"branch_count": 10_000}, "10000 are needed"),
        ({"batch_size": 3}, r"--batch-size 3 does not divide over data x fsdp = 1 x 2"),
        ({"mesh": (1, 3, 1)}, "does not fit 2 devices"),
        ({"mesh": (1, 1)}, "has 2 sizes"),
        ({"streaming": True, "workers": 2}, "--workers 2 cannot share a stream"),
    ],
)
@pytest.mark.usefixtures("two_devices")
def test_bad_input_is_named_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(pretrain_flags(tmp_path / "out", **TWO | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("two_devices")
def test_another_run_in_the_output_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else"):
        pretrain(pretrain_flags(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("two_devices")
def test_contexts_that_do_not_fit(tmp_path):
    flags = finetune_flags(tmp_path / "out", random_init=True, max_length=9, **TWO)
    with pytest.raises(ValueError, match=r"no context of .* fits --max-length 9: the shortest needs"):
        finetune(flags)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_counted(tmp_path, monkeypatch, capsys):
    """Backgrounds are shortened first, then samples dropped; no question and no answer is cut."""
    taken = {}
    monkeypatch.setattr("pd_jax.training.stages.train", lambda *_, data, **__: taken.update(next(data)))
    finetune(finetune_flags(tmp_path / "out", max_length=112, batch_size=8, max_branches=4, mesh=(1, 8, 1)))
    said = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"contexts, \d+ questions; [1-9]\d* backgrounds shortened and [1-9]\d* contexts dropped", said)
    assert taken["tokens"].shape == (8, 112)


@pytest.mark.slow
def test_a_run_says_what_it_takes_before_it_takes_it(tmp_path, capsys):
    """Memory before the first step, by the compiler's account; the time that is left after the second."""
    sizes = {}
    for length in (8, 64):
        flags = pretrain_flags(tmp_path / str(length), seq_length=length, max_steps=4, batch_size=8, mesh=(1, 8, 1))
        pretrain(flags)
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(r"a step holds .* step 1/4 .*a step takes \d+\.\d\d s, all that are left about 0:00:0\d", said)
        assert said.count("a step takes") == 1
        sizes[length] = float(re.findall(r"a step holds ([\d,.]+) MiB", said)[0].replace(",", ""))
    assert 0 < sizes[8] < sizes[64] < 100
