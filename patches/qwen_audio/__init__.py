"""Qwen-Audio, chat and base: a Whisper-style tower, a projector, and a Qwen language model. The code is our own.

    audio_encoder             model.audio_tower             32 blocks; 50 frames per second, pooled to 25 positions
    audio_encoder.blocks[i]   model.audio_tower.layers[i]
    audio_projector           model.multi_modal_projector
    embed, blocks, ln_final   model.language_model....      audio positions are overwritten by the projector's output
    unembed                   lm_head

The published code runs on transformers 4.32 alone; on today's it loads corrupted weights. So the model is written anew
(`modeling`), the published weights are renamed and split as they are loaded (`checkpoint`), and the tokenizer is built
from the published ranks (`tokenization`). Source: the Qwen-Audio technical report (arXiv 2311.07919) and the numbers of
the original code, which the tests hold ours to.

Two traps. The tags around a clip are positions of their own, overwritten by two learned vectors; they are template, not
audio. And the original rounds a clip's frames down where Whisper's feature extractor rounds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge
from transformer_lens.model_bridge.supported_architectures.qwen2_audio import Qwen2AudioArchitectureAdapter
from transformers import PreTrainedModel

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import Family, Heard, Loaded, Segment, check_placeholders, mel_features
from audio_lens_plugin.patches.qwen_audio.checkpoint import open_checkpoint
from audio_lens_plugin.patches.qwen_audio.configuration import PUBLISHED_CLASS
from audio_lens_plugin.patches.qwen_audio.modeling import (
    QwenAudioForConditionalGeneration,
    audio_lengths,
    rotated,
)
from audio_lens_plugin.patches.qwen_audio.processing import HOP
from audio_lens_plugin.patches.qwen_audio.tokenization import CLIP_END, CLIP_START, PLACEHOLDER, TURN_END, TURN_START
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.spans import Role
from audio_lens_plugin.towers import WhisperTower

SYSTEM = "You are a helpful assistant."
TRANSCRIBE = "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>"
SHORTEST = 3 * HOP / 16_000  # seconds: fewer than three frames leave no audio position


class QwenAudioAttentionBridge(PositionEmbeddingsAttentionBridge):
    """TransformerLens's attention, with a rotation in fp32 and queries that are scaled by their position."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `QwenAudioAttention.forward`, step by step through the hooks."""
        if self.config.use_split_qkv_input or self.config.use_attn_in or self.config.use_attn_result:
            raise NotImplementedError("split inputs and per-head results are not offered for Qwen-Audio's attention.")
        hidden_states = self.hook_in(hidden_states)
        heads = (*hidden_states.shape[:-1], -1, self.original_component.head_dim)
        query, key, value = (part(hidden_states).view(heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        query, key = rotated(query, key, self._apply_position_embedding_hooks(position_embeddings), query_scale)
        query, key = self.hook_rot_q(query), self.hook_rot_k(key)
        key, value = self._update_kv_cache(key, value, **kwargs)
        scores = self._apply_reconstruct_attention_mask(
            attn_scores=query @ key.transpose(-2, -1) * self.original_component.scaling,
            attention_mask=attention_mask,
            seq_len=key.shape[-2],
            q_seq_len=query.shape[-2],
        )
        weights = self._masked_softmax(self.hook_attn_scores(scores), dtype=torch.float32).to(query.dtype)
        weights = self.hook_pattern(weights)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return self.hook_out(self.o(mixed)), weights


class HookedQwenAudioAdapter(WhisperTower, Qwen2AudioArchitectureAdapter):
    """The modules stand where Qwen2-Audio's do; only the attention has a bridge of its own."""

    def _build_attention_bridge(self) -> QwenAudioAttentionBridge:
        standard = super()._build_attention_bridge()
        return QwenAudioAttentionBridge(
            name=standard.name, config=self.cfg, submodules=standard.submodules, requires_attention_mask=True
        )


class QwenAudio(Family):
    """Qwen-Audio, chat and base."""

    name = "qwen_audio"
    architectures = ("QwenAudioForConditionalGeneration", PUBLISHED_CLASS)
    repo_ids = ("Qwen/Qwen-Audio-Chat", "Qwen/Qwen-Audio")
    verified = (
        "tower, every block, logits, greedy tokens, token ids and prompts against numbers of the original code at toy "
        "size, faults included (original_quirks=True); real weights not run"
    )
    audio_token = PLACEHOLDER
    positions_per_second = 25.0
    options = ("original_quirks",)

    def serves(self, config: Mapping[str, Any]) -> bool:
        """Ours, or a published one that hears: text-only Qwen has the same architecture."""
        published = PUBLISHED_CLASS in (config.get("architectures") or ())
        return "audio" in config if published else super().serves(config)

    def load(self, source: str, revision: str | None, **kwargs: Any) -> Loaded:
        """As `Family.load`; ``original_quirks=True`` computes the original's faults, too (see `configuration`)."""
        return open_checkpoint(source, revision, **kwargs)

    def model_class(self) -> type[PreTrainedModel]:
        return QwenAudioForConditionalGeneration

    def adapter(self) -> type:
        return HookedQwenAudioAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        """Qwen-Audio-Chat reads ChatML. The base model reads clips, then words, or its tags for a transcription."""
        return self._conversation(prompt) if processor.chat else self._tagged(prompt)

    def _conversation(self, prompt: Prompt) -> list[Segment]:
        system = SYSTEM if prompt.system is None else prompt.system
        segments = [*_turn_start("system"), Segment(system, Role.SYSTEM), *_turn_end(), *_turn_start("user")]
        for number, _ in enumerate(prompt.clips, 1):
            segments += [Segment(f"Audio {number}:", Role.TEMPLATE), *self._clip(), Segment("\n", Role.TEMPLATE)]
        segments += [Segment(prompt.words or "", Role.QUESTION), *_turn_end(), *_turn_start("assistant")]
        return [*segments, Segment(prompt.answer or "", Role.ANSWER)]

    def _tagged(self, prompt: Prompt) -> list[Segment]:
        if prompt.system is not None:
            raise PromptError("the base model of Qwen-Audio has no system turn; use the chat model, or leave it out.")
        clips = [segment for _ in prompt.clips for segment in self._clip()]
        words = Segment(prompt.words, Role.QUESTION) if prompt.words else Segment(TRANSCRIBE, Role.TEMPLATE)
        return [*clips, words, Segment(prompt.answer or "", Role.ANSWER)]

    def _clip(self) -> list[Segment]:
        start, end = (Segment(tag, Role.TEMPLATE) for tag in (CLIP_START, CLIP_END))
        return [start, Segment(self.audio_token, Role.AUDIO), end]

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        features, _ = mel_features(processor.feature_extractor, clips, SHORTEST, truncate)
        window = processor.feature_extractor.n_samples
        samples = [len(clip.at_rate(processor.feature_extractor.sampling_rate).waveform) for clip in clips]
        frames = processor.frames(torch.tensor(samples).clamp(max=window))
        mask = (torch.arange(features.shape[-1]) < frames[:, None]).long()
        counts = tuple(audio_lengths(frames).tolist())
        return Heard({"input_features": features, "feature_attention_mask": mask}, counts)

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        config = module.config
        mask: Any = inputs.get("feature_attention_mask")
        check_placeholders(
            inputs, config.audio_token_id, lambda: int(audio_lengths(mask.sum(-1)).sum()), "feature_attention_mask"
        )
        if inputs.get("input_ids") is not None and mask is not None:
            tags = [int((inputs["input_ids"] == config.audio_start_token_id + end).sum()) for end in (0, 1)]
            if tags != [len(mask)] * 2:
                raise PromptError(
                    f"{len(mask)} clips stand between {tags[0]} opening and {tags[1]} closing tags: the text was cut."
                )

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name in ("input_features", "feature_attention_mask") else "embed"


def _turn_start(role: str) -> list[Segment]:
    """The published code tokenises a role, its line break and the content each on its own."""
    return [Segment(f"{TURN_START}{role}", Role.TEMPLATE), Segment("\n", Role.TEMPLATE, apart=True)]


def _turn_end() -> list[Segment]:
    return [Segment(f"{TURN_END}\n", Role.TEMPLATE)]


FAMILY = QwenAudio()
