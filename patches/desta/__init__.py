"""DeSTA2 and DeSTA2.5-Audio: Whisper, a Q-Former that reads several of its layers, and an untouched Llama 3.

    audio_encoder                model.whisper.model.encoder   blocks of Whisper; every clip fills the whole window
    audio_encoder.blocks[i]      model.whisper.model.encoder.layers[i]
    audio_projector              model.multi_modal_projector   64 vectors per clip, whatever its length: no time in them
    audio_projector.query_states model.multi_modal_projector.qformer    [clips, targets, queries, width]
    audio_projector.mixture      model.multi_modal_projector.mixture    [queries, targets]
    embed, blocks, ln_final      model.language_model....      audio positions are overwritten by the 64 vectors
    unembed                      lm_head

Sources: DeSTA2 (arXiv 2409.20007), DeSTA2.5-Audio (arXiv 2507.02768), and the numbers of DeSTA2's original code, which
the tests hold ours to.

What will surprise: the language model also *reads* the clip. Whisper's transcription stands in the prompt as ordinary
text, with a role of its own (``transcript``), so cutting the ``audio`` positions alone does not make the model deaf.
And DeSTA2's published prompt has two slips, kept as ``prompt_style="released"``: two BOS, and the vectors one token
early, before the line break of their turn's header. ``prompt_style="clean"`` writes what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformers import PreTrainedConfig, PreTrainedModel

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import (
    QUESTION_MARK,
    SYSTEM_MARK,
    Family,
    Heard,
    Loaded,
    Segment,
    check_placeholders,
    fill_template,
    mel_features,
)
from audio_lens_plugin.patches.desta.checkpoint import is_published, load_published
from audio_lens_plugin.patches.desta.modeling import DestaForConditionalGeneration
from audio_lens_plugin.patches.desta.processing import PLACEHOLDER, DestaProcessor, processor_from_published
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.spans import Role
from audio_lens_plugin.towers import WhisperTower

SYSTEM = {"desta2": "You are a helpful voice assistant.", "desta2.5": "Focus on the audio clips and instructions."}
SHORTEST = 0.04  # seconds
DETOUR = 22_050  # Hz: the rate through which DeSTA2's code resamples everything
NEW_TOKENS = 128  # of a transcription of DeSTA2.5
OWN_OPTIONS = ("prompt_style", "original_quirks")


class _LlamaInsideAdapter(LlamaArchitectureAdapter):
    """TransformerLens's names for the Llama in DeSTA, and for the connector."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._reprefix_components("model.", "model.language_model.")
        self.components["audio_projector"] = GeneralizedComponent(
            name="model.multi_modal_projector",
            submodules={
                "query_states": GeneralizedComponent(name="qformer"),
                "mixture": GeneralizedComponent(name="mixture"),
            },
        )


class HookedDestaAdapter(WhisperTower, _LlamaInsideAdapter):
    """The Llama, the connector, and Whisper's encoder opened layer by layer."""

    tower = "model.whisper.model.encoder"


class Desta(Family):
    """DeSTA2 and DeSTA2.5-Audio."""

    name = "desta"
    architectures = ("DestaForConditionalGeneration", "DestaModel", "DeSTA25AudioModel")
    repo_ids = ("DeSTA-ntu/DeSTA2-8B-beta", "DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B")
    verified = (
        "DeSTA2: encoder, connector, every block, logits, greedy tokens and prompt ids against numbers of the original "
        "code at toy size; DeSTA2.5: read from its code, not run; real weights of neither run"
    )
    audio_token = PLACEHOLDER
    positions_per_second = None
    transcribes = True
    options = OWN_OPTIONS

    def serves(self, config: Mapping[str, Any]) -> bool:
        """Ours, or one of the two published kinds, whose config.json need not name an architecture."""
        return is_published(config) or super().serves(config)

    def load(self, source: str, revision: str | None, **kwargs: Any) -> Loaded:
        """As `Family.load`.

        ``prompt_style``: "released" (default) or "clean"; ``original_quirks=True`` resamples by way of 22,050 Hz as
        DeSTA2's code does; neither changes DeSTA2.5. What is published is put together from its parts.
        """
        own = {name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if is_published(fields):
            processor = processor_from_published(fields, **own)
            module, report = load_published(source, revision, fields, processor.audio_token_id, **kwargs)
            return Loaded(module, processor, report)
        module, report = DestaForConditionalGeneration.from_pretrained(
            source, revision=revision, output_loading_info=True, **kwargs
        )
        return Loaded(module, DestaProcessor.from_pretrained(source, revision=revision, **own), report)

    def model_class(self) -> type[PreTrainedModel]:
        return DestaForConditionalGeneration

    def adapter(self) -> type:
        return HookedDestaAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        """The prompt of the release; ``system=""`` leaves the system turn out.

        Space around a turn's words is cut off, as the published templates do.
        """
        system = (SYSTEM[processor.release] if prompt.system is None else prompt.system).strip()
        prompt = replace(prompt, question=(prompt.words or "").strip(), options=None)
        if processor.release == "desta2.5":
            segments = self._llama31(processor, prompt, system)
        else:
            segments = self._llama3(processor, prompt, system)
        return [*segments, Segment(prompt.answer or "", Role.ANSWER)]

    def _llama3(self, processor: Any, prompt: Prompt, system: str) -> list[Segment]:
        """DeSTA2: Llama 3's turns, the clip in one of its own, whose role is "audio"."""
        released = processor.prompt_style == "released"
        if released and len(prompt.clips) > 1:
            raise PromptError(
                f'DeSTA2\'s released prompt holds one clip, not {len(prompt.clips)}; load with prompt_style="clean".'
            )
        segments = [Segment(processor.tokenizer.bos_token * (2 if released else 1), Role.TEMPLATE)]
        if system:
            segments += _turn("system", Segment(system, Role.SYSTEM))
        for clip in prompt.clips:
            audio, said = Segment(self.audio_token, Role.AUDIO), Segment(clip.transcript or "", Role.TRANSCRIPT)
            header, line, *rest = _turn("audio", said)
            segments += [header, audio, line, *rest] if released else [header, line, audio, *rest]
        if prompt.words:
            segments += _turn("user", Segment(prompt.words, Role.QUESTION))
        return [*segments, *_turn_start("assistant")]

    def _llama31(self, processor: Any, prompt: Prompt, system: str) -> list[Segment]:
        """DeSTA2.5: the tokenizer's own chat template, clips between tags in the user's turn."""
        clips = f"<start_audio>{self.audio_token}<end_audio>" * len(prompt.clips)
        words = QUESTION_MARK if prompt.words else ""
        user = "\n".join(part for part in (clips, words) if part)
        messages = [{"role": "system", "content": SYSTEM_MARK}] if system else []
        template = processor.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        if not system:
            template = SYSTEM_MARK + template  # stands for nothing, at a place where nothing is
        transcripts = iter(clip.transcript or "" for clip in prompt.clips)
        segments = []
        for segment in fill_template(template, self.audio_token, system, prompt.words):
            segments.append(segment)
            if segment.role is Role.AUDIO:
                segments.append(Segment(next(transcripts), Role.TRANSCRIPT, apart=True))
        return segments

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        return Heard({"input_features": _features(processor, clips, truncate)}, (processor.prompt_size,) * len(clips))

    def transcribe(self, module: PreTrainedModel, processor: Any, clips: Sequence[Clip], truncate: bool) -> list[str]:
        """Whisper's own words, with its own generation settings; DeSTA2.5 limits their number and strips spaces.

        DeSTA2.5's code first asks a voice-activity model, and writes " " where that hears no speech; none is here.
        Give such clips ``transcript=" "``: of noise and silence, Whisper can invent words.
        """
        whisper = module.model.whisper
        features = _features(processor, clips, truncate).to(whisper.device, whisper.dtype)
        newer = processor.release == "desta2.5"
        ids = whisper.generate(features, **({"max_new_tokens": NEW_TOKENS} if newer else {}))
        texts = processor.whisper_tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() if newer else text for text in texts]

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        features: Any = inputs.get("input_features")
        config = module.config
        check_placeholders(inputs, config.audio_token_id, lambda: len(features) * config.prompt_size)
        window = 2 * config.audio_config.max_source_positions
        if features is not None and features.shape[-1] != window:
            raise PromptError(f"Whisper takes a full window of {window} mel frames, not {features.shape[-1]}.")

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name == "input_features" else "embed"


def _features(processor: Any, clips: Sequence[Clip], truncate: bool) -> torch.Tensor:
    """Log-mel features of clips, each a full window."""
    if processor.original_quirks and processor.release == "desta2":
        clips = [clip.at_rate(DETOUR) for clip in clips]
    return mel_features(processor.feature_extractor, clips, SHORTEST, truncate)[0]


def _turn_start(role: str) -> list[Segment]:
    """Header and line break of a turn, apart, since DeSTA2 put its vectors between them."""
    return [Segment(f"<|start_header_id|>{role}<|end_header_id|>", Role.TEMPLATE), Segment("\n\n", Role.TEMPLATE)]


def _turn(role: str, content: Segment) -> list[Segment]:
    return [*_turn_start(role), content, Segment("<|eot_id|>", Role.TEMPLATE)]


FAMILY = Desta()
