"""Voxtral: a Whisper encoder, four frames to one position, and a Llama language model.

    audio_encoder             model.audio_tower             Whisper; every clip fills windows of 30 s
    audio_encoder.blocks[i]   model.audio_tower.layers[i]
    audio_projector           model.multi_modal_projector   12.5 positions per second
    embed, blocks, ln_final   model.language_model....      audio positions are overwritten by the projector's output
    unembed                   lm_head

Source: transformers' `modeling_voxtral` and the paper (arXiv 2507.13264). The model hears the silence behind a clip,
too: a clip takes 375 positions however short it is, and since the tower attends to a whole window without a mask, those
after its end know of it, too. It can hear several windows; here a clip is one, and a longer one is refused. The
prompt is Mistral's instruction format; it has a system turn only where one is given.

The repos have their vocabulary in ``tekken.json`` alone. Mistral's own tokenizer tells no offsets of tokens; where its
library is missing, transformers reads the file, but leaves its special tokens unnamed. `mistral_processor` names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils import cached_file
from transformers.utils.versions import require_version

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import Family, Heard, Segment, check_placeholders, mel_features
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.spans import Role
from audio_lens_plugin.towers import WhisperTower

SHORTEST = 0.04  # seconds
FRAMES_PER_POSITION = 8  # mel frames of 10 ms: a stride-2 convolution, then four tower positions side by side


class _LlamaInsideAdapter(LlamaArchitectureAdapter):
    """TransformerLens's names for the Llama in Voxtral."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._reprefix_components("model.", "model.language_model.")
        self.components["audio_projector"] = GeneralizedComponent(name="model.multi_modal_projector")


class HookedVoxtralAdapter(WhisperTower, _LlamaInsideAdapter):
    """The Llama, the projector, and the Whisper encoder opened layer by layer."""


class Voxtral(Family):
    """Voxtral Mini and Small."""

    name = "voxtral"
    architectures = ("VoxtralForConditionalGeneration",)
    repo_ids = ("mistralai/Voxtral-Mini-3B-2507", "mistralai/Voxtral-Small-24B-2507")
    verified = "every named site against transformers' own class, on tiny random weights only; not Mistral's tokenizer"
    audio_token = "[AUDIO]"
    positions_per_second = 12.5

    def load_processor(self, source: str, revision: str | None) -> Any:
        return mistral_processor(source, revision)

    def model_class(self) -> type[PreTrainedModel]:
        return VoxtralForConditionalGeneration

    def adapter(self) -> type:
        return HookedVoxtralAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        segments = [Segment("<s>", Role.TEMPLATE)]
        if prompt.system:
            segments += [
                Segment("[SYSTEM_PROMPT]", Role.TEMPLATE),
                Segment(prompt.system, Role.SYSTEM),
                Segment("[/SYSTEM_PROMPT]", Role.TEMPLATE),
            ]
        segments += [Segment("[INST]", Role.TEMPLATE)]
        for _ in prompt.clips:
            segments += [Segment("[BEGIN_AUDIO]", Role.TEMPLATE), Segment(self.audio_token, Role.AUDIO)]
        segments += [Segment(prompt.words or "", Role.QUESTION), Segment("[/INST]", Role.TEMPLATE)]
        return [*segments, Segment(prompt.answer or "", Role.ANSWER)]

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        features, _ = mel_features(processor.feature_extractor, clips, SHORTEST, truncate)
        return Heard({"input_features": features}, (features.shape[-1] // FRAMES_PER_POSITION,) * len(clips))

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        features: Any = inputs.get("input_features")
        check_placeholders(
            inputs, module.config.audio_token_id, lambda: len(features) * (features.shape[-1] // FRAMES_PER_POSITION)
        )

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name == "input_features" else "embed"


def mistral_processor(source: str, revision: str | None) -> VoxtralProcessor:
    """The processor of a checkpoint, its vocabulary in a fast tokenizer that knows its special tokens.

    Raises:
        ImportError: transformers older than 5.16.
    """
    require_version("transformers>=5.16", "It reads the special tokens of Voxtral's tekken.json from 5.16 on.")
    try:  # by name: without a network, transformers looks for this file in folders alone
        vocabulary = os.path.dirname(cached_file(source, "tekken.json", revision=revision))
    except OSError:  # saved by transformers, in its own files
        vocabulary = source
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        vocabulary,
        revision=revision,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        add_bos_token=True,  # as Mistral's own does; TransformerLens would load a tokenizer without it once more
    )
    return VoxtralProcessor(WhisperFeatureExtractor.from_pretrained(source, revision=revision), tokenizer)


FAMILY = Voxtral()
