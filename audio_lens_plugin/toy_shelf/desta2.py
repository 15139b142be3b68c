"""The toy DeSTA2: transformers' Whisper and Llama and the family's connector, all small.

As in the real one, the ears were trained before: Whisper's encoder starts as the tower of ``toy/qwen2-audio``, which is
built alike. Its decoder learns last, and to write one word only: whether it hears *speech* or a *sound*. So the
language model has a real transcription to read, made by the model itself, and it does not give an answer away: within a
track all clips have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

from audio_lens_plugin.loading import load
from audio_lens_plugin.patch import Family
from audio_lens_plugin.patches.desta import FAMILY
from audio_lens_plugin.patches.desta.configuration import DestaConfig
from audio_lens_plugin.patches.desta.modeling import DestaForConditionalGeneration
from audio_lens_plugin.patches.desta.processing import DestaProcessor
from audio_lens_plugin.toy_shelf.family import MEL_BINS, WINDOW_SECONDS, Toy
from audio_lens_plugin.toy_shelf.sounds import SAMPLE_RATE, LabelledSound
from audio_lens_plugin.toy_shelf.stages import learn
from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer

EARS = "toy/qwen2-audio"
PROMPT_SIZE = 16
TARGETS = [1, 2, 3]
SPEECH, SOUND = "speech", "sound"

BOS, TURN_END = "<|begin_of_text|>", "<|eot_id|>"
LLAMA_TOKENS = (BOS, "<|start_header_id|>", "<|end_header_id|>", TURN_END)
WHISPER_END, WHISPER_START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
# Llama 3's pattern: letters, up to three digits, or signs, with what stands before them.
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

WRITING_STEPS, WRITING_BATCH, WRITING_RATE = 150, 32, 2e-3
CHUNK = 100  # clips at a time where no gradient is needed


class Desta2Toy(Toy):
    """The toy as the training stages see it: a processor, a model, and a way to hear clips and to read prompts."""

    family: ClassVar[Family] = FAMILY
    about: ClassVar[str] = (
        "this package's `DestaForConditionalGeneration`, which is held to the numbers of the original code, with small "
        f"numbers (a Whisper of 3 encoder layers and width 96, {PROMPT_SIZE} vectors per clip, a Llama of 8 layers and "
        "width 128"
    )
    turn_end: ClassVar[str] = TURN_END
    history: ClassVar[str] = (
        f"Its encoder started as the tower of `{EARS}`. Its decoder learned last, to write one word as transcription: "
        f"`{SPEECH}` or `{SOUND}`, which is the same for all clips of a track and gives no answer away."
    )

    @classmethod
    def untrained(cls) -> Self:
        """A toy with the ears of `EARS` and otherwise random weights."""
        processor = build_processor()
        model = build_model(processor)
        encoder = model.model.whisper.model.encoder
        encoder.load_state_dict(load(EARS).module.model.audio_tower.state_dict())
        return cls(processor, model)

    def hearing(self) -> nn.ModuleList:
        """What the first stage trains."""
        return nn.ModuleList([self.model.model.whisper.model.encoder, self.model.model.multi_modal_projector])

    def features(self, waveforms: list[np.ndarray], seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel features (clips, bins, window), always the whole window, and the number of vectors of each clip."""
        out = self.processor.feature_extractor(waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return out["input_features"], torch.full((len(waveforms),), PROMPT_SIZE)

    def hear(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors (clips, queries, hidden) as the model itself computes them, and their counts."""
        return self.model.model.hear(features), lengths

    def transcript(self, labels: Mapping[str, str]) -> str:
        """What the decoder will have learned to write."""
        return SOUND if "Animal" in labels else SPEECH

    def finished(self, sounds: Sequence[LabelledSound], seed: int) -> Self:
        """The toy with a decoder that has learned to write."""
        whisper = self.model.model.whisper
        heard = self._heard(sounds)
        written = self.processor.whisper_tokenizer
        start = [written.convert_tokens_to_ids(token) for token in (WHISPER_START, NO_TIMESTAMPS)]
        texts = [[*start, *written.encode(self.transcript(sound.labels)), written.eos_token_id] for sound in sounds]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True, written.eos_token_id)
        targets = ids[:, 1:].clone()
        targets[:, 0] = -100  # the second token of the start is given
        random = torch.Generator().manual_seed(seed)

        def losses() -> Iterator[torch.Tensor]:
            while True:
                rows = torch.randint(len(ids), (WRITING_BATCH,), generator=random)
                states = whisper.model.decoder(ids[rows, :-1], encoder_hidden_states=heard[rows]).last_hidden_state
                yield nn.functional.cross_entropy(whisper.proj_out(states).transpose(1, 2), targets[rows])

        learn(whisper.model.decoder.parameters(), losses(), WRITING_STEPS, WRITING_RATE)
        return self

    @torch.no_grad()
    def _heard(self, sounds: Sequence[LabelledSound]) -> torch.Tensor:
        """The encoder's last states."""
        encoder = self.model.model.whisper.model.encoder
        features, _ = self.features([sound.waveform for sound in sounds], WINDOW_SECONDS)
        return torch.cat([encoder(chunk).last_hidden_state for chunk in features.split(CHUNK)])


def build_processor() -> DestaProcessor:
    """The processor: a 6 s mel extractor, a tokenizer in Llama 3's way, and one that knows two words."""
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=WINDOW_SECONDS, sampling_rate=SAMPLE_RATE)
    llama = _byte_level(LLAMA_PATTERN, bos_token=BOS, eos_token=TURN_END, padding_side="left")
    words = _byte_level(r"\p{L}+|.", eos_token=WHISPER_END, pad_token=WHISPER_END)
    words = words.train_new_from_iterator(
        [[SPEECH, SOUND] * 10], 300, new_special_tokens=[WHISPER_END, WHISPER_START, NO_TIMESTAMPS], show_progress=False
    )
    return DestaProcessor(extractor, train_tokenizer(llama, LLAMA_TOKENS), words, prompt_size=PROMPT_SIZE)


def _byte_level(pattern: str, **named: Any) -> PreTrainedTokenizerFast:
    """An untrained byte-level BPE that cuts text by ``pattern`` first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def build_model(processor: DestaProcessor) -> DestaForConditionalGeneration:
    """The model with random weights, its encoder as large as the tower of `EARS`."""
    llama, words = processor.tokenizer, processor.whisper_tokenizer
    ears = load(EARS).module.config.audio_config
    end, start = words.eos_token_id, words.convert_tokens_to_ids(WHISPER_START)
    audio_config = dict(
        vocab_size=len(words),
        num_mel_bins=ears.num_mel_bins,
        d_model=ears.d_model,
        encoder_layers=ears.encoder_layers,
        encoder_attention_heads=ears.encoder_attention_heads,
        encoder_ffn_dim=ears.encoder_ffn_dim,
        max_source_positions=ears.max_source_positions,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        max_target_positions=16,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    text_config = dict(
        vocab_size=len(llama),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
    )
    transcription = dict(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        is_multilingual=False,
        no_timestamps_token_id=words.convert_tokens_to_ids(NO_TIMESTAMPS),
        max_length=12,
    )
    config = DestaConfig(
        audio_config=audio_config,
        text_config=text_config,
        target_layers=TARGETS,
        prompt_size=PROMPT_SIZE,
        qformer_intermediate_size=192,
        audio_token_id=processor.audio_token_id,
        transcription=transcription,
    )
    model = DestaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=llama.eos_token_id, pad_token_id=llama.pad_token_id
    )
    return model
