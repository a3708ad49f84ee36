"""NaN and infinity: named while weights are read, in every format, and on the logits of a prefill."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adapters import random_adapters

from pd_jax import ParallelDecoder, Sample
from pd_jax.config import LoraConfig
from pd_jax.evaluation import EvaluateFlags, evaluate
from pd_jax.files import export_model, import_model, load_adapter, load_params, save_adapter, save_model, write_params
from pd_jax.files.checks import finite
from pd_jax.params import init_params

CONFIG = tiny.config(sibling_bias=True)
BAD = [np.nan, np.inf, -np.inf]


def broken(value, name="gate", dtype=jnp.float32):
    params = init_params(CONFIG, jax.random.key(0), dtype)
    params["layers"][name] = params["layers"][name].at[(1,) + (0,) * (params["layers"][name].ndim - 1)].set(value)
    return params


@pytest.fixture
def base(tmp_path):
    return tiny.model_directory(tmp_path / "base", sibling_bias=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", BAD)
def test_by_their_bits(value, dtype):
    array = np.array([[65504.0, -0.0], [1e-7, -1.0]]).astype(dtype)
    assert finite(array)
    assert finite(array.T)
    assert not finite(np.array([[1.0, value]]).astype(dtype))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_safetensors(base, value, dtype):
    write_params(base, broken(value, dtype=dtype), CONFIG)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.gate_proj\.weight holds NaN or"):
        load_params(base, CONFIG)


@pytest.mark.parametrize("value", BAD)
def test_checkpoints(base, tmp_path, value):
    save_model(tmp_path / "saved", broken(value), CONFIG, base)
    with pytest.raises(ValueError, match=r"params: \['layers'\]\['gate'\] holds NaN or infinity"):
        load_params(tmp_path / "saved", CONFIG)


@pytest.mark.parametrize("value", BAD)
def test_adapters(tmp_path, value):
    lora = LoraConfig(r=4)
    adapters = random_adapters(CONFIG, lora)
    adapters["v"]["b"] = adapters["v"]["b"].at[1, 0, 0].set(value)
    save_adapter(tmp_path, adapters, lora, CONFIG, base="base")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*layers\.1\.self_attn\.v_proj\.lora_B"):
        load_adapter(tmp_path, CONFIG)


def test_a_sibling_bias_may_hide(base, tmp_path):
    """-inf is `isolated`; NaN and inf are nothing."""
    for place, write in ((base, write_params), (tmp_path / "saved", save_model)):
        for value in BAD:
            params = broken(value, "sibling_bias")
            write(place, params, CONFIG) if write is write_params else write(place, params, CONFIG, base)
            if value == -np.inf:
                assert load_params(place, CONFIG)["layers"]["sibling_bias"][1, 0] == value
            else:
                with pytest.raises(ValueError, match=r"sibling_bias.* holds NaN or infinity"):
                    load_params(place, CONFIG)


def test_conversion_and_evaluation(tmp_path):
    base, config = tiny.model_directory(tmp_path / "base"), tiny.config()
    params = init_params(config, jax.random.key(0))
    params["embed"] = params["embed"].at[0, 0].set(np.nan)
    write_params(base, params, config)
    flags = {"dataset_name": str(tiny.squad(tmp_path / "x.json")), "max_eval_samples": 1}
    for run in (
        lambda: import_model(str(base), tmp_path / "out"),
        lambda: export_model(str(base), tmp_path / "out", max_shard_size=10**9),
        lambda: evaluate(EvaluateFlags(ft_model=str(base), output_dir=str(tmp_path / "out"), **flags)),
    ):
        with pytest.raises(ValueError, match=r"embed_tokens\.weight holds NaN"):
            run()
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_transformers_too(tmp_path):
    config = tiny.config()
    base = tiny.model_directory(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    del content["pd_jax"]
    (base / "config.json").write_text(json.dumps(content))
    params = init_params(config, jax.random.key(0))
    params["norm"] = params["norm"].at[0].set(np.inf)
    write_params(base, params, config)
    flags = EvaluateFlags(
        base_model=str(base), dataset_name=str(tiny.squad(tmp_path / "x.json")), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity"):
        evaluate(flags)


def test_the_logits_of_a_prefill_name_the_branch():
    """Weights that nobody has read from a file, and one token that spoils what it meets."""
    config = tiny.config(tie_word_embeddings=False)
    params = init_params(config, jax.random.key(0))
    bad = tiny.tokenizer()("z")["input_ids"][0]
    params["embed"] = params["embed"].at[bad].set(np.nan)
    decoder = ParallelDecoder(config, params, tiny.tokenizer(), (319,))
    samples = [Sample("a", ["b", "c"]), Sample("d", ["e", "fz"])]
    for ask in (decoder.generate, lambda s, **k: list(decoder.columns(s, **k)), lambda s, **k: [*decoder.stream(s[1])]):
        with pytest.raises(ValueError, match=r"sample [01], branch [01]: the logits behind its prompt are NaN or inf"):
            ask(samples, max_new_tokens=2)
    with pytest.raises(ValueError, match="sample 1, branch 0"):
        decoder.generate([Sample("d", ["e"]), Sample("d", ["z"])])
    decoder.generate([Sample("d", ["e"]), Sample("d", ["f"])], max_new_tokens=2)
