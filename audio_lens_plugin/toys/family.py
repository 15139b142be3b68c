"""What the training stages ask of a toy, whatever its family. A further toy is one more class that offers this.

waveforms -- features --> features -- hear --> audio embeddings --+
token ids -- embed_tokens --> text embeddings --------------------+-- read --> hidden states -- unembed --> logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import ProcessorMixin

from audio_lens_plugin.patch import Family


class Toy(Protocol):
    """A model of one family at toy size, with its processor."""

    family: Family
    processor: ProcessorMixin
    model: nn.Module

    @property
    def hidden_size(self) -> int:
        """Width of the text stack and so of an audio embedding."""

    def save(self, folder: Path) -> None:
        """Write everything a user loads."""

    def hearing(self) -> nn.ModuleList:
        """What the first stage trains."""

    def reading(self) -> nn.ModuleList:
        """What the second stage trains."""

    def features(self, waveforms: list[np.ndarray], seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The audio part's input (clips, ..., window) for a window of `seconds`, and the used length of each clip."""

    def hear(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio embeddings (clips, positions, hidden), and how many of the positions belong to each clip."""

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of text tokens."""

    def read(self, embeddings: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The text stack's last hidden states for a batch of embedded, left-padded prompts."""

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of last hidden states."""
