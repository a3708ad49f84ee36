"""Module by module against transformers: when the whole fails, the part that did fails too."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pd_jax import model
from pd_jax.attention import make_attention
from pd_jax.columns import Coordinates, column_mask, inverse_frequencies, rope_tables, rotate
from pd_jax.files import config_from_hf, load_config, load_params
from pd_jax.layout import Branch, TokenSample, build_layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"tie_word_embeddings": True, "head_dim": 32},
    "theta 5e6": {"tie_word_embeddings": False, "theta": 5e6},
}


def make_reference(tie_word_embeddings=True, head_dim=16, theta=1e6):
    """A random Qwen3 whose norms are not 1, so that a forgotten norm weight shows."""
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=48,  # 48 / 4 heads is 12: head_dim is never hidden / heads here
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5) + (1 if "norm" in name else 0))
    return reference


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory):
    """(transformers' model, our config without branch pairs, our parameters)."""
    reference = make_reference(**request.param)
    directory = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(directory)
    config = load_config(directory, pair_indices=())
    return reference, config, load_params(directory, config)


def one_branch(length=20, vocab=97, rows=2):
    """A layout of `rows` samples of one branch each: an ordinary text, cut into background and prompt."""
    ids = np.random.default_rng(0).integers(0, vocab, (rows, length))
    return build_layout([[TokenSample(row[:7].tolist(), [Branch(row[7:].tolist())])] for row in ids])


def three_branches(vocab=97):
    """Two rows; one holds a sample of three ragged branches, the other two packed samples and padding."""
    ids = np.random.default_rng(1).integers(0, vocab, 64).tolist()
    first = TokenSample(ids[:8], [Branch(ids[8:12], ids[12:15]), Branch(ids[15:18], ids[18:22]), Branch(ids[22:24])])
    second = TokenSample(ids[24:28], [Branch(ids[28:30], ids[30:33]), Branch(ids[33:36])])
    third = TokenSample([], [Branch(ids[40:43]), Branch(ids[43:45], ids[45:47])])
    return build_layout([[first], [second, third]])


def ours(params, config, layout, dtype=jnp.float32):
    coordinates = Coordinates.of(layout)
    hidden = model.forward(params, config, jnp.asarray(layout.tokens), coordinates, dtype=dtype)
    return np.asarray(model.logits(params, hidden))


def theirs(reference, layout):
    """transformers, told our positions and our mask: 4D, float, additive; finfo.min and never a bool."""
    coordinates = Coordinates.of(layout)
    allowed = torch.tensor(np.asarray(column_mask(coordinates, coordinates)))
    mask = torch.where(allowed, 0.0, torch.finfo(reference.dtype).min).to(reference.dtype)[:, None]
    ids, positions = torch.tensor(layout.tokens).long(), torch.tensor(layout.column).long()
    with torch.no_grad():
        out = reference(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits.float().numpy()


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), b.detach().numpy() if hasattr(b, "detach") else b, atol=tolerance, rtol=0)


def layer_of(params, number=1):
    return {name: stack[number] for name, stack in params["layers"].items()}


def plain_coordinates(layout):
    coordinates = Coordinates.of(layout)
    positions = torch.tensor(layout.column).long()
    return coordinates, positions


def test_embedding(pair):
    reference, _, params = pair
    ids = one_branch().tokens
    close(params["embed"][ids], reference.model.embed_tokens(torch.tensor(ids).long()), 0)


def test_rms_norm(pair):
    reference, config, params = pair
    x = random(2, 5, config.hidden_size) * 7
    close(
        model.rms_norm(x, layer_of(params)["mlp_norm"], config.rms_norm_eps),
        reference.model.layers[1].post_attention_layernorm(torch.tensor(x)),
    )


def test_rms_norm_in_bfloat16_rounds_before_the_weight(pair):
    reference, config, params = pair
    x = random(2, 5, config.hidden_size) * 7
    got = model.rms_norm(jnp.asarray(x, jnp.bfloat16), params["norm"], config.rms_norm_eps)
    norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.load_state_dict(reference.model.norm.state_dict())
    close(got.astype(jnp.float32), norm.bfloat16()(torch.tensor(x).bfloat16()).float(), 0)


def test_q_and_k_norm_are_per_head_and_before_rope(pair):
    reference, config, params = pair
    attention, layer = reference.model.layers[1].self_attn, layer_of(params)
    x = random(2, 5, config.hidden_size)
    shape = (2, 5, -1, config.head_dim)
    for name in ("q", "k"):
        projected = getattr(attention, f"{name}_proj")(torch.tensor(x)).view(shape)
        want = getattr(attention, f"{name}_norm")(projected)
        got = model.rms_norm(model.project(jnp.asarray(x), layer, name), layer[f"{name}_norm"], config.rms_norm_eps)
        close(got, want)


def test_rope_tables_and_rotation(pair):
    reference, config, _ = pair
    positions = np.arange(300)[None]
    cos, sin = rope_tables(config, jnp.zeros((1, 300), jnp.int32), jnp.asarray(positions))
    x = random(1, 300, 4, config.head_dim)
    want_cos, want_sin = reference.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    close(jnp.concatenate([cos, cos], -1), want_cos, 2e-5)  # an angle of 300 has 24 bits: 2e-5
    close(jnp.concatenate([sin, sin], -1), want_sin, 2e-5)
    apply = transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb
    heads_first = torch.tensor(x).transpose(1, 2)
    want, _ = apply(heads_first, heads_first, want_cos, want_sin)
    close(rotate(jnp.asarray(x), cos, sin), want.transpose(1, 2), 1e-4)


def test_attention(pair):
    reference, config, params = pair
    layout, layer = one_branch(), layer_of(params)
    coordinates, positions = plain_coordinates(layout)
    x = random(*layout.tokens.shape, config.hidden_size)
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    q, k = (
        rotate(model.rms_norm(model.project(jnp.asarray(x), layer, n), layer[f"{n}_norm"], config.rms_norm_eps), *rope)
        for n in ("q", "k")
    )
    v = model.project(jnp.asarray(x), layer, "v")
    got = model.project(make_attention(coordinates)(q, k, v), layer, "o")
    causal = torch.full((layout.tokens.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
    want, _ = reference.model.layers[1].self_attn(
        torch.tensor(x), reference.model.rotary_emb(torch.tensor(x), positions), causal[None, None]
    )
    close(got, want)


def test_mlp(pair):
    reference, config, params = pair
    layer, x = layer_of(params), random(2, 5, config.hidden_size)
    gate, up = (model.project(jnp.asarray(x), layer, name) for name in ("gate", "up"))
    close(model.project(jax.nn.silu(gate) * up, layer, "down"), reference.model.layers[1].mlp(torch.tensor(x)))


def test_one_block(pair):
    reference, config, params = pair
    layout = one_branch()
    coordinates, positions = plain_coordinates(layout)
    x = random(*layout.tokens.shape, config.hidden_size)
    rope = rope_tables(config, coordinates.branch, coordinates.column)
    got = model.block(config, layer_of(params), jnp.asarray(x), rope=rope, attend=make_attention(coordinates))
    causal = torch.full((layout.tokens.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
    want = reference.model.layers[1](
        torch.tensor(x),
        attention_mask=causal[None, None],
        position_embeddings=reference.model.rotary_emb(torch.tensor(x), positions),
    )
    close(got, want[0] if isinstance(want, tuple) else want)


def test_all_blocks(pair):
    reference, config, params = pair
    layout = one_branch()
    got = model.forward(params, config, jnp.asarray(layout.tokens), Coordinates.of(layout))
    with torch.no_grad():
        want = reference.model(torch.tensor(layout.tokens).long()).last_hidden_state
    close(got, want, 1e-4)


def test_head(pair):
    reference, config, params = pair
    hidden = random(2, 5, config.hidden_size)
    close(model.logits(params, jnp.asarray(hidden)), reference.lm_head(torch.tensor(hidden)))


def test_one_branch_is_plain_qwen3(pair):
    reference, config, params = pair
    layout = one_branch()
    with torch.no_grad():
        want = reference(torch.tensor(layout.tokens).long()).logits.numpy()
    close(ours(params, config, layout), want, 1e-4)


def test_several_branches_equal_transformers_with_our_positions_and_mask(pair):
    reference, config, params = pair
    layout = three_branches()
    got, want = ours(params, config, layout), theirs(reference, layout)
    close(got[layout.valid], want[layout.valid], 1e-4)


def test_branch_pairs_change_the_logits(pair):
    """The comparison above would be blind if the pairs did nothing."""
    reference, config, params = pair
    layout = three_branches()
    config = dataclasses.replace(config, pair_indices=(2, 4, 6))
    assert np.abs(ours(params, config, layout) - theirs(reference, layout))[layout.valid].max() > 1e-2


def test_both_config_generations_give_the_same_model(pair):
    reference, config, _ = pair
    new = json.loads(reference.config.to_json_string(use_diff=False))
    assert "rope_parameters" in new
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"}
    assert config_from_hf(new, ()) == config_from_hf(old, ()) == config


# --- YaRN, as Qwen3's model cards switch it on
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("generation", ["rope_scaling", "rope_parameters"])
def test_yarn_tables_equal_transformers_everywhere(generation):
    shape = {
        "model_type": "qwen3",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }
    if generation == "rope_scaling":
        hf = shape | {"rope_theta": 1000000, "rope_scaling": YARN}
    else:
        hf = shape | {"rope_parameters": {"rope_theta": 1000000, **YARN}}
    config = config_from_hf(hf, ())
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(transformers.Qwen3Config.from_dict(dict(hf)))
    frequency, scale = inverse_frequencies(config)
    assert scale == pytest.approx(rotary.attention_scaling, abs=0)
    np.testing.assert_allclose(frequency, rotary.inv_freq.numpy(), rtol=2e-7)
    positions = np.arange(131_072, dtype=np.int32)
    cos, sin = jax.jit(lambda c: rope_tables(config, jnp.zeros_like(c), c))(positions)
    want_cos, want_sin = rotary(torch.zeros(1), torch.tensor(positions)[None].long())
    half = config.head_dim // 2
    # float32 angles of up to 131,071 radians are 2^-7 apart, so equal tables need equal frequencies, bit for bit.
    close(cos, want_cos[0, :, :half], 1e-5)
    close(sin, want_sin[0, :, :half], 1e-5)


# --- the true shape
@pytest.mark.slow
def test_the_true_06b_shape(tmp_path):
    """Qwen3-0.6B with random weights: float32 within 1e-3 of the logits' deviation; bfloat16 is printed."""
    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" not in name:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path)
    layout = three_branches(vocab=151_669)
    want = theirs(reference, layout)[layout.valid]
    with torch.no_grad():
        for weight in reference.parameters():  # not .bfloat16(), which would round the rotary frequencies too
            weight.copy_(weight.bfloat16().float())
    rough = theirs(reference, layout)[layout.valid]
    del reference
    settings = load_config(tmp_path, pair_indices=())
    params = load_params(tmp_path, settings)
    difference = np.abs(ours(params, settings, layout)[layout.valid] - want).max()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = np.abs(ours(params, settings, layout, jnp.bfloat16)[layout.valid] - want).max()
    print(
        f"\n0.6B shape, logits' deviation {want.std():.4f}: max difference {difference:.2e} in float32, {half:.2e} in "
        f"bfloat16 (rounding only the weights to bfloat16 gives {np.abs(rough - want).max():.2e})"
    )
    assert difference <= 1e-3 * want.std()
