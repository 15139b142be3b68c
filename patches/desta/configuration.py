"""DeSTA's configuration: Whisper, a Q-Former, Llama, and which of its two releases it is."""

from __future__ import annotations

from typing import Any, ClassVar, no_type_check

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, WhisperConfig

# Outputs of the Whisper encoder that the connector reads, by the encoder's number of layers (tiny, small, medium,
# large-v3), each counted as "after this many layers"; 0 is what enters the first. DeSTA2 numbers transformers' tuple of
# hidden states, which begins with that input; DeSTA2.5 numbers the layers, so its published 7 is the output after 8.
TARGETS: dict[str, dict[int, tuple[int, ...]]] = {
    "desta2": {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (3, 7, 11, 15, 19, 23, 27, 31)},
    "desta2.5": {4: (1, 2, 3, 4), 12: (3, 6, 9, 12), 24: (6, 12, 18, 24), 32: (8, 16, 24, 32)},
}


@no_type_check  # transformers checks the fields, and passes more than these to __init__
class DestaConfig(PreTrainedConfig):
    """The whole model.

    Attributes:
        audio_config: Whisper, encoder and decoder.
        text_config: Llama.
        release: ``desta2`` or ``desta2.5``: whose prompt and transcription it follows.
        target_layers: encoder outputs that the connector reads, each after this many layers.
        prompt_size: vectors per clip, whatever its length.
        qformer_layers: layers of the Q-Former.
        qformer_intermediate_size: width of its MLP.
        audio_token_id: the placeholder that one vector takes in the text.
        transcription: Whisper's generation settings.
    """

    model_type = "desta"
    sub_configs: ClassVar[dict[str, type]] = {"audio_config": WhisperConfig, "text_config": LlamaConfig}

    audio_config: Any = None
    text_config: Any = None
    release: str = "desta2"
    target_layers: Any = None
    prompt_size: int = 64
    qformer_layers: int = 2
    qformer_intermediate_size: int = 3072
    audio_token_id: int = 128_092
    transcription: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.audio_config, PreTrainedConfig):
            self.audio_config = WhisperConfig(**(self.audio_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = LlamaConfig(**(self.text_config or {}))
        if self.target_layers is None:
            self.target_layers = list(published_targets(self.release, self.audio_config.encoder_layers))
        super().__post_init__(**kwargs)


def published_targets(release: str, encoder_layers: int) -> tuple[int, ...]:
    """The encoder outputs that a release reads, for a Whisper of this many encoder layers.

    Raises:
        ValueError: a release or a Whisper that was never published with DeSTA.
    """
    if release not in TARGETS or encoder_layers not in TARGETS[release]:
        raise ValueError(
            f"{release!r} with a Whisper of {encoder_layers} layers is no published DeSTA; give target_layers. Known: "
            f"{', '.join(TARGETS)}, with {', '.join(map(str, TARGETS['desta2']))} layers."
        )
    return TARGETS[release][encoder_layers]


AutoConfig.register(DestaConfig.model_type, DestaConfig, exist_ok=True)
