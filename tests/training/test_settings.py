"""Visibility and alignment travel with the weights: training stores them, whatever reads the weights takes them."""

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
from runs import finetune_flags, inputs, pretrain_flags

from pd_jax import ParallelDecoder
from pd_jax.config import SECTION
from pd_jax.files import load_config, read_adapter_config
from pd_jax.training.stages import finetune, prepare, pretrain

ALL = {"mesh": (1, 8, 1), "batch_size": 8}  # every device of the tests
ISOLATED = {"visibility": "isolated", "align": "ragged"}


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A model directory trained as a control is: siblings hidden, no waiting."""
    directory = tmp_path_factory.mktemp("settings") / "control"
    pretrain(pretrain_flags(directory, max_steps=1, **ALL, **ISOLATED))
    return directory


@pytest.fixture(scope="module")
def exported(control):
    output = control.with_name("exported")
    script = Path(__file__).parents[2] / "convert" / "flax_to_hf.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["flax_to_hf.py", "--checkpoint", str(control), "--output", str(output)])
        runpy.run_path(str(script), run_name="__main__")
    return output


def trained_as(decoder) -> dict[str, str]:
    return {"visibility": decoder.visibility, "align": decoder.align}


@pytest.mark.parametrize("made", ["control", "exported"])
def test_a_control_is_decoded_as_it_was_trained(request, made, caplog):
    directory = request.getfixturevalue(made)
    caplog.clear()
    assert {key: json.loads((directory / "config.json").read_text())[SECTION][key] for key in ISOLATED} == ISOLATED
    assert trained_as(ParallelDecoder.from_pretrained(directory)) == ISOLATED
    assert not caplog.messages


def test_an_override_is_done_and_said_once(control, caplog):
    decoder = ParallelDecoder.from_pretrained(control, visibility="columns", align="left")
    assert trained_as(decoder) == {"visibility": "columns", "align": "left"}
    assert caplog.messages == [
        "trained with visibility isolated, align ragged; decoding with visibility columns, align left"
    ]


def test_finetuning_goes_on_as_pretraining_did(control, tmp_path, capsys):
    flags = finetune_flags(tmp_path / "out", model_name=str(control), **ALL)
    config = prepare(flags, flags.max_length)[0].config
    assert (config.visibility, config.align) == ("isolated", "ragged")
    assert "was trained with" not in capsys.readouterr().out
    flags = finetune_flags(tmp_path / "out", model_name=str(control), visibility="prompts", **ALL)
    config = prepare(flags, flags.max_length)[0].config
    assert (config.visibility, config.align) == ("prompts", "ragged")
    assert "was trained with visibility isolated, align ragged; this run trains it with visibility prompts" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.slow
def test_adapters_carry_their_own(control, tmp_path):
    """Adapters trained otherwise than their base are decoded as they were trained."""
    output = tmp_path / "adapter"
    changes = {"use_lora": True, "max_steps": 1, "visibility": "prompts", "align": "right"}
    finetune(finetune_flags(output, model_name=str(control), **changes, **ALL))
    assert {key: read_adapter_config(output)[SECTION][key] for key in ISOLATED} == {
        "visibility": "prompts",
        "align": "right",
    }
    assert trained_as(ParallelDecoder.from_pretrained(control, output)) == {"visibility": "prompts", "align": "right"}
    assert trained_as(ParallelDecoder.from_pretrained(control)) == ISOLATED


def test_what_is_not_stored_means_columns_and_left(tmp_path, caplog):
    """Settings of an older version; a plain model, which was never trained in columns, says nothing."""
    path = Path(inputs()["base"]) / "config.json"
    config = json.loads(path.read_text())
    for name, section in (("old", {"pair_indices": [2, 4, 6]}), ("plain", None)):
        (tmp_path / name).mkdir()
        changed = {key: value for key, value in config.items() if key != SECTION}
        changed |= {} if section is None else {SECTION: section}
        (tmp_path / name / "config.json").write_text(json.dumps(changed))
    with caplog.at_level(logging.WARNING):
        old = load_config(tmp_path / "old")
        load_config(tmp_path / "old")
        plain = load_config(tmp_path / "plain", (2, 4, 6))
    assert (old.visibility, old.align, plain.visibility, plain.align) == (None, None, None, None)
    assert caplog.messages == [
        f"{tmp_path / 'old'} does not say how it was trained; taken as visibility columns, align left"
    ]
