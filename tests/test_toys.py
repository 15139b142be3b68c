"""A toy listens: it answers most of its clips, fails on some, and silence costs it the answer.

The accuracies on all held-out clips are in the toy's model card; here the clips that ship with it are played.
"""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from audio_lens_plugin.datasets import toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load, toys
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.tracks import TRACKS

FORM = "open+is"


@pytest.fixture(scope="module", params=toys())
def lalm(request: pytest.FixtureRequest) -> LALM:
    return load(request.param)


@pytest.fixture(scope="module")
def results(lalm: LALM) -> dict:
    return {
        track: logit_lens(lalm, clips.samples(FORM), clips.track.labels)
        for track, clips in ((track, toy_clips(lalm.name, track)) for track in TRACKS)
    }


def test_a_toy_is_small_and_told_a_toy(lalm: LALM) -> None:
    folder = toys()[lalm.name]
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    clips = list((folder / "clips" / "audio").iterdir())
    assert 18 <= len(clips) <= 26
    assert sum(path.stat().st_size for path in clips) < 1_000_000
    card = (folder / "README.md").read_text()
    assert "toy" in card.lower()
    assert all(track in card for track in TRACKS)
    assert "silence" in card.lower()


def test_a_toys_weights_are_finite_and_single_precision(lalm: LALM) -> None:
    assert lalm.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in lalm.module.parameters())


def test_a_toy_answers_clearly_above_chance(results: dict) -> None:
    right = {track: result.accuracy for track, result in results.items()}
    for track, accuracy in right.items():
        assert accuracy > 1.3 / len(TRACKS[track].labels), right


def test_a_toy_fails_on_about_half_of_its_clips_in_something(lalm: LALM, results: dict) -> None:
    samples = pd.concat([result.samples for result in results.values()])
    wrong = samples.assign(wrong=samples["truth"] != samples["answer"]).groupby("sample")["wrong"].any()
    assert 0.3 <= wrong.mean() <= 0.7


def test_silence_costs_a_toy_the_answer(lalm: LALM) -> None:
    right = total = 0
    chance = 0.0
    for track in TRACKS:
        clips = toy_clips(lalm.name, track)
        silent = [sample.silenced() for sample in clips.samples(FORM)]
        accuracy = logit_lens(lalm, silent, clips.track.labels).accuracy
        right, total = right + accuracy * len(silent), total + len(silent)
        chance += len(silent) / len(clips.track.labels)
    # A constant answer is right on at most a fifth more of the clips than chance: the labels are varied, not balanced.
    assert right / total < chance / total + 0.2


def test_a_toys_answer_appears_in_its_deeper_layers(results: dict) -> None:
    for track, result in results.items():
        score = result.information()["score"].to_numpy()
        assert score[-1] > score[0], track
        assert result.critical_layer().layer is not None, track


def test_a_toy_says_its_answer_in_words(lalm: LALM) -> None:
    clips = toy_clips(lalm.name, "Animal")
    batch = lalm.batch([sample.prompt for sample in clips.samples(FORM)])
    answers = lalm.answer(batch, clips.track.labels, new_tokens=4)
    agreeing = [text.strip() == word for text, word in zip(answers.texts, answers.words, strict=True)]
    assert sum(agreeing) >= 0.75 * len(agreeing), "a drowned clip may get a word that is no animal"


def test_an_unknown_toy_or_track_is_refused() -> None:
    with pytest.raises(ValueError, match="tracks: Animal"):
        toy_clips("toy/qwen2-audio", "Weather")
