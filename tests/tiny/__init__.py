"""Tiny models with random weights, one module per family that has no toy: ``build()`` gives module and processor."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel, __version__

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def enlivened(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights large enough that its input makes a difference; a fresh one hardly listens.

    What a block adds stays smaller than what goes through it, so that a position remains mostly about its own input.
    """
    adding = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 0.2 if name.endswith(adding) else 1.0
                parameter.normal_(std=scale / parameter[0].numel() ** 0.5)
    return model


def needs_transformers(version: str) -> None:
    """Skip where the family, too, refuses the installed transformers."""
    if Version(__version__) < Version(version):
        pytest.skip(f"this family needs transformers {version}, and says so")
