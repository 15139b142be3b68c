"""Numbers of the original Qwen-Audio and DeSTA2 code, and how ours are held to them.

What is committed is a sample: inputs and weights are whole, of every other tensor some elements are kept, evenly spread
over its real positions (see README.md). Where the full set lies beside the repository (../shared/golden), the same
tests run against every element of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
FULL = HERE.parent.parent.parent / "shared" / "golden"
SOURCES = ("committed", "full")


@dataclass(frozen=True)
class Golden:
    """One family's numbers.

    Attributes:
        config: configuration of the model that made them.
        cases: what is told of each case: texts, lengths, greedy tokens.
        weights: the model's weights under the original names.
        tensors: ``case/key``: inputs whole, the rest whole or sampled.
    """

    config: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]

    def get(self, case: str, key: str) -> torch.Tensor | None:
        """A whole tensor, an input; None where the case has none of this name."""
        return self.tensors.get(f"{case}/{key}")

    def keys(self, case: str) -> set[str]:
        """Everything that was recorded of a case."""
        return {name.split("/", 1)[1] for name in self.tensors if name.startswith(f"{case}/")}

    def check(self, case: str, key: str, found: torch.Tensor, tolerance: float) -> None:
        """Hold a tensor to the recorded one, at real positions."""
        wanted = self.tensors[f"{case}/{key}"]
        places = real_places(found, self.get(case, "attention_mask"))
        if wanted.numel() != found.numel():
            places = places[spread(len(places), len(wanted))]
        else:
            wanted = wanted.flatten()[places]
        difference = (found.flatten()[places].float() - wanted.float()).abs().max()
        assert float(difference) <= tolerance, f"{case}/{key}: largest difference {float(difference):.2e}"


def real_places(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Flat indices of the elements that stand at no padding: there numbers depend on the attention kernel."""
    places = torch.arange(tensor.numel())
    if mask is None or tensor.ndim < 3 or tensor.shape[:2] != mask.shape:
        return places
    real = mask.bool()[..., None].expand(*mask.shape, tensor[0, 0].numel())
    return places[real.flatten()]


def spread(count: int, kept: int) -> torch.Tensor:
    """``kept`` of ``count`` indices, evenly spread, the last one among them."""
    return torch.linspace(0, count - 1, kept).round().long()


@cache
def golden(family: str, source: str) -> Golden:
    """The numbers of ``qwen_audio`` or ``desta2``; skips where the full set is asked for and not there."""
    if source == "full" and not FULL.is_dir():
        pytest.skip("the full golden numbers are not beside this repository (../shared/golden)")
    folder = FULL / family if source == "full" else HERE / family
    told = json.loads((folder / "cases.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    weights, tensors = (load_file(folder / f"{name}.safetensors") for name in ("weights", "cases"))
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int16:
            tensors[name] = tensor.float() / 32_768
    return Golden(config, told["cases"], weights, tensors)
