"""From a name to a model: what is found, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load, toys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the toy's checkpoint that a test may spoil."""
    return Path(shutil.copytree(toys()["toy/qwen2-audio"], tmp_path / "checkpoint"))


def test_a_folder_is_loaded_like_a_repo(folder: Path, toy: LALM) -> None:
    lalm = load(folder)
    assert lalm.family is toy.family
    assert torch.equal(lalm.module.lm_head.weight, toy.module.lm_head.weight)


def test_a_loaded_module_is_wrapped_as_it_is(toy: LALM) -> None:
    lalm = load(toy.module, toy.processor)
    assert lalm.module is toy.module
    with pytest.raises(LoadError, match="needs its processor"):
        load(toy.module)


def test_options_reach_transformers(folder: Path) -> None:
    lalm = load(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert lalm.dtype == torch.bfloat16
    assert lalm.attention == "eager"


def test_missing_weights_are_an_error_that_lists_them(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.3.self_attn.q_proj.weight" in name and "language_model" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"missing_keys.*layers\.3\.self_attn\.q_proj\.weight"):
        load(folder)


def test_unexpected_weights_are_an_error_that_lists_them(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.renamed.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"unexpected_keys: model\.renamed\.weight"):
        load(folder)


def test_an_unknown_toy_names_those_on_the_shelf() -> None:
    with pytest.raises(LoadError, match=r"toys are: toy/desta2, toy/qwen-audio, toy/qwen2-audio"):
        load("toy/nothing")


def test_a_folder_that_is_not_there_is_told() -> None:
    with pytest.raises(LoadError, match="neither a folder here, nor a repo id"):
        load("./not/here")


def test_a_repo_that_cannot_be_reached_is_told() -> None:
    with pytest.raises(LoadError, match="has no configuration that transformers can read"):
        load("nobody/nothing")


def test_an_architecture_that_no_family_serves_names_the_families(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(LoadError, match=r"LlamaForCausalLM.*which no family serves.*qwen2_audio"):
        load(tmp_path)


def test_a_module_that_no_family_serves_is_refused(toy: LALM) -> None:
    tiny = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    )
    with pytest.raises(LoadError, match="which no family serves"):
        load(tiny, toy.processor)


def test_a_processor_comes_with_the_toy() -> None:
    processor = AutoProcessor.from_pretrained(toys()["toy/qwen2-audio"])
    assert type(processor).__name__ == "Qwen2AudioProcessor"
