"""Heads that listen, against attention weights that transformers itself returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import MODELS, open_model

import audio_lens_plugin as alp
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.attention_knockout import attention_knockout
from audio_lens_plugin.recipes.cells import CellError
from audio_lens_plugin.recipes.listening_heads import HeadsResult, attention_mass, listening_heads
from audio_lens_plugin.spans import SpanError

WORDS = alp.TRACKS["Animal"].labels


@pytest.fixture(scope="module")
def eager() -> LALM:
    return alp.load("toy/qwen2-audio", attn_implementation="eager")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return alp.toy_clips("toy/qwen2-audio", "Animal").samples("open+is")[:3]


@pytest.fixture(scope="module")
def found(eager: LALM, samples: list[Sample]) -> HeadsResult:
    return listening_heads(eager, samples, WORDS, batch_size=2)


@pytest.mark.parametrize("name", MODELS)
def test_mass_is_that_of_the_models_own_weights(name: str, clips: list) -> None:
    lalm = open_model(name)
    lalm.module.set_attn_implementation("eager")
    batch = lalm.prompt(clips[:2], question="What is heard?", answer="It is a")
    with torch.no_grad():
        patterns = lalm.module(**lalm.inputs(batch), output_attentions=True, use_cache=False).attentions
    for queries in ("last", "question"):
        mass = attention_mass(lalm, batch, queries, "audio")
        assert mass.shape == (lalm.n_layers, 2, lalm.n_heads)
        for layer, pattern in enumerate(patterns):
            for row in range(2):
                reading, read = batch.at(queries).row(row), batch.at("audio").row(row)
                wanted = pattern[row][:, reading][:, :, read].sum(-1).mean(-1)
                torch.testing.assert_close(mass[layer, row], wanted, atol=1e-5, rtol=1e-5)


def test_a_head_attends_to_something(eager: LALM, samples: list[Sample]) -> None:
    """Shares of everything that a query can see add up to 1."""
    batch = eager.batch([sample.prompt for sample in samples])
    everything = attention_mass(eager, batch, "last", "all")
    torch.testing.assert_close(everything, torch.ones_like(everything), atol=1e-5, rtol=1e-5)
    parts = attention_mass(eager, batch, "last", "audio") + attention_mass(eager, batch, "last", "text")
    torch.testing.assert_close(parts, everything, atol=1e-5, rtol=1e-5)


def test_difference_is_clip_minus_silence(eager: LALM, samples: list[Sample], found: HeadsResult) -> None:
    masses = [
        torch.cat([attention_mass(eager, eager.batch([one.prompt])) for one in those], dim=1).mean(1)
        for those in (samples, [sample.silenced() for sample in samples])
    ]
    for line in found.ranked().itertuples():
        assert line.mass == pytest.approx(float(masses[0][line.layer, line.head]), abs=1e-5)
        difference = masses[0] - masses[1]
        assert line.difference == pytest.approx(float(difference[line.layer, line.head]), abs=1e-5)
    assert found.ranked()["difference"].abs().max() > 1e-3


def test_effect_is_the_knockout_of_this_head_alone(eager: LALM, samples: list[Sample], found: HeadsResult) -> None:
    table = found.ranked().set_index(["layer", "head"])
    for layer, head in [(0, 1), (3, 2)]:
        alone = attention_knockout(eager, samples, WORDS, window=1, layers=[layer], heads=[head], control=False)
        wanted = alone.effects().iloc[0]
        got = table.loc[(layer, head)]
        assert got["effect"] == pytest.approx(wanted["probability"], abs=1e-5)
        assert got["effect_low"] == pytest.approx(wanted["probability_low"], abs=1e-5)
    assert table["effect"].abs().max() > 1e-3


def test_ranks(found: HeadsResult, eager: LALM) -> None:
    assert len(found.ranked()) == eager.n_layers * eager.n_heads
    assert (np.diff(found.ranked("effect")["effect"]) >= 0).all()
    assert (np.diff(found.ranked("mass")["mass"]) <= 0).all()
    assert (np.diff(found.ranked("difference")["difference"]) <= 0).all()
    with pytest.raises(ValueError, match="effect, mass, difference"):
        found.ranked("loudness")


def test_saved_and_drawn(found: HeadsResult, tmp_path: Path) -> None:
    back = HeadsResult.load(found.save(tmp_path))
    assert back.ranked().equals(found.ranked())
    assert "most is lost without layer" in repr(back)
    for by in ("effect", "mass", "difference"):
        assert "last → audio" in back.plot(by).axes[0].get_title(loc="left")


def test_what_cannot_be_read_is_refused(toy: LALM, eager: LALM, samples: list[Sample]) -> None:
    with pytest.raises(CellError, match=r'load\(\.\.\., attn_implementation="eager"\)'):
        listening_heads(toy, samples, WORDS)
    with pytest.raises(SpanError, match="transcript"):
        listening_heads(eager, samples, WORDS, keys="transcript")
