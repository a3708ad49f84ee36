"""A small GGUF file, written with llama.cpp's own package."""

import json
import re

import gguf
import tiny
from sources import FAMILY_FIELDS, make_source, tensors

from pd_jax.files import load_config

CHAT = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
KEYS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    **{f"{part}.{name}_proj": key for name, key in KEYS.items() for part in ("self_attn", "mlp")},
}  # fmt: skip


def name_of(hf):
    """llama.cpp's name for a tensor of ours."""
    stem, _, suffix = hf.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}.{suffix}" if layer else f"{NAMES[stem]}.{suffix}"


def as_llama_cpp_turns(matrix, heads):
    """llama.cpp pairs neighbouring dimensions of q and k in Llama, Hugging Face the two halves."""
    return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


def make_gguf(path, family="llama", kind="Q4_1", tied=True, drop=(), more=(), metadata=(), arch=None):
    """A small model of a family: projections quantised, the embedding as Q8_0, the rest float32.

    `drop` leaves tensors out, `more` adds some (name and array), `metadata` adds fields (key and text).
    """
    sizes = {"vocab_size": 336, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": tied}
    changes = FAMILY_FIELDS[family] | sizes | {"head_dim": 16, "rope_scaling": None}
    source = make_source(path.parent / f"{path.stem}-source", **changes)
    config = load_config(source, ())
    arch = arch or family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = {**backend["model"]["vocab"], **{token["content"]: token["id"] for token in backend["added_tokens"]}}
    names = {number: word for word, number in words.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(config.vocab_size)])
    special = [token["id"] for token in backend["added_tokens"]]
    writer.add_token_types([3 if n in special else 1 if n in names else 5 for n in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(words["<|im_end|>"])
    writer.add_eot_token_id(words["<|endoftext|>"])
    writer.add_pad_token_id(words["<|endoftext|>"])
    writer.add_chat_template(CHAT)
    for key, value in metadata:
        writer.add_string(key, value)
    for hf, array in tensors(source).items():
        name = name_of(hf)
        if name in drop:
            continue
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in name and family == "llama":
                array = as_llama_cpp_turns(array, heads)
        quantised = "F32" if array.ndim == 1 else "Q8_0" if "token_embd" in name else kind
        quantised = gguf.GGMLQuantizationType[quantised]
        data = gguf.quantize(array, quantised) if array.ndim > 1 else array
        writer.add_tensor(name, data, raw_dtype=quantised)
    for name, array in more:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
