"""The planner: the collectives of a program, what a plan holds and says, and names that are not known."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import tiny

from pd_jax.decoding import BLOCK, Method, Program, cache_bytes, decode_block, prefill
from pd_jax.files import config_from_hf, config_to_hf, known_config
from pd_jax.machines import GIB, MACHINES
from pd_jax.params import parameter_count
from pd_jax.planning import PlanFlags
from pd_jax.planning.collectives import collectives
from pd_jax.planning.compile import compile_train_step, decoder_arguments, topology
from pd_jax.planning.plan import Plan, local_bytes, plan_decoding, plan_training, report, workload_of

# A scan of 5 layers inside 3 micro-batches; the inner loop has a noted trip count, the outer one only a condition.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%layer (arg: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %arg = (s32[], bf16[16,128]{1,0}) parameter(0)
  %gathered = bf16[64,128]{1,0} all-gather(%shard), channel_id=1, dimensions={0}
  ROOT %out = (s32[], bf16[16,128]{1,0}) tuple(%i, %x)
}

%layer_condition (arg.1: (s32[], bf16[16,128])) -> pred[] {
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%micro (arg.2: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %layers = (s32[], bf16[16,128]{1,0}) while(%start), condition=%layer_condition, body=%layer, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %scattered = f32[8,128]{1,0} reduce-scatter(%g), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
}

%micro_condition (arg.3: (s32[], bf16[16,128])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[] compare(%i, %three), direction=LT
}

%skipped (arg.4: f32[8]) -> f32[8] {
  ROOT %arg.4 = f32[8]{0} parameter(0)
}

%half (arg.5: f32[8]) -> f32[8] {
  ROOT %permuted = f32[4]{0} collective-permute(%arg.5), channel_id=5
}

%whole (arg.6: f32[8]) -> f32[8] {
  ROOT %permuted.1 = f32[8]{0} collective-permute(%arg.6), channel_id=6
}

ENTRY %main (p: bf16[16,128]) -> f32[] {
  %chosen = f32[8]{0} conditional(%which, %a, %a, %a), branch_computations={%skipped, %whole, %half}
  %micros = (s32[], bf16[16,128]{1,0}) while(%start), condition=%micro_condition, body=%micro
  %begun = (f32[256]{0}, f32[256]{0}) all-reduce-start(%norms), channel_id=3, to_apply=%add
  %ended = f32[256]{0} all-reduce-done(%begun)
  ROOT %norm = f32[] all-reduce(%square), channel_id=4, to_apply=%add
}
"""


def test_collectives_in_loops_count_as_often_as_the_loops_run_and_of_branches_the_most():
    assert collectives(PROGRAM) == {
        "all-gather": (15, 15 * 64 * 128 * 2),
        "all-reduce": (2, 2 * (256 * 4 + 4)),
        "collective-permute": (1, 8 * 4),
        "reduce-scatter": (3, 3 * 4 * 8 * 128 * 4),
    }


@pytest.mark.parametrize("name", ["v9:4x4", "v5e", "v5e:", "v5e:4xx4", "h100:8;", "h100:0", "h100:16"])
def test_unknown_topologies_list_the_known_ones(name):
    known = "is not known; give one like v5e:4x4, v5p:2x2x1, v6e:4x4 or h100:1 to h100:8"
    with pytest.raises(ValueError, match=known):
        topology(name)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("v5e:4x4", f"'jax[tpu]=={jax.__version__}'"),
        ("h100:8", f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"),
    ],
)
def test_an_absent_compiler_is_named(monkeypatch, name, install):
    monkeypatch.setattr("pd_jax.planning.compile.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=re.escape(f"the compiler for {name} is not installed; pip install {install}")):
        topology(name)


def test_unknown_models_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'Qwen/Qwen3-5B' is not known here; .* Qwen/Qwen3-4B, "):
        known_config("Qwen/Qwen3-5B")
    assert 4.0e9 < parameter_count(known_config("Qwen/Qwen3-4B")) < 4.1e9


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
    ],
)
def test_published_sizes(name, parameters):
    """As the model cards count them."""
    config = known_config(name)
    assert parameter_count(config) == parameters
    assert config_from_hf(config_to_hf(config)) == config


def test_the_report_says_by_how_much_it_does_not_fit():
    held = {"parameters": 4 * GIB, "optimizer": 8 * GIB}
    gathered = {"all-gather": (72, 400 * 10**9)}
    plan = Plan(
        machine=MACHINES["v5e"],
        devices=16,
        unit="step",
        tokens=65536,
        held=held,
        peak=17 * GIB,
        flops=197e12,
        traffic=819e8,
        collectives=gathered,
    )
    text = report("4B", plan)
    assert "4B: does not fit, 1.00 GiB too much" in text
    assert "parameters 4.00 GiB, optimizer 8.00 GiB" in text
    assert "all-gather          72 a step, 400 GB sent" in text
    assert "bound by links: at best 2000.00 ms a step, 32,768 tokens/s on 16 devices" in text
    assert "measured" not in text
    slow = dataclasses.replace(MACHINES["v5e"], flops=50e12)
    assert "measured this machine: at best 3940.00 ms a step" in report("4B", dataclasses.replace(plan, measured=slow))


def test_the_planned_state_of_decoding_is_the_one_that_a_prefill_leaves():
    config = tiny.config()
    program = Program(config, "columns", Method())
    first, then = decoder_arguments(config, "bfloat16", tokens=64, branches=4, room=BLOCK)
    left, _ = jax.eval_shape(partial(prefill, program=program, room=BLOCK), *first)
    after, _ = jax.eval_shape(partial(decode_block, program=program), *then)
    for state in (left, after):
        assert jax.tree.structure(state) == jax.tree.structure(then[2])
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(then[2])
        ]


def test_planning_decoding_does_not_choose_the_attention_of_this_machine(monkeypatch):
    monkeypatch.setattr("pd_jax.decoding.steps.make_attention", None)
    decoder_arguments(tiny.config(), "bfloat16", tokens=512, branches=4, room=BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_accounts_for_every_array_of_a_step(monkeypatch, lora):
    """On devices that are here: two moments for what is trained, and a peak that has room for all of it."""
    monkeypatch.setattr("pd_jax.planning.plan.topology", lambda name: (MACHINES["v5e"], jax.devices()[:2]))
    flags = PlanFlags(batch_size=2, branch_count=2, seq_length=8, use_lora=lora, lora_r=2, mesh=(1, 2, 1))
    config = tiny.config()
    plan = plan_training(flags, config)
    compiled, state, frozen = compile_train_step(workload_of(flags), config, jax.devices()[:2])
    trained = sum(leaf.size for leaf in jax.tree.leaves(state["trained"]))
    assert trained < parameter_count(config) / 4 if lora else trained == parameter_count(config)
    assert plan.held["parameters"] == local_bytes(state["trained"]) + local_bytes(frozen)
    counters = plan.held["optimizer"] - 2 * local_bytes(state["trained"])
    assert 0 <= counters <= 16
    assert plan.peak >= sum(plan.held.values())
    assert plan.collectives
    assert compiled.memory_analysis().alias_size_in_bytes >= 3 * local_bytes(state["trained"])  # donated


@pytest.mark.slow
def test_the_plan_of_decoding_splits_weights_and_cache_by_heads(monkeypatch):
    """On devices that are here, two for two kv heads: half of every kernel and of the cache each."""
    monkeypatch.setattr("pd_jax.planning.plan.topology", lambda name: (MACHINES["v5e"], jax.devices()[:4]))
    config = tiny.config()
    plan = plan_decoding(PlanFlags(branch_count=4, seq_length=16), config)
    assert config.num_key_value_heads == plan.devices == 2
    whole = plan_decoding(PlanFlags(branch_count=4, seq_length=16), dataclasses.replace(config, num_key_value_heads=1))
    assert whole.devices == 1
    assert plan.held["cache"] == (
        cache_bytes(config, samples=1, tokens=64, branches=4, columns=4 * BLOCK, dtype=jnp.bfloat16) // 2
    )
    norms = config.num_hidden_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    assert plan.held["parameters"] == 2 * ((parameter_count(config) - norms) // 2 + norms)
    assert plan.peak >= sum(plan.held.values())
    assert plan.collectives["all-reduce"][0] >= 2 * config.num_hidden_layers  # after o and down, in one column
    assert not whole.collectives
