"""The key table and safetensors: bit for bit both ways, straight to their place, every fault named at once."""

import json
import math
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sources import ROOT

from pd_jax.config import SECTION, ModelConfig
from pd_jax.errors import InputError
from pd_jax.files import config_to_hf, parse_size, safetensors as weights, write_params
from pd_jax.files.names import key_table
from pd_jax.files.safetensors import Pending, Tensor, read_header, read_params, write_safetensors
from pd_jax.params import param_shapes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make_config(**changes):
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "pair_indices": (2, 4),
    }
    return ModelConfig(**shape | changes)


def make_tensors(config, dtype=np.float32, seed=0):
    """Hugging Face's tensors of a random model."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(e.hf_shape).astype(dtype) for name, e in key_table(config).items()}


def write(directory, tensors, name="model.safetensors"):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / name, metadata={"format": "pt"})
    return directory


def test_table_covers_every_parameter_once():
    for config in (make_config(), make_config(tie_word_embeddings=False, sibling_bias=True)):
        table = key_table(config)
        stacked = {}
        for entry in table.values():
            assert math.prod(entry.shape) == math.prod(entry.hf_shape)
            stacked.setdefault(entry.path, []).append(entry)
        shapes = {
            tuple(key.key for key in path): shape
            for path, shape in jax.tree_util.tree_leaves_with_path(
                param_shapes(config), is_leaf=lambda x: isinstance(x, tuple)
            )
        }
        assert stacked.keys() == shapes.keys()
        for path, entries in stacked.items():
            layers = [entry.layer for entry in entries]
            if path[0] == "layers":
                assert layers == list(range(config.num_hidden_layers))
                assert shapes[path] == (config.num_hidden_layers, *entries[0].shape)
            else:
                assert layers == [None]
                assert shapes[path] == entries[0].shape


def test_kernels_are_what_their_einsums_mean(tmp_path):
    """q: row n * head_dim + h of Hugging Face's [out, in] is our [:, n, h]; o the other way round."""
    config = make_config()
    tensors = make_tensors(config)
    params = read_params(write(tmp_path / "m", tensors), config)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    o = tensors["model.layers.2.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["q"][1][:, 3, 5], q[3 * 16 + 5])
    np.testing.assert_array_equal(params["layers"]["o"][2][3, 5], o[:, 3 * 16 + 5])
    np.testing.assert_array_equal(params["layers"]["down"][0], tensors["model.layers.0.mlp.down_proj.weight"].T)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", [5 * 10**9, 10_000], ids=["one file", "shards"])
def test_round_trip_is_bitwise(tmp_path, dtype, tied, shard_size):
    config = make_config(tie_word_embeddings=tied)
    tensors = make_tensors(config, dtype)
    params = read_params(write(tmp_path / "in", tensors), config)
    out = tmp_path / "out"
    out.mkdir()
    write_params(out, params, config, max_shard_size=shard_size)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == 10_000)
    back = {}
    for file in files:
        back |= load_file(file)
    assert back.keys() == tensors.keys()
    assert ("lm_head.weight" in back) != tied
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].tobytes() == tensor.tobytes(), name
    again = read_params(out, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))


def test_one_tensor_may_be_larger_than_a_block_and_than_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    config = make_config()
    tensors = make_tensors(config)
    params = read_params(write(tmp_path / "in", tensors), config)
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["layers"]["gate"][2], tensors["model.layers.2.mlp.gate_proj.weight"].T)
    out = tmp_path / "out"
    out.mkdir()
    write_params(out, params, config, max_shard_size=1)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_cast_on_reading(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BFLOAT16)
    params = read_params(write(tmp_path / "m", tensors), config, np.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["norm"], tensors["model.norm.weight"].astype(np.float32))


def test_sharded_reading_reads_only_the_shards(tmp_path, monkeypatch):
    """Eight devices: every weight equals the unsharded one, and no device asks for more than its rows."""
    config = make_config()
    directory = write(tmp_path / "m", make_tensors(config))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"embed": P("tensor", "fsdp"), "norm": P()}
    specs["layers"] = dict.fromkeys(param_shapes(config)["layers"], P())
    specs["layers"] |= {
        "q": P(None, "fsdp", "tensor"),
        "o": P(None, "tensor", None, "fsdp"),
        "gate": P(None, "fsdp", "tensor"),
        "up": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    rows = []
    blocks = Tensor.blocks

    def counted(self, *span):
        for first, block in blocks(self, *span):
            rows.append(block.size)
            yield first, block

    monkeypatch.setattr(Tensor, "blocks", counted)
    sharded = read_params(directory, config, shardings=shardings)
    assert max(rows) == 32 * 32  # k and v, which are replicated; the embedding has 96 * 32
    plain = read_params(directory, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, plain, sharded)))
    assert sharded["layers"]["q"].sharding == shardings["layers"]["q"]


def test_progress_names_every_tensor(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    read, written = [], []
    params = read_params(write(tmp_path / "m", tensors), config, progress=read.append)
    write_params(tmp_path, params, config, progress=written.append)
    assert sorted(read) == sorted(written) == sorted(tensors)


READ = """
import sys
from pathlib import Path
import jax
from pd_jax.files import load_config, load_params
from pd_jax.machines import PeakMemory
directory = Path(sys.argv[1])
config = load_config(directory, ())
jax.devices()
with PeakMemory() as memory:
    params = jax.block_until_ready(load_params(directory, config, None))
print(memory.beyond, sum(array.nbytes for array in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_reading_does_not_hold_the_file_beside_the_model(tmp_path):
    """What is mapped of a file counts as resident memory: were it kept, the model would be there twice."""
    config = make_config(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip
    ones = {
        name: Pending(np.dtype(np.float32), entry.hf_shape, lambda shape=entry.hf_shape: np.ones(shape, np.float32))
        for name, entry in key_table(config).items()
    }
    write_safetensors(tmp_path / "model.safetensors", ones)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config_to_hf(config).items() if k != SECTION}))
    done = subprocess.run([sys.executable, "-c", READ, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    beyond, model = map(int, done.stdout.split())
    assert model > 500e6
    assert model < beyond < 1.5 * model


# --- faults
def test_all_faults_are_named_at_once(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing") as caught:
        read_params(write(tmp_path / "m", tensors), config)
    text = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.bias is unknown" in text
    assert "model.layers.1.mlp.up_proj.weight has shape [32, 48], the config says [48, 32]" in text
    assert "\n" not in text


def test_duplicates_between_files_are_named(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    directory = write(tmp_path / "m", tensors, "model-00001-of-00002.safetensors")
    write(directory, {"model.norm.weight": tensors["model.norm.weight"]}, "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is both in model-00001.* and in model-00002"):
        read_params(directory, config)


def test_duplicate_in_a_header_is_named(tmp_path):
    first, second = (b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (4 * i, 4 * i + 4) for i in range(2))
    header = b"{" + first + b"," + second + b"}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match=r"model\.safetensors is .*tensor `a`"):
        read_header(path)


@pytest.mark.parametrize("keep", [0, 5, 300, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_truncated_file_is_named(tmp_path, keep):
    config = make_config()
    directory = write(tmp_path / "m", make_tensors(config))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        read_params(directory, config)


def test_index_that_names_an_absent_file(tmp_path):
    config = make_config()
    params = read_params(write(tmp_path / "in", make_tensors(config)), config)
    out = tmp_path / "out"
    out.mkdir()
    write_params(out, params, config, max_shard_size=10_000)
    gone = sorted(out.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone.name} is missing"):
        read_params(out, config)


def test_index_without_a_map_is_named(tmp_path):
    directory = write(tmp_path / "m", make_tensors(make_config()))
    for content in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (directory / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InputError, match=r"model\.safetensors\.index\.json has no weight_map"):
            read_params(directory, make_config())


def test_bytes_behind_the_tensors_are_refused(tmp_path):
    directory = write(tmp_path / "m", make_tensors(make_config()))
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged \(.*not fully covered\)"):
        read_params(directory, make_config())


def test_unsupported_dtype_is_named(tmp_path):
    directory = write(tmp_path / "m", {"model.norm.weight": np.zeros(4, np.int8)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        read_params(directory, make_config())


def test_layers_of_two_dtypes_need_a_choice(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(BFLOAT16)
    directory = write(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match="the layers of up are stored as bfloat16 and float32"):
        read_params(directory, config)
    assert read_params(directory, config, np.float32)["layers"]["up"].dtype == np.float32


def test_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    """Qwen3-0.6B's own file holds lm_head.weight, equal to the embedding."""
    config = make_config()
    tensors = make_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    directory = write(tmp_path / "m", tensors)
    assert "lm_head" not in read_params(directory, config)
    tensors["lm_head.weight"][95, 31] += 1
    write(directory, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        read_params(directory, config)


def test_written_files_open_with_the_safetensors_library(tmp_path):
    config = make_config()
    params = read_params(write(tmp_path / "m", make_tensors(config)), config)
    write_params(tmp_path, params, config)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(key_table(config))


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("60 kb") == 60_000
    assert parse_size("1.5GiB") == 3 * 2**29
    for text in ("", "GB", "5 apples", "-1GB", "0"):
        with pytest.raises(ValueError, match="write it like 5GB"):
            parse_size(text)
