"""What many tests share: the toy, clips that differ, and the optional real sample."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches for a hub
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load

torch.set_num_threads(1)  # on models this small, more threads only wait for each other

ROOT = Path(__file__).resolve().parent.parent
SAKURA = ROOT.parent / "shared" / "sakura_sample"


@pytest.fixture(scope="session")
def toy() -> LALM:
    return load("toy/qwen2-audio")


@pytest.fixture(scope="session")
def clips() -> list[Clip]:
    """Three noises of different length: 0.5, 1 and 2.5 seconds."""
    random = np.random.default_rng(0)
    return [
        Clip((0.1 * random.normal(size=size)).astype(np.float32), 16_000, f"noise_{size}")
        for size in (8_000, 16_000, 40_000)
    ]


@pytest.fixture(scope="session")
def sakura_sample() -> Path:
    if not SAKURA.is_dir():
        pytest.skip("the sample of real SAKURA clips is not on this machine (../shared/sakura_sample)")
    return SAKURA
