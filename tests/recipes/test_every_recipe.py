"""Every recipe runs on every model there is: one small experiment each, whose numbers are whole and finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import MODELS, TINY, open_model

import audio_lens_plugin as alp
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load
from audio_lens_plugin.prompts import Prompt, Sample

LABELS = alp.TRACKS["Animal"].labels


@pytest.fixture(scope="module", params=MODELS)
def lalm(request: pytest.FixtureRequest) -> LALM:
    """With eager attention, which every recipe takes."""
    lalm = open_model(request.param)
    if request.param in TINY:
        lalm.module.set_attn_implementation("eager")
        return load(lalm.module, lalm.processor)
    return load(request.param, attn_implementation="eager")


@pytest.fixture(scope="module")
def samples(lalm: LALM, clips: list) -> list[Sample]:
    """Two labels, two clips each, all different."""
    found = []
    for index in range(4):
        waveform = clips[1].waveform * (index + 1) / 4
        clip = replace(clips[1], waveform=waveform[: -(index + 1)], name=f"clip {index}")
        said = replace(clip, transcript="a word") if lalm.family.transcribes else clip
        prompt = Prompt((said,), question="What animal is it?", answer="The animal is", attribute="animal")
        found.append(Sample(clip.name, prompt, LABELS[index % 2]))
    return found


def whole(result, cells: int) -> None:
    assert len(result.cells) == len(result.scores) == cells
    assert torch.isfinite(result.scores.label_logits).all()
    assert len(result.to_frame()) == cells
    assert result.plot().axes


def test_patching(lalm: LALM, samples: list[Sample]) -> None:
    pairs = alp.pairs_from(samples, "embeddings")
    whole(alp.activation_patching(lalm, pairs, LABELS, positions=["audio", "all"]), 4 * 2 * lalm.n_layers)
    assert len(alp.attribution_patching(lalm, pairs, LABELS, ["audio", "last"]).cells) == 4 * 2 * lalm.n_layers


def test_knockout(lalm: LALM, samples: list[Sample]) -> None:
    for how in ("mask", "zero", "spread"):
        result = alp.attention_knockout(lalm, samples[:2], LABELS, "last", "audio", how=how)
        whole(result, 2 * 2 * lalm.n_layers)
    table = alp.knockout_table(lalm, samples[:1], LABELS, layers=[1])
    assert {"audio", "attribute"} <= set(table.cells["keys"])
    assert ("transcript" in set(table.cells["keys"])) == lalm.family.transcribes


def test_heads(lalm: LALM, samples: list[Sample]) -> None:
    result = alp.listening_heads(lalm, samples[:2], LABELS)
    whole(result, 2 * lalm.n_layers * lalm.n_heads)
    assert result.cells["mass"].between(0, 1).all()


def test_free_answers(lalm: LALM, samples: list[Sample]) -> None:
    result = alp.free_answers(lalm, samples, LABELS, new_tokens=2)
    assert result.samples["answer"].isin(LABELS).all()
    assert all(isinstance(text, str) for text in result.samples["said"])
    assert 0 <= result.accuracy <= 1


def test_enhancement_and_steering(lalm: LALM, samples: list[Sample]) -> None:
    result = alp.enhance_sweep(lalm, samples, LABELS, sources=[0, 1], coefficients=[1.0])
    whole(result, 2 * 2 * (lalm.n_layers - 1) + 2)
    assert result.held_out()["samples"].item() == 2
    grid = alp.enhance_grid(lalm, samples, LABELS, sources=[0, 1])
    assert len(grid.cells) == 4 * 2 * (lalm.n_layers - 1)
    assert alp.judged(grid, [sample.name for sample in samples]).held_out()["samples"].item() == 2
    direction = alp.audio_direction(lalm, samples[:2])
    whole(alp.steering_sweep(lalm, samples[2:], LABELS, direction, strengths=[0.0, 1.0]), 2 * 2 * lalm.n_layers)
