"""A toy, whatever its family: the real classes with small numbers, and what the training stages ask of them.

waveforms -- features --> features -- hear --> audio embeddings --+
token ids -- embed_tokens --> text embeddings --------------------+-- read --> hidden states -- unembed --> logits

All families keep their parts at the same places (`model.language_model`, `model.multi_modal_projector`, `lm_head`), so
a further toy says only how it is built and how it hears.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from audio_lens_plugin.patch import Family
from audio_lens_plugin.toy_shelf.sounds import LabelledSound

MEL_BINS = 40
WINDOW_SECONDS = 6
FRAMES_PER_SECOND = 100
POSITIONS_PER_SECOND = 50  # of a Whisper-style tower, before anything is pooled


class Toy(ABC):
    """A model of one family at toy size, with its processor.

    Class attributes:
        family: the family it belongs to.
        about: what it is made of, for its card.
        history: what else is to be told of its making, for its card.
        turn_end: the token that closes the assistant's turn.
    """

    family: ClassVar[Family]
    about: ClassVar[str]
    turn_end: ClassVar[str]
    history: ClassVar[str] = ""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor = processor
        self.model = model

    @classmethod
    @abstractmethod
    def untrained(cls) -> Self:
        """A toy before its training."""

    @abstractmethod
    def hearing(self) -> nn.ModuleList:
        """What the first stage trains."""

    @abstractmethod
    def features(self, waveforms: list[np.ndarray], seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The audio part's input (clips, ..., window) for a window of `seconds`, and the used length of each clip."""

    @abstractmethod
    def hear(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio embeddings (clips, positions, hidden), and how many of the positions belong to each clip."""

    def transcript(self, labels: Mapping[str, str]) -> str | None:
        """What the model reads beside the clip; None where the family reads nothing."""
        return None

    def finished(self, sounds: Sequence[LabelledSound], seed: int) -> Self:
        """The toy, once it has learned what its family needs beyond hearing and reading: in most, nothing."""
        return self

    @property
    def hidden_size(self) -> int:
        """Width of the text stack and so of an audio embedding."""
        return self.model.config.text_config.hidden_size

    def save(self, folder: Path) -> None:
        """Write processor and model; the weights as half-precision numbers, which load as single-precision ones."""
        self.processor.save_pretrained(folder)
        copy.deepcopy(self.model).half().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))

    def reading(self) -> nn.ModuleList:
        """What the second stage trains."""
        return nn.ModuleList([self.model.model.language_model, self.model.lm_head])

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of text tokens."""
        return self.model.get_input_embeddings()(ids)

    def read(self, embeddings: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The text stack's last hidden states for a batch of embedded, left-padded prompts."""
        stack = self.model.model.language_model
        return stack(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of last hidden states."""
        return self.model.lm_head(hidden)
