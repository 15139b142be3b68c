"""Directions and steering against passes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive import naive

import audio_lens_plugin as alp
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes import steering
from audio_lens_plugin.recipes.cells import Cell, CellError, Write
from audio_lens_plugin.recipes.steering import Direction, SteeringResult, audio_direction, steered, steering_sweep
from audio_lens_plugin.results import ResultError

TOLERANCE = 1e-5
LABELS = alp.TRACKS["Emotion"].labels


@pytest.fixture(scope="module", params=alp.loading.toys())
def lalm(request: pytest.FixtureRequest) -> LALM:
    return alp.load(request.param)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(alp.toy_clips("toy/qwen2-audio", "Emotion").samples("open+is"))[:6]


@pytest.fixture(scope="module")
def direction(lalm: LALM, samples: list) -> Direction:
    return audio_direction(lalm, samples[:4], batch_size=3)


def residuals(lalm: LALM, sample: Sample, position: str) -> torch.Tensor:
    """What leaves every block of one sample's own pass, averaged over the positions: ``[layers, d_model]``."""
    batch, twin, seen = lalm.batch([sample.prompt]), weight_sharing_twin(lalm.module), []
    for block in twin.get_decoder().layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0, batch.at(position).cols].mean(0)))
    with torch.no_grad():
        twin(**lalm.inputs(batch), use_cache=False)
    return torch.stack(seen)


@pytest.mark.parametrize("position", ["last", "audio"])
def test_a_direction_is_clip_minus_silence(lalm: LALM, samples: list, position: str) -> None:
    found = audio_direction(lalm, samples[:4], position=position, batch_size=3)  # batches of 3 and of 1
    alone = [residuals(lalm, s, position) - residuals(lalm, s.silenced(), position) for s in samples[:4]]
    torch.testing.assert_close(found.vectors, torch.stack(alone).mean(0), atol=TOLERANCE, rtol=TOLERANCE)
    assert found.vectors.norm(dim=-1).min() > 1e-3
    assert len(found.clips) == 4


def test_a_direction_is_saved_and_told_apart(lalm: LALM, samples: list, direction: Direction, tmp_path: Path) -> None:
    back = Direction.load(direction.save(tmp_path))
    assert torch.equal(back.vectors, direction.vectors)
    assert (back.header, back.clips, back.fingerprint) == (direction.header, direction.clips, direction.fingerprint)
    assert replace(direction, vectors=direction.vectors + 1e-3).fingerprint != direction.fingerprint
    assert direction.fingerprint in repr(direction)


def test_every_cell_equals_a_whole_pass(lalm: LALM, samples: list, direction: Direction) -> None:
    layers, strengths = [0, 4, 7], [-2.0, 0.0, 1.5]
    found = steering_sweep(
        lalm, samples[3:], LABELS, direction, layers=layers, strengths=strengths, position="attribute"
    )
    batch = lalm.batch([sample.prompt for sample in samples[3:]])
    cells = []
    for row, layer, strength in found.cells[["sample", "layer", "strength"]].itertuples(index=False):
        cols = batch.at("attribute").row(row)
        added = strength * direction.vectors[layer].expand(len(cols), -1)
        cells.append(Cell(row, (Write("hook_resid_post", layer, cols, added, keep=1.0),)))
    wanted = naive(lalm, batch, cells)[:, lalm.labels(LABELS).first]
    assert len(cells) == 3 * 3 * 3
    torch.testing.assert_close(found.scores.label_logits, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    clean = found.baselines["clean"].label_logits.repeat_interleave(9, 0)
    moved = ((found.cells["strength"] != 0) & (found.cells["layer"] == 4)).tolist()
    assert ((wanted - clean).abs().amax(1)[moved] > 1e-4).all()


def test_strength_0_is_nothing_at_all(lalm: LALM, samples: list, direction: Direction) -> None:
    found = steering_sweep(lalm, samples, LABELS, direction, strengths=[0.0, 1.0])
    still = (found.cells["strength"] == 0).to_numpy().copy()
    clean = found.baselines["clean"]
    where = found.cells["sample"].to_numpy()[still]
    assert torch.equal(found.scores.label_logits[still], clean.label_logits[where])
    assert torch.equal(found.scores.ranks[still], clean.ranks[where])
    assert (found.scores.kl[still] == 0).all()
    effects = found.effects()
    assert (effects[effects["strength"] == 0][["probability", "accuracy"]] == 0).all(axis=None)
    alone = steering_sweep(lalm, samples, LABELS, direction, strengths=[0.0])
    assert torch.equal(alone.scores.label_logits, found.scores.label_logits[still])


def test_effects_are_cell_minus_clean(toy: LALM, samples: list) -> None:
    found = steering_sweep(
        toy, samples, LABELS, audio_direction(toy, samples[:3]), layers=[2, 5], strengths=[-1.0, 2.0]
    )
    line = found.effects().set_index(["layer", "strength"]).loc[(5, 2.0)]
    mine = ((found.cells["layer"] == 5) & (found.cells["strength"] == 2.0)).to_numpy()
    truth = [LABELS.index(word) for word in found.samples["truth"]]
    for name, of in (("probability", lambda one: one.log_probs[range(6), truth].exp()), ("accuracy", _right(truth))):
        cells = type(found.scores)(**{key: value[mine] for key, value in vars(found.scores).items()})
        change = (of(cells) - of(found.baselines["clean"])).mean()
        assert line[name] == pytest.approx(float(change), abs=1e-6)
        assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]
    assert line["samples"] == 6
    assert found.header.options["shared"] == 3


def _right(truth: list[int]):
    return lambda one: (one.label_logits.argmax(-1) == torch.tensor(truth)).float()


def test_a_steered_model_answers_and_writes_so(lalm: LALM, samples: list, direction: Direction) -> None:
    batch = lalm.batch([sample.prompt for sample in samples[4:]])
    found = steering_sweep(lalm, samples[4:], LABELS, direction, layers=[3], strengths=[2.0])
    with steered(lalm, batch, direction, 3, 2.0) as edited:
        answers = edited.answer(batch, LABELS)
        made = edited.generate(
            batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(answers.log_probs, found.scores.log_probs, atol=TOLERANCE, rtol=TOLERANCE)
    first = made.logits[0][:, lalm.labels(LABELS).first]
    torch.testing.assert_close(first, found.scores.label_logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_sweep_is_kept_under_its_direction(
    toy: LALM, samples: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = audio_direction(toy, samples, folder=tmp_path / "direction")
    settings = dict(layers=[2], strengths=[0.0, 1.0], folder=tmp_path / "parts", batch_size=4)
    found = steering_sweep(toy, samples, LABELS, direction, **settings)
    assert found.header.options["fingerprint"] == direction.fingerprint
    back = SteeringResult.load(found.save(tmp_path / "saved"))
    assert back.effects().equals(found.effects())
    assert found.plot().axes[0].get_xlabel().startswith("layer")
    for name in ("store", "_states"):
        monkeypatch.setattr(steering, name, lambda *args, **kwargs: pytest.fail("computed again"))
    assert audio_direction(toy, samples, folder=tmp_path / "direction").fingerprint == direction.fingerprint
    again = steering_sweep(toy, samples, LABELS, direction, **settings)
    assert torch.equal(again.scores.label_logits, found.scores.label_logits)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        steering_sweep(toy, samples, LABELS, replace(direction, vectors=2 * direction.vectors), **settings)


def test_what_cannot_be_steered_is_refused(toy: LALM, samples: list) -> None:
    direction = audio_direction(toy, samples[:2])
    with pytest.raises(CellError, match="layers 0 to 7"):
        steering_sweep(toy, samples, LABELS, direction, layers=[8])
    other = replace(direction, header=replace(direction.header, weights="others"))
    with pytest.raises(ResultError, match="other weights"):
        steering_sweep(toy, samples, LABELS, other)
    mute = Sample("mute", alp.Prompt(question="What is it?", answer="It is"), "sad")
    with pytest.raises(CellError, match=r"without a clip.*mute"):
        audio_direction(toy, [samples[0], mute])
