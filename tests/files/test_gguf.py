"""GGUF files, made here with llama.cpp's own package: what is read, what is said, and what is refused in one line."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from sources import FAMILY_FIELDS, convert, make_source

from pd_jax import ParallelDecoder, Sample
from pd_jax.columns import inverse_frequencies
from pd_jax.config import Llama3Rope
from pd_jax.files import import_gguf, load_config, load_tokenizer

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from llama_cpp import CHAT, make_gguf  # noqa: E402


def theirs(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "kind", "tied", "dtype"),
    [
        ("llama", "Q4_1", True, "float32"),
        pytest.param("llama", "Q4_0", False, "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen2", "Q8_0", True, "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen2", "F16", False, "float32", marks=pytest.mark.slow),
    ],
)
def test_it_equals_transformers_own_load(tmp_path, monkeypatch, capsys, family, kind, tied, dtype):
    path, out = make_gguf(tmp_path / "tiny.gguf", family, kind, tied), tmp_path / "out"
    convert("from_gguf", monkeypatch, "--gguf", path, "--output", out, "--dtype", dtype)
    biases, head = 6 * (family == "qwen2"), not tied
    says = f"{kind} x {14 + head}, F32 x {5 + biases}, Q8_0 x 1 -> {dtype}"
    says = f"Q8_0 x 15, F32 x {5 + biases} -> {dtype}" if kind == "Q8_0" else says
    ends = [tiny.tokenizer().convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert f"{says}; an answer ends with any of {ends[0]}, {ends[1]}" in capsys.readouterr().out
    reference = theirs(path, getattr(torch, dtype))
    want, got = reference.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert want.keys() == got.keys()
    assert all(want[name].dtype == got[name].dtype and torch.equal(want[name], got[name]) for name in want)
    hf = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in hf
    assert (hf["model_type"], hf["dtype"], hf["eos_token_id"]) == (family, dtype, ends)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends
    tokenizer = load_tokenizer(out)
    assert tokenizer.chat_template == CHAT
    assert all(tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"] for text in tiny.TEXTS)
    if dtype == "float32":
        decoder = ParallelDecoder.from_pretrained(out, pair_indices=(), visibility="isolated", align="ragged")
        layout = decoder.layout([Sample(tiny.TEXTS[0], [tiny.TEXTS[1]])])
        with torch.no_grad():
            logits = reference(torch.tensor(layout.tokens).long()).logits.numpy()
        np.testing.assert_allclose(decoder.logits(layout), logits, atol=1e-4, rtol=0)


def test_smollms_digits_stand_alone(tmp_path):
    """As its own tokenizer takes them; transformers leaves that out, and two spaces before a number come apart."""
    import_gguf(make_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  42")
    assert [piece for piece, _ in split] == ["in", "ĠĠ", "4", "2"]


@pytest.mark.parametrize("factor", [8.0, pytest.param(32.0, marks=pytest.mark.slow)])
def test_llama3s_rope_is_recognised(tmp_path, factor):
    """llama.cpp stores what the frequencies are divided by, and transformers reads none of it."""
    changes = {"rope_scaling": None, "head_dim": 16}
    plain = load_config(make_source(tmp_path / "hf", **FAMILY_FIELDS["llama"] | changes), ())
    scaling = Llama3Rope(factor, 1.0, 4.0, 8192)
    stretched, _ = inverse_frequencies(dataclasses.replace(plain, llama3=scaling))
    factors = (inverse_frequencies(plain)[0] / stretched).astype(np.float32)
    path = make_gguf(tmp_path / "tiny.gguf", more=[("rope_freqs.weight", factors)])
    import_gguf(path, tmp_path / "out")
    assert load_config(tmp_path / "out", ()).llama3 == scaling
    other = make_gguf(tmp_path / "other.gguf", more=[("rope_freqs.weight", factors * 1.5)])
    with pytest.raises(ValueError, match=r"stretches RoPE as neither Llama 3\.1 nor 3\.2 does"):
        import_gguf(other, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "gemma2"}, "model_type is 'gemma2'"),
        ({"arch": "no-such"}, "transformers cannot read it .*no-such"),
        ({"drop": ["blk.1.ffn_up.weight"]}, r"blk\.1\.ffn_up\.weight is missing"),
        ({"more": [("blk.0.attn_q.bias", np.ones(64, np.float32))]}, r"blk\.0\.attn_q\.bias is unknown"),
        ({"metadata": [("llama.rope.scaling.type", "yarn")]}, r"llama\.rope\.scaling\.type is 'yarn'"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch, settings, message):
    path = make_gguf(tmp_path / "tiny.gguf", **settings)
    with pytest.raises(ValueError, match=message) as caught:
        import_gguf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_damaged_files_are_one_line(tmp_path):
    whole = make_gguf(tmp_path / "tiny.gguf").read_bytes()
    rng = np.random.default_rng(0)
    damaged = {
        "empty": b"",
        "text": b"Not a model at all, but long enough to look at. " * 4,
        "header cut": whole[:200],
        "words cut": whole[:6000],
        "weights cut": whole[:-1000],
        "counts": whole[:8] + rng.bytes(16) + whole[24:],
        "sizes": whole[:40] + rng.bytes(64) + whole[104:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, damaged or no GGUF file") as caught:
            import_gguf(path, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ValueError, match="is no file"):
        import_gguf(tmp_path, tmp_path / "out")


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
