"""Activation patching: against whole passes with hooks, on every family; its sanity checks; its statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import MODELS, open_model
from naive import naive

from audio_lens_plugin.datasets import toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load, toys
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.recipes import cells as cells_room
from audio_lens_plugin.recipes.activation_patching import (
    PROJECTOR,
    SITES,
    TOWER,
    AttributionResult,
    PatchResult,
    activation_patching,
    attribution_patching,
    run_pairs,
)
from audio_lens_plugin.recipes.cells import WRITABLE, Cell, CellError, Write
from audio_lens_plugin.recipes.engine import labels_for
from audio_lens_plugin.recipes.pairs import AlignmentError, Pair, pairs_from
from audio_lens_plugin.tracks import TRACKS

LABELS = TRACKS["Animal"].labels
TOLERANCE = 1e-5


def noises(lalm: LALM, clips: list, lengths: tuple = (1, 2)) -> list[Pair]:
    """Pairs of a noise and the same noise backwards, for models of random weights."""
    pairs = []
    for index in lengths:
        clip = replace(clips[index], transcript="a word") if lalm.family.transcribes else clips[index]
        clean = Prompt((clip,), question="What animal is it?", answer="The animal is", attribute="animal")
        backwards = replace(clip, waveform=clip.waveform[::-1].copy(), name="backwards")
        pairs.append(Pair(clip.name, clean, replace(clean, clips=(backwards,)), LABELS[index], LABELS[0]))
    return pairs


@pytest.fixture(scope="module", params=toys())
def toy_pairs(request: pytest.FixtureRequest) -> tuple[LALM, list[Pair]]:
    samples = toy_clips(request.param, "Animal").samples("reversed+is+question")
    return load(request.param), pairs_from(samples, "embeddings", limit=4)


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_equals_a_whole_pass_with_a_hook(name: str, clips: list) -> None:
    lalm = open_model(name)
    pairs, layers = noises(lalm, clips), [0, lalm.n_layers - 1]
    sites = ("hook_resid_pre", "attn.hook_z", "hook_mlp_out")
    result = activation_patching(lalm, pairs, LABELS, sites, ("audio", "question", "last"), layers=layers)
    labels = labels_for(lalm, LABELS, [pairs[0].clean])
    donor, base = run_pairs(lalm, pairs, labels, [(layer, site) for layer in layers for site in sites])
    cells = []
    for line in result.cells.itertuples():
        cols = base.batch.at(line.position).row(line.sample)
        values = donor.at(line.site, line.layer)[line.sample, donor.batch.at(line.position).row(line.sample)]
        cells.append(Cell(line.sample, (Write(line.site, line.layer, cols, values),)))
    wanted = naive(lalm, base.batch, cells)
    torch.testing.assert_close(result.scores.label_logits, wanted[:, labels.first], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(result.baselines["clean"].label_logits, donor.scores.label_logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_ends_of_the_scale(name: str, clips: list) -> None:
    """All positions at layer 0, and all audio that the projector gives, are the clean run; itself is the corrupted."""
    lalm = open_model(name)
    pairs = noises(lalm, clips)
    sites = ("hook_resid_pre", "hook_resid_mid", PROJECTOR)
    result = activation_patching(lalm, pairs, LABELS, sites, ("all", "audio"), layers=[0])
    table = result.table().set_index(["site", "position"])["value"]
    assert table["hook_resid_pre", "all"] == pytest.approx(1, abs=1e-3)
    assert table[PROJECTOR, "audio"] == pytest.approx(1, abs=1e-3)  # the prompts differ in their audio alone
    clean = result.baselines["clean"].label_logits[result.cells["sample"].tolist()]
    whole = ((result.cells["site"] == "hook_resid_pre") & (result.cells["position"] == "all")).to_numpy()
    torch.testing.assert_close(result.scores.label_logits[whole], clean[whole], atol=TOLERANCE, rtol=TOLERANCE)
    assert result.scores.kl[whole].abs().max() < TOLERANCE  # held against the clean run
    apart = (result.baselines["corrupted"].label_logits - result.baselines["clean"].label_logits).abs()
    assert apart.max() > 10 * TOLERANCE


def test_a_self_patch_changes_nothing_at_any_site(toy_pairs: tuple[LALM, list[Pair]]) -> None:
    lalm, pairs = toy_pairs
    same = [replace(pair, corrupted=pair.clean, noise=0.0) for pair in pairs[:2]]
    result = activation_patching(lalm, same, LABELS, SITES, ("audio", "question", "last"))
    assert set(result.cells["site"]) == set(SITES)
    clean = result.baselines["clean"].label_logits[result.cells["sample"].tolist()]
    torch.testing.assert_close(result.scores.label_logits, clean, atol=TOLERANCE, rtol=TOLERANCE)


def test_another_clip_changes_the_output_at_every_site(toy_pairs: tuple[LALM, list[Pair]]) -> None:
    lalm, pairs = toy_pairs
    if lalm.family.transcribes:
        pairs = [replace(pair, corrupted=pair.clean, noise=3.0) for pair in pairs]
    other = [
        replace(pair, noise=0.0, corrupted=replace(pair.clean, clips=pairs[i - 1].clean.clips))
        for i, pair in enumerate(pairs)
    ]
    result = activation_patching(lalm, other, LABELS, SITES, ("audio",), how="resample", layers=[1])
    moved = (result.scores.label_logits - result.baselines["corrupted"].label_logits[result.cells["sample"]]).abs()
    by_site = moved.max(-1).values.reshape(len(other), -1).amax(0)
    assert (by_site > 1e-4).all() or lalm.n_layers == 2, dict(
        zip(result.cells["site"].unique(), by_site.tolist(), strict=True)
    )


def test_denoising_and_noising_are_read_on_one_scale(toy_pairs: tuple[LALM, list[Pair]]) -> None:
    lalm, pairs = toy_pairs
    there, back = (
        activation_patching(lalm, pairs, LABELS, positions=("audio", "last"), direction=direction)
        for direction in ("denoise", "noise")
    )
    for result, start, end in ((there, 0, 1), (back, 1, 0)):
        value = result.table().set_index(["position", "layer"])["value"]
        assert value["audio", 0] == pytest.approx(end, abs=1e-3)
        assert value["audio", lalm.n_layers - 1] == pytest.approx(start, abs=0.2)
        assert value["last", 0] == pytest.approx(start, abs=1e-3)  # the last token alone knows nothing yet
        assert value["last", lalm.n_layers - 1] == pytest.approx(end, abs=0.3)
    with pytest.raises(ValueError, match="grounding needs"):
        there.grounding()


def test_grounding_is_one_at_the_audio_and_fades(toy_pairs: tuple[LALM, list[Pair]]) -> None:
    lalm, pairs = toy_pairs
    table = activation_patching(lalm, pairs, LABELS, positions=("audio", "all")).grounding()
    assert table["value"].iloc[0] == pytest.approx(1, abs=1e-3)
    assert table["value"].iloc[-1] < 0.3
    assert (table["low"] <= table["high"]).all()
    noised = activation_patching(lalm, pairs[:1], LABELS, positions=("audio", "all"), layers=[0], direction="noise")
    with pytest.raises(ValueError, match="grounding needs denoising"):
        noised.grounding()


def test_single_heads_and_neurons(toy: LALM) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is"), "silence", limit=2)
    result = activation_patching(
        toy, pairs, LABELS, ("attn.hook_z", "attn.hook_k"), ("last",), layers=[3], units="each"
    )
    heads, kv_heads = toy.n_heads, toy.module.config.get_text_config().num_key_value_heads
    counted = result.cells.groupby("site")["unit"].nunique()
    assert counted.to_dict() == {"attn.hook_z": heads, "attn.hook_k": kv_heads}
    neurons = activation_patching(toy, pairs, LABELS, ("mlp.hook_post",), ("last",), layers=[3], units=[0, 5])
    assert neurons.cells["unit"].tolist() == [0, 5] * 2
    whole = activation_patching(toy, pairs, LABELS, ("attn.hook_z",), ("last",), layers=[3])
    assert whole.cells["unit"].isna().all()


def test_every_position_alone(toy: LALM) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is"), "silence", limit=1)
    result = activation_patching(toy, pairs, LABELS, positions=("every",), layers=[0, 2])
    real = int(toy.batch([pairs[0].clean]).inputs["attention_mask"].sum())
    assert result.cells["index"].tolist() == sorted([*range(real)] * 2)
    heard = result.cells[result.cells["position"] == "audio[0]"]
    assert heard["end"].max() == pytest.approx(pairs[0].clean.clips[0].seconds, abs=0.05)
    assert result.table()["value"].notna().all()


def test_clips_of_different_length_are_aligned_or_refused(toy: LALM, clips: list) -> None:
    pair = noises(toy, clips, (1,))[0]
    longer = replace(pair, corrupted=replace(pair.corrupted, clips=(clips[2],)))
    for site in ("hook_resid_pre", TOWER):
        with pytest.raises(AlignmentError, match="how='pool', 'crop' or 'resample'"):
            activation_patching(toy, [longer], LABELS, (site,), ("audio",), layers=[0])
        for how in ("pool", "crop", "resample"):
            result = activation_patching(toy, [longer], LABELS, (site,), ("audio",), layers=[0], how=how)
            assert result.scores.label_logits.isfinite().all()


def test_a_stretch_of_seconds_is_patched_in_tower_and_text_model(toy: LALM) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is"), "silence", limit=2)
    names = ("audio@0.0-0.2", "audio")
    table = activation_patching(toy, pairs, LABELS, (TOWER, "hook_resid_pre"), names, layers=[0]).table()
    part, whole = (table[table["position"] == name]["value"].to_numpy() for name in names)
    assert (np.abs(part - whole) > 1e-3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["hook_nothing"]}, "cannot be patched; sites are"),
        ({"layers": [99]}, "has no layer 99"),
        ({"units": "each"}, "has no heads or neurons"),
        ({"sites": ["attn.hook_z"], "units": [77]}, "has no unit 77"),
        ({"sites": ["mlp.hook_post"], "units": "each"}, "say which ones"),
        ({"sites": [TOWER], "positions": ["question"]}, "ask for 'audio'"),
    ],
)
def test_impossible_places_are_refused(toy: LALM, clips: list, arguments: dict, message: str) -> None:
    with pytest.raises(CellError, match=message):
        activation_patching(toy, noises(toy, clips, (1,)), LABELS, **arguments)


def test_it_goes_on_from_what_was_finished(toy: LALM, tmp_path, monkeypatch) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is+question"), "silence", limit=3)
    run = dict(positions=("audio", "question", "last"), batch_size=2)
    straight = activation_patching(toy, pairs, LABELS, **run)
    real, count = cells_room._run_wave, []

    def dies(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return real(*args)

    monkeypatch.setattr(cells_room, "_run_wave", dies)
    with pytest.raises(KeyboardInterrupt):
        activation_patching(toy, pairs, LABELS, folder=tmp_path, **run)
    monkeypatch.setattr(cells_room, "_run_wave", lambda *args: count.append(1) or real(*args))
    resumed = activation_patching(toy, pairs, LABELS, folder=tmp_path, **run)
    first = len(count)
    again = activation_patching(toy, pairs, LABELS, folder=tmp_path, **run)
    assert len(count) == first  # nothing ran
    for result in (resumed, again):
        assert torch.equal(result.scores.label_logits, straight.scores.label_logits)
        assert result.cells.equals(straight.cells)
    assert not list(tmp_path.glob("*.desk"))
    result = PatchResult.load(resumed.save(tmp_path / "saved"))
    assert result.table().equals(resumed.table())


def test_out_of_memory_halves_the_wave_and_goes_on(toy: LALM, monkeypatch) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is"), "silence", limit=1)
    straight = activation_patching(toy, pairs, LABELS, positions=("audio", "last"))
    real, sizes = cells_room._run_wave, []

    def short_of_memory(lalm, run, wave, *rest):
        if len(wave) > 3:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(wave))
        return real(lalm, run, wave, *rest)

    monkeypatch.setattr(cells_room, "_run_wave", short_of_memory)
    halved = activation_patching(toy, pairs, LABELS, positions=("audio", "last"))
    assert max(sizes) <= 3
    assert sum(sizes) == len(halved.cells)
    torch.testing.assert_close(halved.scores.label_logits, straight.scores.label_logits, atol=1e-5, rtol=1e-5)


def test_attribution_is_the_gradient_times_the_change(toy_pairs: tuple[LALM, list[Pair]]) -> None:
    """Against finite differences: a small step towards the clean state moves the logit difference by the estimate."""
    lalm, pairs = toy_pairs
    pairs = [replace(pair, noise=0.5, foil=LABELS[(LABELS.index(pair.label) + 1) % len(LABELS)]) for pair in pairs[:2]]
    estimates = attribution_patching(lalm, pairs, LABELS, ("audio", "last")).cells
    labels = labels_for(lalm, LABELS, [pairs[0].clean])
    clean, corrupted = run_pairs(lalm, pairs, labels)
    step, cells = 0.02, []
    for line in estimates.itertuples():
        cols = corrupted.batch.at(line.position).row(line.sample)
        at = corrupted.states[line.layer][line.sample, cols]
        values = at + step * (clean.states[line.layer][line.sample, cols] - at)
        cells.append(Cell(line.sample, (Write("hook_resid_pre", line.layer, cols, values),)))
    moved = cells_room.run_cells(lalm, corrupted, cells, labels.first).label_logits.double()
    still = corrupted.scores.label_logits.double()[estimates["sample"].to_numpy()]
    truth, foil = (
        torch.tensor([labels.index(getattr(pairs[row], which)) for row in estimates["sample"]])
        for which in ("label", "foil")
    )
    gained = (moved - still).gather(1, truth[:, None]) - (moved - still).gather(1, foil[:, None])
    found = estimates["estimate"].to_numpy()
    assert np.corrcoef(found, gained[:, 0].numpy() / step)[0, 1] > 0.98


def test_attribution_agrees_with_patching_where_the_model_is_nearly_linear(toy_pairs, tmp_path) -> None:
    lalm, pairs = toy_pairs
    pairs = [replace(pair, noise=0.05) for pair in pairs]
    exact = activation_patching(lalm, pairs, LABELS, positions=("audio", "last"))
    estimated = attribution_patching(lalm, pairs, LABELS, ("audio", "last"), folder=tmp_path / "parts", batch_size=2)
    agreement = estimated.agreement(exact)
    overall = agreement[agreement["layer"].isna()].iloc[0]
    assert overall["cells"] == len(exact.cells)
    assert overall["pearson"] > 0.95
    assert AttributionResult.load(estimated.save(tmp_path / "saved")).cells.equals(estimated.cells)
    with pytest.raises(ValueError, match="agreement needs denoising"):
        estimated.agreement(activation_patching(lalm, pairs, LABELS, positions=("last",), direction="noise"))


def test_sites_are_all_that_can_be_written() -> None:
    assert set(SITES) - {TOWER, PROJECTOR} == set(WRITABLE)
