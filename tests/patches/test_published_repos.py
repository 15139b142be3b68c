"""Repos as they are published load whole: Voxtral with Mistral's files alone, and all of Qwen2.5-Omni."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import open_model
from safetensors.torch import save_file
from tiny import CHAT_TEMPLATE, voxtral
from transformers import Qwen2_5OmniProcessor, VoxtralProcessor

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load
from audio_lens_plugin.patches.qwen2_5_omni import FAMILY as OMNI
from audio_lens_plugin.patches.qwen2_5_omni import Processor
from audio_lens_plugin.patches.voxtral import mistral_processor

PARTS = {"model.language_model.": "model.", "model.audio_tower.": "audio_tower.", "model.visual.": "visual."}


@pytest.fixture
def voxtral_repo(tmp_path: Path) -> LALM:
    """No tokenizer.json, no tokenizer_config.json."""
    lalm = open_model("tiny/voxtral")
    lalm.module.save_pretrained(tmp_path)
    lalm.processor.feature_extractor.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text(json.dumps(voxtral.tekken()))
    return lalm


@pytest.fixture
def omni_repo(tmp_path: Path) -> LALM:
    """The thinker's weights under their published names, beside those of the talker."""
    lalm = open_model("tiny/qwen2_5_omni")
    weights = {"talker.codec_head.weight": torch.zeros(2, 2), "token2wav.conv.weight": torch.zeros(2)}
    for name, value in lalm.module.state_dict().items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
        weights[f"thinker.{PARTS.get(prefix, '')}{name.removeprefix(prefix)}"] = value.clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni"}
    config["thinker_config"] = json.loads(lalm.module.config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config))
    lalm.processor.feature_extractor.save_pretrained(tmp_path)
    lalm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return lalm


def same_answers(one: LALM, other: LALM, clip: Clip) -> bool:
    batches = [lalm.prompt([[clip], []], question="What is it?", answer="It is", system="Hi.") for lalm in (one, other)]
    with torch.no_grad():
        logits = [lalm.module(**lalm.inputs(batch)).logits for lalm, batch in zip((one, other), batches, strict=True)]
    return torch.equal(*logits)


def test_voxtral_is_read_from_mistrals_file(voxtral_repo: LALM, tmp_path: Path, clips: list[Clip]) -> None:
    lalm = load(tmp_path)
    assert not list(tmp_path.glob("tokenizer*"))
    assert isinstance(lalm.processor, VoxtralProcessor)
    assert (lalm.tokenizer.bos_token, lalm.tokenizer.eos_token, lalm.tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert same_answers(lalm, voxtral_repo, clips[0])


def test_a_voxtral_saved_by_transformers_is_read_too(tmp_path: Path, clips: list[Clip]) -> None:
    lalm = open_model("tiny/voxtral")
    lalm.module.save_pretrained(tmp_path)
    lalm.processor.save_pretrained(tmp_path)
    assert not (tmp_path / "tekken.json").exists()
    assert same_answers(load(tmp_path), lalm, clips[0])


def test_the_thinker_is_taken_out_of_the_whole_omni(omni_repo: LALM, tmp_path: Path, clips: list[Clip]) -> None:
    lalm = load(tmp_path)
    assert type(lalm.module) is type(omni_repo.module)
    assert isinstance(lalm.processor, Processor)
    assert not isinstance(lalm.processor, Qwen2_5OmniProcessor)  # that one needs torchvision
    assert same_answers(lalm, omni_repo, clips[0])


def test_families_say_which_transformers_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.15.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.21.*found transformers==5\.15\.0"):
        OMNI.load("anywhere", None)
    with pytest.raises(ImportError, match=r"transformers>=5\.16.*found transformers==5\.15\.0"):
        mistral_processor("anywhere", None)
