"""Whatever happens to a file of the newest checkpoint: it is read as it was saved, or the one before is. A model
is read as it was saved, or refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec as P

from pd_jax.errors import InputError
from pd_jax.files import digest, load_params, save_model
from pd_jax.mesh import make_mesh
from pd_jax.params import init_params
from pd_jax.training.checkpoints import Checkpoints

FIRST, SECOND = 3, 6


def state(step):
    keys = jax.random.split(jax.random.key(step), 2)
    weights = {"a": jax.random.normal(keys[0], (40, 30)), "b": jax.random.normal(keys[1], (7,), jnp.bfloat16)}
    return {"trained": weights, "opt": jax.tree.map(jnp.zeros_like, weights), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (FIRST, SECOND):
            checkpoints.save(step, state(step), {"at": step}, 1.0)
            checkpoints.wait()
    return directory


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {
    "flipped": flipped,
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_the_newest_checkpoint(saved, tmp_path, damage, capsys):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(SECOND))
    names = [path.relative_to(saved) for path in (saved / str(SECOND)).rglob("*") if path.is_file()]
    assert len(names) > 5
    fell_back = []
    for number, name in enumerate(names):
        here = tmp_path / str(number)
        shutil.copytree(saved, here)
        path = here / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()) if path.stat().st_size else b"")
        with Checkpoints(here, keep=2) as checkpoints:
            found = checkpoints.newest(target)
        assert found is not None, name
        got, data, step = found
        assert step in (FIRST, SECOND)
        assert data == {"at": step}, name
        jax.tree.map(np.testing.assert_array_equal, got, state(step))
        fell_back += [name] if step == FIRST else []
        assert (f"checkpoint {SECOND} is unreadable" in capsys.readouterr().out) == (step == FIRST)
    assert fell_back  # the damage does reach the numbers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny.config(num_hidden_layers=1, hidden_size=16, vocab_size=320)
    source = tiny.model_directory(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1, hidden_size=16)
    save_model(source.parent / "model", init_params(config, jax.random.key(0)), config, source)
    return source.parent / "model", config


@pytest.mark.parametrize(
    ("dtype", "damages"),
    [
        ("bfloat16", ["flipped"]),
        *(pytest.param(dtype, list(DAMAGE), marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
    ],
)
def test_every_file_of_a_model(model, tmp_path, dtype, damages):
    """Also read as another dtype than it was saved as, when numbers are not what lies on the disk."""
    directory, config = model
    whole = load_params(directory, config, dtype)
    names = [path.relative_to(directory) for path in (directory / "params").rglob("*") if path.is_file()]
    refused = dict.fromkeys(damages, 0)
    for damage in damages:
        for number, name in enumerate(names):
            here = tmp_path / f"{damage}{number}"
            shutil.copytree(directory, here)
            path = here / name
            path.write_bytes(DAMAGE[damage](path.read_bytes()) if path.stat().st_size else b"")
            try:
                found = load_params(here, config, dtype)
            except InputError:
                refused[damage] += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert all(refused.values()), refused


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_checksum_sees_every_bit_and_every_place(dtype):
    x = np.arange(1, 25, dtype=np.float32).reshape(4, 6).astype(dtype)
    whole = digest({"x": jnp.asarray(x)})
    bits = x.view(np.uint16 if x.itemsize == 2 else np.uint32)
    seen = set()
    for bit in range(8 * x.itemsize):
        changed = bits.copy()
        changed[bit % 4, bit % 6] ^= np.array(1 << bit, bits.dtype)
        seen.add(digest({"x": jnp.asarray(changed.view(x.dtype))})[0])
    assert len(seen | {whole[0]}) == 8 * x.itemsize + 1
    assert digest({"x": jnp.asarray(x[::-1].copy())}) != whole
    mesh = make_mesh(2, 2, 2)
    spread = jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))
    assert digest({"x": spread}) == whole
