"""The tiny DeSTA2 of the recorded numbers, as it was published and as it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import HERE, Golden, golden
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desta2")
    write_parts(folder, golden("desta2", "committed"))
    return folder


@pytest.fixture(scope="module")
def lalm(folder: Path) -> LALM:
    return load(folder, original_quirks=True)


def write_parts(folder: Path, numbers: Golden) -> None:
    """The tiny model in the parts that were published: a Llama, a Whisper, their tokenizers, and a connector."""
    told, weights = numbers.config, numbers.weights

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

    llama = LlamaForCausalLM(
        LlamaConfig(**told["llama_config"], rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    )
    llama.load_state_dict(part("llama."))
    llama.generation_config.update(**told["llama_generation_config"])
    llama.save_pretrained(folder / "llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "desta2" / "tiny_llama_tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    tokenizer.save_pretrained(folder / "llama")
    whisper = WhisperForConditionalGeneration(WhisperConfig(**told["whisper_config"]))
    missing, unexpected = whisper.load_state_dict(part("speech_perception.whisper."), strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], [])  # tied
    whisper.generation_config = type(whisper.generation_config)(**told["whisper_generation_config"])
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(**told["feature_extractor"]).save_pretrained(folder / "whisper")
    PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "desta2" / "tiny_whisper_tokenizer.json"), eos_token="<|endoftext|>"
    ).save_pretrained(folder / "whisper")
    config = {"model_type": "DestaModel", "prompt_size": 64}
    config |= {"llama_model_id": str(folder / "llama"), "whisper_model_id": str(folder / "whisper")}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(part("speech_perception.connector."), folder / "qformer_connector.pth")
