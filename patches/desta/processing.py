"""DeSTA's processor: Whisper's feature extractor and tokenizer, Llama's tokenizer, and which prompt is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

from tokenizers import AddedToken
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin, WhisperFeatureExtractor

from audio_lens_plugin.patches.desta.checkpoint import PUBLISHED
from audio_lens_plugin.patches.desta.configuration import DestaConfig

PLACEHOLDER = "<|reserved_special_token_87|>"
STYLES = ("released", "clean")


class DestaProcessor(ProcessorMixin):
    """What a prompt is made with.

    Attributes:
        release: ``desta2`` or ``desta2.5``.
        prompt_size: vectors per clip.
        prompt_style: of DeSTA2: ``released`` (as published, its slips included) or ``clean``.
        original_quirks: resample by way of 22,050 Hz, as DeSTA2's code does.
        audio_token: the placeholder that stands for one vector.
        audio_token_id: its id.
    """

    @no_type_check  # transformers reads this signature to know what to save
    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        whisper_tokenizer: Any = None,
        release: str = "desta2",
        prompt_size: int = 64,
        prompt_style: str = "released",
        original_quirks: bool = False,
    ) -> None:
        if prompt_style not in STYLES:
            raise ValueError(f"prompt_style is one of {', '.join(STYLES)}, not {prompt_style!r}.")
        self.release, self.prompt_size = release, prompt_size
        self.prompt_style, self.original_quirks = prompt_style, original_quirks
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if PLACEHOLDER not in tokenizer.get_vocab():  # Llama 3 has it; small tokenizers of tests and toys do not
            tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
        self.audio_token = PLACEHOLDER
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        super().__init__(feature_extractor, tokenizer, whisper_tokenizer)


AutoProcessor.register(DestaConfig, DestaProcessor, exist_ok=True)


def processor_from_published(fields: Mapping[str, Any], **kwargs: Any) -> DestaProcessor:
    """The processor of a published config.json, from the base models it names."""
    release, llama_field, whisper_field, _ = PUBLISHED[fields["model_type"]]
    return DestaProcessor(
        WhisperFeatureExtractor.from_pretrained(fields[whisper_field]),
        AutoTokenizer.from_pretrained(fields[llama_field]),
        AutoTokenizer.from_pretrained(fields[whisper_field]),
        release=release,
        prompt_size=fields["prompt_size"],
        **kwargs,
    )
