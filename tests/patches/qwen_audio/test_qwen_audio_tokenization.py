"""Qwen-Audio's tokenizer and prompts against the ids of the original."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from golden import HERE, golden
from safetensors.torch import save_file
from transformers import AutoProcessor, WhisperFeatureExtractor

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import build_batch
from audio_lens_plugin.patches.qwen_audio import FAMILY, TRANSCRIBE
from audio_lens_plugin.patches.qwen_audio.processing import QwenAudioProcessor, processor_from_published
from audio_lens_plugin.patches.qwen_audio.tokenization import (
    PLACEHOLDER,
    merges_of,
    read_ranks,
    special_tokens,
    tokenizer_from_ranks,
)
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.spans import Role

RANKS = HERE / "qwen_audio" / "ranks.tiktoken"
PLACEHOLDER_ID, END = 151851, 151643
CASES = golden("qwen_audio", "committed").cases


@pytest.fixture(scope="module")
def processor() -> QwenAudioProcessor:
    return QwenAudioProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer_from_ranks(RANKS))


@pytest.mark.parametrize("case", CASES)
def test_ids_of_the_original_tokenizer(processor, case: str) -> None:
    for text, ids in zip(CASES[case]["texts"], CASES[case]["real_tokenizer_ids"], strict=True):
        without_path = re.sub("<audio>.*?</audio>", "<audio></audio>", text)
        wanted = [one for one in ids if one not in (PLACEHOLDER_ID, END)]
        assert processor.tokenizer(without_path)["input_ids"] == wanted


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        ("<|endoftext|>", 151643),
        ("<|im_start|>", 151644),
        ("<|im_end|>", 151645),
        ("<|extra_0|>", 151646),
        ("<|extra_204|>", 151850),
        (PLACEHOLDER, 151851),
        ("<|startoftranscript|>", 151852),
        ("<|startofanalysis|>", 151853),
        ("<|translate|>", 151854),
        ("<|transcribe|>", 151855),
        ("<|caption|>", 151856),
        ("<|keyword|>", 151857),
        ("<|unknown|>", 151858),
        ("<|en|>", 151859),
        ("<|it|>", 151866),
        ("<|zh_tr|>", 151867),
        ("<|notimestamps|>", 151868),
        ("<|sil|>", 151869),
        ("<|timestamps|>", 151870),
        ("<|0.00|>", 151871),
        ("<|12.34|>", 153105),
        ("<|30.00|>", 154871),
        ("<|wo_itn|>", 154877),
        ("<audio>", 155163),
        ("</audio>", 155164),
    ],
)
def test_ids_of_special_tokens(processor, token: str, wanted: int) -> None:
    assert processor.tokenizer.convert_tokens_to_ids(token) == wanted
    assert processor.tokenizer(token)["input_ids"] == [wanted]


def test_there_are_as_many_special_tokens_as_ids() -> None:
    assert len(special_tokens()) == len(set(special_tokens())) == 155165 - 151643


def chat_prompts() -> list[tuple[str, Prompt]]:
    numbers = golden("qwen_audio", "committed")
    found = []
    for case, question in (("audio_text", "what is that sound?"), ("two_audios_one_prompt", "which is louder?")):
        waves = [numbers.get(case, f"waveform{index}") for index in range(2)]
        clips = tuple(Clip(wave.numpy(), 16_000) for wave in waves if wave is not None)
        found.append((case, Prompt(clips, question)))
    return found


@pytest.mark.parametrize(("case", "prompt"), chat_prompts(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_chat_prompt_has_the_ids_of_the_original(processor, case: str, prompt: Prompt) -> None:
    batch = build_batch(FAMILY, processor, [prompt])
    assert batch.inputs["input_ids"].tolist() == CASES[case]["real_tokenizer_ids"]


def test_content_is_tokenised_apart_from_its_header(tmp_path: Path, processor) -> None:
    """A question that begins with a line break must not melt into the one before it, though the two are one token."""
    lines = [*RANKS.read_text().splitlines(), "Cgo= 271"]  # two line breaks, as published
    (tmp_path / "ranks").write_text("\n".join(sorted(lines, key=lambda line: int(line.split()[1]))))
    melting = QwenAudioProcessor(processor.feature_extractor, tokenizer_from_ranks(tmp_path / "ranks"))
    assert melting.tokenizer("\n\n")["input_ids"] == [271]
    ids = build_batch(FAMILY, melting, [Prompt(question="\nhello")]).inputs["input_ids"][0].tolist()
    start = ids.index(melting.tokenizer.convert_tokens_to_ids("user")) + 1
    assert ids[start : start + 2] == [198, 198]


def test_the_base_model_reads_clips_and_tags(processor) -> None:
    base = QwenAudioProcessor(processor.feature_extractor, processor.tokenizer, chat=False)
    wave = golden("qwen_audio", "committed").get("batch2_two_lengths", "waveform0")
    batch = build_batch(FAMILY, base, [Prompt((Clip(wave.numpy(), 16_000),))])
    wanted = [one for one in CASES["batch2_two_lengths"]["real_tokenizer_ids"][0] if one != END]
    assert batch.inputs["input_ids"][0].tolist() == wanted
    asked = build_batch(FAMILY, base, [Prompt((Clip(wave.numpy(), 16_000),), "What is it?")])
    assert TRANSCRIBE not in asked.positions.row_texts[0].text
    assert len(asked.at("question")) > 0
    with pytest.raises(PromptError, match="no system turn"):
        build_batch(FAMILY, base, [Prompt((Clip(wave.numpy(), 16_000),), system="Listen.")])


def test_tags_are_template_and_frames_are_audio(processor) -> None:
    _, prompt = chat_prompts()[1]
    batch = build_batch(FAMILY, processor, [prompt])
    ids, roles = batch.inputs["input_ids"][0], batch.positions.roles[0]
    assert bool((roles[(ids == 155163) | (ids == 155164)] == Role.TEMPLATE).all())
    assert bool(((ids == PLACEHOLDER_ID) == (roles == Role.AUDIO)).all())


@pytest.mark.parametrize(("chat_format", "chats"), [("chatml", True), ("raw", False)])
def test_a_published_folder_gives_a_processor(tmp_path: Path, chat_format: str, chats: bool) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(RANKS.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"chat_format": "{chat_format}"}}')
    made = processor_from_published(str(tmp_path), None)
    assert made.chat is chats
    assert made.feature_extractor.feature_size == 80
    made.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "qwen_audio"}')
    again = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(again, QwenAudioProcessor)
    assert again.chat is chats
    assert again.tokenizer(TRANSCRIBE)["input_ids"] == made.tokenizer(TRANSCRIBE)["input_ids"]


@pytest.mark.parametrize(
    ("chat_format", "stops"), [("chatml", {"<|im_end|>", "<|im_start|>", "<|endoftext|>"}), ("raw", {"<|endoftext|>"})]
)
def test_a_published_checkpoint_stops_at_the_end_of_its_turn(tmp_path: Path, chat_format: str, stops: set) -> None:
    numbers = golden("qwen_audio", "committed")
    settings = {"chat_format": chat_format, "eos_token_id": END, "pad_token_id": END, "stop_words_ids": [[END]]}
    (tmp_path / "config.json").write_text(json.dumps(numbers.config))
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "qwen.tiktoken").write_bytes(RANKS.read_bytes())
    save_file(numbers.weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FAMILY.load(str(tmp_path), None)
    ids = loaded.module.generation_config.eos_token_id
    assert set(loaded.processor.tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])) == stops
    loaded.module.save_pretrained(tmp_path / "ours")
    loaded.processor.save_pretrained(tmp_path / "ours")
    again = FAMILY.load(str(tmp_path / "ours"), None, original_quirks=True)
    assert again.module.generation_config.eos_token_id == ids
    assert again.processor.chat is loaded.processor.chat
    assert again.module.config.original_quirks


def test_a_merge_is_the_last_step_of_a_tokens_own_encoding() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


def test_a_file_that_is_no_list_of_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_text("IQ== 0\nnonsense\n")
    with pytest.raises(ValueError, match="line 2"):
        read_ranks(tmp_path / "x.tiktoken")
    with pytest.raises(ValueError, match="not made of two tokens"):
        merges_of({b"a": 0, b"b": 1, b"ab": 3, b"abba": 2})
