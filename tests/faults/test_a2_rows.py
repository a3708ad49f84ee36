"""Token ids without a row of embeddings are never clamped: both sizes are named, wherever a model is read."""

import jax
import pytest
import tiny

from pd_jax import Branch, ParallelDecoder, Sample, TokenSample
from pd_jax.evaluation import EvaluateFlags, evaluate
from pd_jax.files import export_model, import_model, write_params
from pd_jax.params import init_params

TOO_MANY = r"the tokenizer has 320 tokens and the model 300 rows"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with fewer rows than its tokenizer has tokens."""
    directory = tiny.model_directory(tmp_path_factory.mktemp("models") / "small", vocab_size=300)
    config = tiny.config(vocab_size=300)
    write_params(directory, init_params(config, jax.random.key(0)), config)
    return directory


def test_decoding(small):
    with pytest.raises(ValueError, match=f"{small}: {TOO_MANY}"):
        ParallelDecoder.from_pretrained(small)
    config = tiny.config(vocab_size=300)
    with pytest.raises(ValueError, match=TOO_MANY):
        ParallelDecoder(config, init_params(config, jax.random.key(0)), tiny.tokenizer(), (3,))


def test_evaluation(small, tmp_path):
    for model in ("base_model", "ft_model"):
        with pytest.raises(ValueError, match=TOO_MANY):
            evaluate(
                EvaluateFlags(
                    **{model: str(small)},
                    dataset_name=str(tiny.squad(tmp_path / "x.json")),
                    output_dir=str(tmp_path / "out"),
                )
            )
        assert not (tmp_path / "out").exists()


def test_conversion(small, tmp_path):
    for convert in (import_model, lambda model, out: export_model(model, out, max_shard_size=10**9)):
        with pytest.raises(ValueError, match=TOO_MANY):
            convert(str(small), tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def decoder():
    config = tiny.config()
    return ParallelDecoder(config, init_params(config, jax.random.key(0)), tiny.tokenizer(), (319,))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (TokenSample([1, 336], [Branch([1])]), "sample 1, background: 336 is no token id; the model has 336, 0 to 335"),
        (TokenSample([1], [Branch([1]), Branch([-1])]), "sample 1, branch 1: -1 is no token id"),
        (TokenSample([1], [Branch([2**40])]), "sample 1, branch 0: 1099511627776 is no token id"),
        (TokenSample([1], [Branch([1.5])]), r"sample 1, branch 0: 1\.5 is no token id"),
        (TokenSample([1], [Branch(["a"])]), "sample 1, branch 0: a is no token id"),
        (TokenSample([None], [Branch([1])]), "sample 1, background: None is no token id"),
    ],
    ids=lambda x: None if isinstance(x, TokenSample) else x,
)
def test_samples_of_ids(decoder, sample, message):
    for ask in (decoder.generate, decoder.layout, lambda samples: list(decoder.columns(samples))):
        with pytest.raises(ValueError, match=message):
            ask([Sample("a", ["b"]), sample])


def test_layouts(decoder):
    layout = decoder.layout([Sample("a", ["b"])])
    layout.tokens[0, 0] = 336
    with pytest.raises(ValueError, match="the layout's tokens: 336 is no token id; the model has 336"):
        decoder.logits(layout)
