"""Qwen2.5-Omni's thinker: an audio tower of short windows, and a Qwen2.5 language model. Its talker is not loaded.

    audio_encoder             model.audio_tower         50 frames per second in windows of 2 s, pooled to 25 positions
    audio_encoder.blocks[i]   model.audio_tower.layers[i]
    audio_projector           model.audio_tower.proj
    embed, blocks, ln_final   model.language_model....  audio positions are overwritten by the projector's output
    unembed                   lm_head

Source: transformers' `modeling_qwen2_5_omni` and the technical report (arXiv 2503.20215). What will surprise: the tower
lays the frames of all clips of a batch end to end, so activations in it have no batch axis, ``[frames, width]``; its
attention gives a tensor, and its blocks give a tuple of one. The positions of a prompt without pictures are plain ones:
TMRoPE counts a position of audio as it counts a word.

A repo holds the whole model; of its weights, transformers' thinker class takes its own. Its processor also sees, which
needs torchvision; `Processor` is the rest of it. Before transformers 5.21 the thinker's modules lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge.generalized_components import BlockBridge, LinearBridge, SymbolicBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.qwen2 import Qwen2ArchitectureAdapter
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.utils.versions import require_version

from audio_lens_plugin.patch import QUESTION_MARK, SYSTEM_MARK, Loaded, PooledEars, Segment, from_chat_template
from audio_lens_plugin.prompts import Prompt

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)


class HookedQwen2_5OmniAdapter(Qwen2ArchitectureAdapter):
    """TransformerLens's names for the Qwen2.5 in the thinker, and its audio tower opened layer by layer."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._reprefix_components("model.", "model.language_model.")
        attention = GeneralizedComponent(
            name="self_attn",
            submodules={
                "q": LinearBridge(name="q_proj"),
                "k": LinearBridge(name="k_proj"),
                "v": LinearBridge(name="v_proj"),
                "o": LinearBridge(name="out_proj"),
            },
        )
        blocks = BlockBridge(
            name="layers",
            config=cfg,
            hook_alias_overrides={"hook_mlp_out": "mlp.out.hook_out"},
            submodules={
                "ln1": GeneralizedComponent(name="self_attn_layer_norm"),
                "attn": attention,
                "ln2": GeneralizedComponent(name="final_layer_norm"),
                "mlp": SymbolicBridge(submodules={"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}),
            },
        )
        for alias in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            del blocks.hook_aliases[alias]  # inputs of single heads, which only TransformerLens's own attention has
        self.components["audio_encoder"] = GeneralizedComponent(name="model.audio_tower", submodules={"blocks": blocks})
        self.components["audio_projector"] = GeneralizedComponent(name="model.audio_tower.proj")


@dataclass(frozen=True)
class Processor:
    """Ears and words of the published processor.

    Attributes:
        feature_extractor: Whisper's; its window is 300 s.
        tokenizer: Qwen's, with the audio tokens.
        chat_template: the processor's; the tokenizer's own if None.
    """

    feature_extractor: Any
    tokenizer: Any
    chat_template: str | None = None

    def apply_chat_template(self, messages: Sequence[Any], **kwargs: Any) -> str:
        """The conversation as text."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)


class Qwen2_5Omni(PooledEars):
    """The thinker of Qwen2.5-Omni."""

    name = "qwen2_5_omni"
    architectures = (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniModel",
    )
    repo_ids = ("Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B")
    verified = "every named site against transformers' own class on tiny random weights; no real weights, no toy"
    audio_token = "<|AUDIO|>"

    def load(self, source: str, revision: str | None, **kwargs: Any) -> Loaded:
        """Load the thinker.

        Raises:
            ImportError: transformers older than 5.21.
        """
        require_version("transformers>=5.21", "Its Qwen2.5-Omni has the modules that this library names from 5.21 on.")
        return super().load(source, revision, **kwargs)

    def load_processor(self, source: str, revision: str | None) -> Any:
        return ears_and_words(source, revision)

    def model_class(self) -> type[PreTrainedModel]:
        return Qwen2_5OmniThinkerForConditionalGeneration

    def adapter(self) -> type:
        return HookedQwen2_5OmniAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        turn: list[dict[str, str]] = [{"type": "audio", "audio": clip.name} for clip in prompt.clips]
        turn += [{"type": "text", "text": QUESTION_MARK}] if prompt.words else []
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_MARK}]}
        messages = [system, {"role": "user", "content": turn}]
        return from_chat_template(processor, prompt, self.audio_token, SYSTEM, messages)


def ears_and_words(source: str, revision: str | None) -> Processor:
    """The processor of a checkpoint without its eyes."""
    published, _ = Qwen2_5OmniProcessor.get_processor_dict(source, revision=revision)
    return Processor(
        WhisperFeatureExtractor.from_pretrained(source, revision=revision),
        AutoTokenizer.from_pretrained(source, revision=revision),
        published.get("chat_template"),
    )


FAMILY = Qwen2_5Omni()
