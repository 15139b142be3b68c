"""Pairs differ in what was asked for and in nothing else; positions are matched by what they are, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.datasets import toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load
from audio_lens_plugin.prompts import Prompt, PromptBatch, Sample
from audio_lens_plugin.recipes.pairs import KINDS, AlignmentError, Pair, align, pairs_from
from audio_lens_plugin.spans import Positions, Role, RowText, SpanError

RATE = 16_000
QUESTION = "What animal makes the sound?"
OTHER_QUESTION = "Who speaks?"


def sample(name: str, label: str, *seconds: float, question: str | None = QUESTION, transcript: str | None = None):
    """A sample whose clips are noises that no other sample has."""
    random = np.random.default_rng(list(name.encode()))
    clips = tuple(
        Clip((0.1 * random.normal(size=int(RATE * long))).astype(np.float32), RATE, name, transcript)
        for long in seconds
    )
    return Sample(name, Prompt(clips, question, answer="The animal is", attribute="animal"), label)


SAMPLES = [
    sample("a", "dog", 1.0, transcript="woof"),
    sample("b", "dog", 1.01),
    sample("c", "cat", 0.5, transcript="meow"),
    sample("d", "cow", 1.1),
    sample("e", "cat", 2.0),
]


def heard(pair: Pair) -> list[str]:
    return [clip.name for clip in pair.corrupted.clips]


def without_clips(prompt: Prompt) -> Prompt:
    return replace(prompt, clips=())


def pairs(kind: str, samples: list[Sample] = SAMPLES, **options) -> list[Pair]:
    return pairs_from(samples, kind, **({"question": OTHER_QUESTION} if kind == "question" else {}), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_side_is_the_sample_itself(kind: str) -> None:
    made = pairs(kind)
    assert [(pair.name, pair.clean, pair.label) for pair in made] == [(s.name, s.prompt, s.label) for s in SAMPLES]


@pytest.mark.parametrize("kind", ["other", "silence", "noise"])
def test_corrupted_audio_leaves_the_words_alone(kind: str) -> None:
    for pair in pairs(kind):
        assert pair.corrupted.clips != pair.clean.clips
        assert without_clips(pair.corrupted) == without_clips(pair.clean)
        assert pair.noise == 0


def test_the_other_clip_has_another_label_and_the_nearest_duration() -> None:
    assert [heard(pair) for pair in pairs("other")] == [["d"], ["d"], ["a"], ["b"], ["d"]]


def test_the_foil_is_the_label_of_the_other_clip() -> None:
    assert [pair.foil for pair in pairs("other")] == ["cow", "cow", "dog", "dog", "cow"]


@pytest.mark.parametrize("kind", ["silence", "noise", "embeddings", "question"])
def test_where_nothing_else_is_right_there_is_no_foil(kind: str) -> None:
    assert {pair.foil for pair in pairs(kind)} == {None}


def test_another_spelling_is_no_other_label() -> None:
    near, far = sample("b", " DOG", 1.0), sample("c", "cat", 3.0)
    assert heard(pairs("other", [sample("a", "dog", 1.0), near, far])[0]) == ["c"]


def test_prompts_of_several_clips_are_paired_clip_for_clip() -> None:
    crossed, close = sample("b", "cat", 2.0, 1.0), sample("c", "cat", 1.2, 2.2)
    samples = [sample("a", "dog", 1.0, 2.0), crossed, close, sample("d", "cat", 1.0)]
    assert heard(pairs("other", samples, limit=1)[0]) == ["c", "c"]


def test_among_clips_of_equal_length_the_seed_chooses() -> None:
    samples = [sample("a", "dog", 1.0), *[sample(f"cat {place}", "cat", 1.0) for place in range(8)]]
    chosen = {heard(pairs("other", samples, limit=1, seed=seed)[0])[0] for seed in range(20)}
    assert len(chosen) > 2
    assert len({heard(pairs("other", samples, limit=1, seed=3)[0])[0] for _ in range(5)}) == 1


def test_a_limit_leaves_all_samples_to_choose_the_other_clip_from() -> None:
    assert pairs("other", limit=2) == pairs("other")[:2]


def test_silence_is_as_long_as_the_clip_and_says_nothing() -> None:
    for pair in pairs("silence"):
        (clean,), (silent,) = pair.clean.clips, pair.corrupted.clips
        assert silent.seconds == clean.seconds
        assert not silent.waveform.any()
        assert silent.transcript is None


@settings(deadline=None)
@given(snr=st.floats(-30, 30))
def test_noise_has_the_asked_for_power(snr: float) -> None:
    (pair,) = pairs("noise", SAMPLES[:1], snr=snr)
    (clean,), (noisy,) = pair.clean.clips, pair.corrupted.clips
    added = noisy.waveform.astype(np.float64) - clean.waveform
    signal = np.square(clean.waveform.astype(np.float64)).mean()
    assert 10 * np.log10(signal / np.square(added).mean()) == pytest.approx(snr, abs=0.01)


def test_noise_is_white_and_takes_a_given_transcript_away() -> None:
    (pair,) = pairs("noise", SAMPLES[:1])
    (clean,), (noisy,) = pair.clean.clips, pair.corrupted.clips
    power = np.abs(np.fft.rfft(noisy.waveform.astype(np.float64) - clean.waveform)) ** 2
    bands = [band.mean() for band in np.array_split(power, 8)]
    assert max(bands) / min(bands) < 1.3
    assert noisy.transcript is None


def test_noise_repeats_with_its_seed_and_differs_between_pairs_and_seeds() -> None:
    assert pairs("noise") == pairs("noise")
    same = [sample("a", "dog", 1.0)] * 2
    first, second = (pair.corrupted for pair in pairs("noise", same))
    assert first != second
    assert first != pairs("noise", same, seed=1)[0].corrupted


def test_noise_on_the_embeddings_is_left_to_the_recipe() -> None:
    made = pairs("embeddings", noise=2.5)
    assert all(pair.corrupted == pair.clean for pair in made)
    assert {pair.noise for pair in made} == {2.5}
    assert len({pair.seed for pair in made}) == len(made)


def test_another_question_is_asked_about_the_same_clip() -> None:
    for pair in pairs("question"):
        assert pair.corrupted == replace(pair.clean, question=OTHER_QUESTION)


def test_pairs_are_made_of_a_data_set() -> None:
    clips = toy_clips("toy/qwen2-audio", "Animal")
    made = pairs_from(clips.samples("open+is"), limit=3)
    assert [pair.name for pair in made] == list(clips.names[:3])
    assert all(pair.foil in set(clips.labels) - {pair.label} for pair in made)


NO_CLIP = Sample("e", Prompt(question=QUESTION), "dog")
REFUSED = {
    "kind": ({"corrupted": "louder"}, r"'louder' is no kind of corruption; there are other, silence, noise, embeddin"),
    "nothing": ({"samples": []}, "there are no samples"),
    "limit": ({"limit": 0}, "limit=0 leaves no samples"),
    "one label": ({"samples": SAMPLES[:2]}, "a: no other sample has another label than 'dog' and as many clips"),
    "counts": ({"samples": [SAMPLES[0], sample("z", "cat", 1.0, 1.0)]}, r"another label than 'dog' and as many.*\(1\)"),
    "no clip": (
        {"samples": [NO_CLIP], "corrupted": "embeddings"},
        "e has no clip: there is no audio to corrupt by 'em",
    ),
    "no clips to pair": ({"samples": [SAMPLES[0], NO_CLIP]}, "e has no clip"),
    "silent": (
        {"samples": [SAMPLES[0].silenced()], "corrupted": "noise"},
        "silence like a is silent: no noise has 0 dB less power",
    ),
    "no noise": ({"corrupted": "embeddings", "noise": 0.0}, "noise=0 corrupts nothing"),
    "question unsaid": ({"corrupted": "question"}, "question= gives the words for corrupted='question'"),
    "question unused": ({"question": OTHER_QUESTION}, "question= gives the words for corrupted='question'"),
    "question absent": (
        {"samples": [sample("a", "dog", 1.0, question=None)], "corrupted": "question", "question": OTHER_QUESTION},
        r"a: its prompt asks None, so 'Who speaks\?' is no other question; take a prompt form with a question",
    ),
    "question same": ({"corrupted": "question", "question": QUESTION}, "is no other question"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_pairs_that_would_not_differ_as_asked_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_from(**{"samples": SAMPLES, **options})


def written(*runs: tuple[str, int], time: bool = True) -> Positions:
    """One row, after one position of padding, from (role or audio[k], count); an audio position hears 0.04 s."""
    roles, clips, seconds = [Role.PAD], [-1], [(np.nan, np.nan)]
    for name, count in runs:
        audio = name.startswith("audio")
        roles += [Role[name.split("[")[0].upper()]] * count
        clips += [int(name[6:-1]) if audio else -1] * count
        seconds += [
            (place * 0.04, (place + 1) * 0.04) if audio and time else (np.nan, np.nan) for place in range(count)
        ]
    text = RowText("", ((0, 0),) * len(roles))
    return Positions(torch.tensor(roles)[None], torch.tensor(clips)[None], torch.tensor(seconds)[None].float(), (text,))


def audio(count: int) -> Positions:
    return written(("template", 2), ("audio[0]", count), ("answer", 3))


def states(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


counts = st.integers(1, 40)


@settings(deadline=None)
@given(donor=counts, recipient=counts, how=st.sampled_from(["exact", "pool", "crop", "resample"]))
def test_there_is_one_value_for_each_column_and_the_columns_have_the_name(donor: int, recipient: int, how: str) -> None:
    if how == "exact":
        donor = recipient
    found = align(audio(donor), 0, audio(recipient), 0, "audio", how)
    values = found.values(states(donor + 6, 4, 2))
    assert values.shape == (len(found.cols), 4, 2)
    expected = min(donor, recipient) if how == "crop" else recipient
    assert found.cols.tolist() == list(range(3, 3 + expected))


@settings(deadline=None)
@given(count=counts, how=st.sampled_from(["exact", "crop", "resample"]))
def test_a_row_aligned_with_itself_gives_its_own_states_bit_by_bit(count: int, how: str) -> None:
    row = written(("template", 2), ("audio[0]", count), ("audio[1]", 3), ("question", 5), ("answer", 1))
    own = states(count + 12, 3)
    found = align(row, 0, row, 0, "all", how)
    assert found.cols.tolist() == list(range(1, count + 12))
    assert torch.equal(found.values(own), own[1:])


@settings(deadline=None)
@given(donor=counts, recipient=counts)
def test_resampling_is_torchs_linear_interpolation(donor: int, recipient: int) -> None:
    given = states(donor + 6, 3)
    values = align(audio(donor), 0, audio(recipient), 0, "audio", "resample").values(given)
    expected = torch.nn.functional.interpolate(given[3 : 3 + donor].T[None], size=recipient, mode="linear")[0].T
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(donor=counts, recipient=counts, how=st.sampled_from(["pool", "crop", "resample"]))
def test_states_that_are_the_same_everywhere_stay_the_same(donor: int, recipient: int, how: str) -> None:
    given = torch.full((donor + 6, 2), 0.7)
    values = align(audio(donor), 0, audio(recipient), 0, "audio", how).values(given)
    torch.testing.assert_close(values, torch.full_like(values, 0.7))


def test_pooling_gives_every_column_the_mean_of_its_own_run() -> None:
    donor = written(("audio[0]", 2), ("audio[1]", 3))
    recipient = written(("audio[0]", 3), ("audio[1]", 1))
    values = align(donor, 0, recipient, 0, "audio", "pool").values(torch.tensor([99.0, 1, 3, 5, 6, 10])[:, None])
    assert values[:, 0].tolist() == [2, 2, 2, 7]


def test_cropping_keeps_the_start_of_each_run() -> None:
    donor = written(("audio[0]", 2), ("audio[1]", 3))
    recipient = written(("audio[0]", 3), ("audio[1]", 1))
    found = align(donor, 0, recipient, 0, "audio", "crop")
    assert found.cols.tolist() == [1, 2, 4]
    assert found.values(torch.arange(6.0)).tolist() == [1, 2, 3]


def test_runs_meet_in_order_where_a_name_has_several() -> None:
    donor = written(("template", 1), ("audio[0]", 2), ("template", 2))
    recipient = written(("template", 1), ("audio[0]", 5), ("template", 2))
    found = align(donor, 0, recipient, 0, "text")  # the two stretches of text around the audio
    assert found.cols.tolist() == [1, 7, 8]
    assert found.values(torch.arange(6.0)).tolist() == [1, 4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_keep_the_type_of_the_states(dtype: torch.dtype) -> None:
    for how in ("exact", "pool", "crop", "resample"):
        row = audio(4)
        assert align(row, 0, row, 0, "audio", how).values(states(10, 2).to(dtype)).dtype == dtype


UNEQUAL = {
    "seconds": (
        audio(12),
        audio(25),
        "audio[0]",
        "'audio[0]' has 12 positions (0.48 s) in the donor and 25 positions (1.00 s) in the recipient: there is no "
        "exact alignment. Say how='pool', 'crop' or 'resample', or take pairs of equal length.",
    ),
    "run of many": (audio(12), audio(25), "all", "'all' (its audio[0]) has 12 positions (0.48 s) in the donor and 25"),
    "no time": (
        written(("audio[0]", 1), time=False),
        written(("audio[0]", 2), time=False),
        "audio[0]",
        "'audio[0]' has 1 position in the donor and 2 positions in the recipient",
    ),
    "words": (
        written(("question", 3)),
        written(("question", 4)),
        "question",
        "'question' has 3 positions in the donor and 4 positions in the recipient",
    ),
    "kinds": (
        written(("template", 1), ("question", 2)),
        written(("template", 1), ("answer", 2)),
        "text",
        "'text' cannot be aligned: it is template, question in row 0 of the donor, template, answer in row 0 of the",
    ),
    "clips": (
        written(("audio[0]", 4)),
        written(("audio[0]", 2), ("audio[1]", 2)),
        "audio",
        "is audio[0] in row 0 of the",
    ),
}


@pytest.mark.parametrize(("donor", "recipient", "name", "message"), UNEQUAL.values(), ids=UNEQUAL)
def test_what_does_not_stand_for_each_other_is_told(donor: Positions, recipient: Positions, name: str, message) -> None:
    with pytest.raises(AlignmentError) as refused:
        align(donor, 0, recipient, 0, name)
    assert message in str(refused.value)


def test_other_kinds_of_runs_are_refused_however_lengths_are_fitted() -> None:
    for how in ("pool", "crop", "resample"):
        with pytest.raises(AlignmentError, match="cannot be aligned"):
            align(written(("template", 2)), 0, written(("answer", 2)), 0, "text", how)


def test_an_unknown_way_to_align_is_told_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="'stretch' is no way to align positions; there are exact, pool, crop, resample"
    ):
        align(audio(2), 0, audio(2), 0, "audio", "stretch")


SHORT, LONG = sample("a", "dog", 0.5), sample("b", "cat", 1.0)  # no transcripts: most models read none


def both(lalm: LALM, pair: Pair) -> PromptBatch:
    return lalm.batch([pair.clean, pair.corrupted])


def test_a_pair_of_equal_length_is_aligned_exactly_in_a_real_batch(toy: LALM) -> None:
    for pair in pairs("silence", [SHORT, LONG]):
        positions = both(toy, pair).positions
        found = align(positions, 0, positions, 1, "all")
        assert torch.equal(found.cols, positions.at("all").row(1))


def test_clips_of_other_length_shift_the_words_but_words_still_meet(toy: LALM) -> None:
    batch = both(toy, pairs("other", [SHORT, LONG])[0])
    codes = torch.arange(batch.shape[1], dtype=torch.float32)
    for name in ("text", "question", "attribute", "last", "template"):
        found = align(batch.positions, 0, batch.positions, 1, name)
        told = [batch.positions.token_text(0, int(col)) for col in found.values(codes)]
        assert told == [batch.positions.token_text(1, int(col)) for col in found.cols]
    with pytest.raises(
        AlignmentError, match=r"'audio' \(its audio\[0\]\) has 12 positions \(0\.48 s\) in the donor and 25"
    ):
        align(batch.positions, 0, batch.positions, 1, "audio")


def test_the_same_stretch_of_seconds_meets_in_clips_of_other_length(toy: LALM) -> None:
    positions = both(toy, pairs("other", [SHORT, LONG])[0]).positions
    found = align(positions, 0, positions, 1, "audio@0.2-0.4")
    assert torch.equal(found.cols, positions.at("audio", seconds=(0.2, 0.4)).row(1))


def test_a_name_that_one_row_lacks_is_refused(toy: LALM) -> None:
    positions = toy.batch([SHORT.prompt, replace(SHORT.prompt, question=None)]).positions
    with pytest.raises(AlignmentError, match="it is question in row 0 of the donor, nothing in row 1 of the recipient"):
        align(positions, 0, positions, 1, "question")
    with pytest.raises(AlignmentError, match="it is nothing in row 1 of the donor, nothing in row 1 of the recipient"):
        align(positions, 1, positions, 1, "question")
    with pytest.raises(SpanError, match="no position is 'rooster'"):
        align(positions, 0, positions, 1, "rooster")


def test_desta_hears_as_many_positions_whatever_the_clip() -> None:
    lalm = load("toy/desta2")
    pair = pairs("other", [sample("a", "dog", 0.5, transcript="same"), sample("b", "cat", 2.0, transcript="same")])[0]
    positions = both(lalm, pair).positions
    found = align(positions, 0, positions, 1, "all")
    assert torch.equal(found.cols, positions.at("all").row(1))
