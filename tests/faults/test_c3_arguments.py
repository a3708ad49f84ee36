"""The Python API: numpy's numbers work, None is the default, everything else is one line that shows the right call."""

import math

import jax
import numpy as np
import pytest
import tiny

from pd_jax import Branch, ParallelDecoder, Sample, SamplingParams, TokenSample
from pd_jax.decoding.prompts import branch_limits
from pd_jax.errors import InputError
from pd_jax.params import init_params

CONFIG = tiny.config()
GOOD = Sample("a", ["b", "c"])


@pytest.fixture(scope="module")
def decoder():
    return ParallelDecoder(CONFIG, init_params(CONFIG, jax.random.key(0)), tiny.tokenizer(), (319,))


def refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    for part in parts:
        assert part in str(caught.value)


def test_numpy_and_none():
    assert SamplingParams(**dict.fromkeys(SamplingParams.__dataclass_fields__)) == SamplingParams()
    numpy = SamplingParams(np.int32(3), np.bool_(True), np.float32(0.5), np.int64(5), seed=np.array([7, 8]), stop=None)
    assert numpy == SamplingParams(3, True, 0.5, 5, seed=[7, 8])
    for limits in (np.int64(3), [[3, 3]], np.array([[3, 3]]), [np.array([3, 3])], [[np.int8(3), 3]]):
        assert branch_limits([TokenSample([], [Branch([1]), Branch([2])])], limits) == [[3, 3]]
    assert tiny.config(pair_indices=np.array([2, 4])).pair_indices == (2, 4)


@pytest.mark.slow
def test_numpy_decodes_as_python_does(decoder):
    want = decoder.generate([GOOD], max_new_tokens=3, do_sample=True, top_k=5, seed=7, temperature=0.5)
    numpy = {"max_new_tokens": np.int32(3), "do_sample": np.bool_(True), "top_k": np.int64(5), "seed": np.uint32(7)}
    assert decoder.generate([GOOD], temperature=np.float32(0.5), stop=None, top_p=None, **numpy) == want
    for limits in ([[3, 3]], np.array([[3, 3]]), [np.array([3, 3])], [[np.int8(3), 3]]):
        assert decoder.generate([GOOD], **numpy | {"max_new_tokens": limits, "temperature": 0.5}) == want
    assert len(list(decoder.columns([GOOD], **numpy | {"max_new_tokens": 4}, every=np.int64(2)))) == 3
    as_arrays = TokenSample(np.array([1, 2]), [Branch(np.array([3], np.uint16)), Branch([np.int64(4)])])
    as_lists = TokenSample([1, 2], [Branch([3]), Branch([4])])
    assert decoder.generate([as_arrays], **numpy) == decoder.generate([as_lists], **numpy)


NOT_WHOLE = [1.5, 2.0, True, math.inf, math.nan, "3", [1], {}]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
@pytest.mark.parametrize("name", ["seed", "top_k", "max_new_tokens", "every"])
def test_no_whole_number(decoder, name, value):
    call = decoder.columns if name == "every" else decoder.generate
    value = [1.5] if name == "seed" and value == [1] else value  # there may be a seed a sample
    refused(lambda: list(call([GOOD], **{name: value})), name)


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, [[0, 1]], [[1, 2**40]], [[1]], [[1, 1], [1, 1]], [1, 1], []])
def test_max_new_tokens(decoder, value):
    refused(lambda: decoder.generate([GOOD], max_new_tokens=value), "max_new_tokens")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [0, -1.0, math.inf, math.nan, True, "1", [1]],
        "top_p": [0, 1.1, math.nan, True, "1"],
        "min_p": [-0.1, 2, math.nan, True],
        "repetition_penalty": [0, math.inf, math.nan, True, "1"],
        "seed": [-1, 2**32],
        "top_k": [-1],
        "do_sample": [1, "yes", 0.0],
        "stop": ["text", [""], [1], 5, {1: 2}, [None]],
    }.items(),
)
def test_out_of_range(name, values):
    for value in values:
        refused(lambda value=value: SamplingParams(**{name: value}), name, "must be")


@pytest.mark.parametrize("value", [1.5, True, "2", None], ids=repr)
def test_pair_indices(value):
    refused(lambda: tiny.config(pair_indices=(value,)), "pair_indices")


CALL = 'Sample("the text that all share", ["a prompt", "another"])'


@pytest.mark.parametrize(
    ("background", "branches"),
    [(None, ["b"]), (1, ["b"]), ("a", [None]), ("a", ["b", 5]), ("a", None), ("a", 5), ("a", []), ("a", {"b": 1})],
    ids=repr,
)
def test_no_text(background, branches):
    refused(lambda: Sample(background, branches), CALL)


@pytest.mark.parametrize("text", ["\ud800", "good \udfff", "a\ud83d b"], ids=ascii)
def test_half_a_character(text):
    refused(lambda: Sample(text, ["b"]), "background", "half of a character")
    refused(lambda: Sample("a", ["b", text]), "prompt 1", "half of a character")


@pytest.mark.parametrize(
    "samples",
    [
        None, 5, "text", {"background": "a", "branches": ["b"]}, GOOD, [{"background": "a", "branches": ["b"]}], [None],
        ["text"], [GOOD, ("a", ["b"])],
    ],
    ids=repr,
)  # fmt: skip
def test_no_sample(decoder, samples):
    for ask in (decoder.generate, decoder.layout, lambda s: list(decoder.columns(s))):
        refused(lambda ask=ask: ask(samples), CALL)


def test_no_sample_to_stream(decoder):
    for sample in (None, {"background": "a", "branches": ["b"]}, "text"):
        refused(lambda sample=sample: next(decoder.stream(sample)), CALL)


@pytest.mark.parametrize("branches", [None, 5, "ab", [[1, 2]], [None], ["b"]], ids=repr)
def test_no_branches_of_ids(decoder, branches):
    refused(lambda: decoder.generate([TokenSample([1], branches)]), "branches is", "Branch(prompt=")


def test_settings(decoder):
    refused(lambda: Sample("a", ["b"], visibility="all"), "visibility 'all' is not one of columns")
    refused(lambda: decoder.layout([TokenSample([1], [Branch([1])], visibility="all")]), "visibility 'all'")
    refused(lambda: decoder.generate([GOOD], params={"seed": 1}), "pass SamplingParams(")
    refused(lambda: decoder.variant(eos_ids=(9999,)).generate([GOOD]), "eos_ids: 9999 is no token id")
