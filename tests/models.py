"""Every model that the shared tests run over: the toys on the shelf, and tiny random models of the other families."""

from __future__ import annotations

import importlib
import pkgutil

import tiny
import torch

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load, toys

TINY = [f"tiny/{info.name}" for info in pkgutil.iter_modules(tiny.__path__)]
MODELS = [*toys(), *TINY]


def for_several_clips(lalm: LALM) -> LALM:
    """The model with a prompt that holds several clips: DeSTA2's released one does not, its clean one does."""
    return load(lalm.name, prompt_style="clean") if "prompt_style" in lalm.family.options else lalm


def open_model(name: str, dtype: torch.dtype | None = None) -> LALM:
    """A toy as it ships, or a tiny model of random weights, the same ones in every run."""
    if name in toys():
        return load(name, dtype=dtype)
    torch.manual_seed(0)
    module, processor = importlib.import_module(name.replace("/", ".")).build()
    lalm = load(module.to(dtype or torch.float32), processor)
    lalm.name = name
    return lalm
