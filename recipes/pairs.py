"""Matched prompts that differ in what they let a model know, and positions of one that stand for those of the other.

A causal experiment runs a prompt twice: *clean*, and *corrupted* in one respect. Then states of one run are put into
the other. Two questions come before any model runs, and this room answers them.

*What is corrupted?*  `pairs_from(samples, corrupted=...)`:

    other        the clip of another sample, of another label and as nearly as long as there is
    silence      silence as long as the clip
    noise        white noise mixed into the clip at a signal-to-noise ratio
    embeddings   nothing in the prompt: the recipe adds Gaussian noise to what the language model is given of the audio
                 (as causal tracing does with words: Meng et al., arXiv 2202.05262)
    question     another question about the same clip

*Which position stands for which?*  Prompts differ in length, so positions are never matched by their number, only by
their name: `align(...)`. Within a name, stretches of one role are matched in order. Where two of them differ in length,
nothing is matched unless the caller says how: pool, crop or resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.spans import Positions

KINDS = ("other", "silence", "noise", "embeddings", "question")


class AlignmentError(ValueError):
    """Positions of two rows that do not stand for each other; the message says how they differ."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its corrupted twin.

    Attributes:
        name: the sample's.
        clean: the prompt as it is.
        corrupted: the prompt that lacks what decides the clean answer.
        label: the right answer to the clean prompt.
        foil: the right answer to the corrupted one; None where it has none.
        noise: Gaussian noise that a recipe adds to the audio embeddings of the corrupted run, as a multiple of the
            standard deviation of the clean ones.
        seed: of the random numbers of this pair.
    """

    name: str
    clean: Prompt
    corrupted: Prompt
    label: str
    foil: str | None = None
    noise: float = 0.0
    seed: int = 0


def pairs_from(
    samples: Sequence[Sample],
    corrupted: str = "other",
    *,
    snr: float = 0.0,
    noise: float = 3.0,
    question: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Give each sample a corrupted twin.

    Args:
        samples: for example ``clips.samples("open+is+question")``.
        corrupted: what is corrupted: ``other``, ``silence``, ``noise``, ``embeddings`` or ``question`` (see the
            module's text). A clip of another sample brings its transcript; silence and noise lose the clip's.
        snr: for ``noise``: the clip's mean power over the noise's, in dB, at the clip's own rate.
        noise: for ``embeddings``: standard deviation of the noise, in those of the clean audio embeddings.
        question: for ``question``: the words that are asked instead.
        limit: pairs of the first samples only; the other clip may still come from any of them.
        seed: decides the noise, and among clips that are equally near in length the one that is taken.

    Raises:
        ValueError: an unknown kind, no samples, samples that lack what is to be corrupted, or no sample of another
            label with as many clips.
    """
    if corrupted not in KINDS:
        raise ValueError(f"{corrupted!r} is no kind of corruption; there are {', '.join(KINDS)}.")
    if (question is None) == (corrupted == "question"):
        raise ValueError("question= gives the words for corrupted='question', which needs them; nothing else takes it.")
    if corrupted == "embeddings" and not noise > 0:
        raise ValueError(f"noise={noise:g} corrupts nothing: it must be above 0.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no samples.")
    if len(samples) == 0:
        raise ValueError("there are no samples to make pairs of.")
    given = list(samples if corrupted == "other" else samples[:limit])
    _check_there_is_something_to_corrupt(given, corrupted, question)
    pairs = []
    for place, sample in enumerate(given[:limit]):
        own_seed = int(np.random.default_rng([seed, place]).integers(2**31))
        random = np.random.default_rng(own_seed)
        pair = Pair(sample.name, sample.prompt, sample.prompt, sample.label, seed=own_seed)
        if corrupted == "other":
            partner = _partner(sample, given, random)
            pair = replace(pair, corrupted=replace(pair.clean, clips=partner.prompt.clips), foil=partner.label)
        elif corrupted == "silence":
            pair = replace(pair, corrupted=sample.silenced().prompt)
        elif corrupted == "noise":
            noisy = tuple(_noisy(clip, snr, random) for clip in pair.clean.clips)
            pair = replace(pair, corrupted=replace(pair.clean, clips=noisy))
        elif corrupted == "embeddings":
            pair = replace(pair, noise=noise)
        else:
            pair = replace(pair, corrupted=replace(pair.clean, question=question))
        pairs.append(pair)
    return pairs


def _check_there_is_something_to_corrupt(samples: Sequence[Sample], corrupted: str, question: str | None) -> None:
    for sample in samples:
        if corrupted == "question" and sample.prompt.question in (None, question):
            raise ValueError(
                f"{sample.name}: its prompt asks {sample.prompt.question!r}, so {question!r} is no other question; "
                "take a prompt form with a question ('open+is+question') and ask something else."
            )
        if corrupted != "question" and not sample.prompt.clips:
            raise ValueError(f"{sample.name} has no clip: there is no audio to corrupt by {corrupted!r}.")


def _partner(sample: Sample, samples: Sequence[Sample], random: np.random.Generator) -> Sample:
    """Of the samples with another label, the one whose clips are nearest in duration."""
    count = len(sample.prompt.clips)
    others = [
        other
        for other in samples
        if other.label.strip().casefold() != sample.label.strip().casefold() and len(other.prompt.clips) == count
    ]
    if not others:
        raise ValueError(
            f"{sample.name}: no other sample has another label than {sample.label!r} and as many clips ({count}); "
            "add some, or corrupt by 'silence'."
        )

    def distance(place: int) -> float:
        clips = zip(sample.prompt.clips, others[place].prompt.clips, strict=True)
        return sum(abs(own.seconds - its.seconds) for own, its in clips)

    return others[min(random.permutation(len(others)).tolist(), key=distance)]


def _noisy(clip: Clip, snr: float, random: np.random.Generator) -> Clip:
    power = float(np.square(clip.waveform, dtype=np.float64).mean())
    if power == 0:
        raise ValueError(f"{clip.name} is silent: no noise has {snr:g} dB less power than nothing. Leave it out.")
    noise = random.standard_normal(len(clip.waveform))
    noise *= np.sqrt(power / np.square(noise).mean()) * 10 ** (-snr / 20)
    waveform = (clip.waveform + noise).astype(np.float32)
    return replace(clip, waveform=waveform, name=f"{clip.name} in noise ({snr:g} dB)", transcript=None)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which positions of a donor row give the values of which positions of a recipient row, run by run.

    Attributes:
        how: ``exact``, ``pool``, ``crop`` or ``resample`` (see `align`).
        donors: columns of each of the donor's runs.
        recipients: columns of each of the recipient's runs that are given a value.
    """

    how: str
    donors: tuple[Int[torch.Tensor, " _"], ...]
    recipients: tuple[Int[torch.Tensor, " _"], ...]

    @property
    def cols(self) -> Int[torch.Tensor, " n"]:
        """The recipient's columns, counted with its padding."""
        return torch.cat(self.recipients)

    def values(self, states: Float[torch.Tensor, "pos ..."]) -> Float[torch.Tensor, "n ..."]:
        """What the recipient's columns are given.

        Args:
            states: of the donor's row, at every position.
        """
        fit = FITS[self.how]
        runs = zip(self.donors, self.recipients, strict=True)
        return torch.cat([fit(states[giving], len(taking)) for giving, taking in runs])


def align(
    donor: Positions, donor_row: int, recipient: Positions, recipient_row: int, name: str, how: str = "exact"
) -> Alignment:
    """Match the positions that have a name in one row with those that have it in another.

    A name may cover several runs, stretches of neighbours with one role and one clip (``all``: template, audio[0],
    template, question, ...). Both rows must show the same roles and clips in the same order; run meets run.

    Args:
        name: as in `Positions.at`.
        how: what happens between runs that differ in length:
            ``exact``: an error.
            ``pool``: each position of the recipient is given the mean over the donor's run.
            ``crop``: first meets first, as far as the shorter run goes; the rest of the recipient stays as it is.
            ``resample``: linear interpolation; a run is stretched to the length of the other.

    Raises:
        AlignmentError: the runs differ in kind, or in length under ``exact``.
        SpanError: nothing in a batch has this name.
        ValueError: an unknown ``how``.
    """
    if how not in FITS:
        raise ValueError(f"{how!r} is no way to align positions; there are {', '.join(FITS)}.")
    giving = donor.runs(donor_row, donor.at(name).row(donor_row))
    taking = recipient.runs(recipient_row, recipient.at(name).row(recipient_row))
    kinds = [_kinds(donor, donor_row, giving), _kinds(recipient, recipient_row, taking)]
    if kinds[0] != kinds[1] or not giving:
        of_donor, of_recipient = (", ".join(names) or "nothing" for names in kinds)
        raise AlignmentError(
            f"{name!r} cannot be aligned: it is {of_donor} in row {donor_row} of the donor, "
            f"{of_recipient} in row {recipient_row} of the recipient. Take a name that means the same in both."
        )
    if how == "exact":
        for kind, given, taken in zip(kinds[0], giving, taking, strict=True):
            if len(given) != len(taken):
                of = "" if kind == name else f" (its {kind})"
                raise AlignmentError(
                    f"{name!r}{of} has {_length(donor, donor_row, given)} in the donor and "
                    f"{_length(recipient, recipient_row, taken)} in the recipient: there is no exact alignment. "
                    "Say how='pool', 'crop' or 'resample', or take pairs of equal length."
                )
    if how == "crop":
        shortest = [min(len(given), len(taken)) for given, taken in zip(giving, taking, strict=True)]
        giving, taking = ([run[:count] for run, count in zip(runs, shortest, strict=True)] for runs in (giving, taking))
    return Alignment(how, tuple(giving), tuple(taking))


def _kinds(positions: Positions, row: int, runs: Sequence[torch.Tensor]) -> list[str]:
    return [positions.role_name(row, int(run[0])) for run in runs]


def _length(positions: Positions, row: int, run: torch.Tensor) -> str:
    """For people: how many positions, and how many seconds they hear."""
    seconds = float(positions.seconds[row, run[-1], 1] - positions.seconds[row, run[0], 0])
    return f"{len(run)} position{'s' * (len(run) != 1)}" + ("" if np.isnan(seconds) else f" ({seconds:.2f} s)")


def _as_they_are(states: torch.Tensor, count: int) -> torch.Tensor:
    return states


def _pooled(states: torch.Tensor, count: int) -> torch.Tensor:
    return states.mean(dim=0, keepdim=True).expand(count, *states.shape[1:])


def _resampled(states: torch.Tensor, count: int) -> torch.Tensor:
    """Linear interpolation between the middles of positions: each is an equal share of the run's time."""
    # In whole numbers, of which one position is 2 * count: equal lengths give the states back, bit by bit.
    places = ((2 * torch.arange(count) + 1) * len(states) - count).clamp(0, 2 * count * (len(states) - 1))
    left = places // (2 * count)
    share = (places % (2 * count) / (2 * count)).to(states).reshape(-1, *[1] * (states.ndim - 1))
    return states[left].lerp(states[(left + 1).clamp(max=len(states) - 1)], share)


FITS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "exact": _as_they_are,
    "pool": _pooled,
    "crop": _as_they_are,
    "resample": _resampled,
}
