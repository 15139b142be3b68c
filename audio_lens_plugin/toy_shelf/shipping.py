"""The clips that travel with a toy: few, small, and such that there is something to see.

A lens is interesting where answers are right and where they are wrong. So about half of the clips are ones the toy
gets wrong in at least one attribute, judged on the file as it is written, not on the sound it was made of. Names and
order of the files tell nothing of their labels.
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.toy_shelf.evaluation import Answers, ask
from audio_lens_plugin.toy_shelf.sounds import MIXED, SAMPLE_RATE, LabelledSound, make_clips
from audio_lens_plugin.tracks import TRACKS

COLUMNS = {track.attribute: name for name, track in TRACKS.items()}
QUOTAS = {  # (is an animal, is long, is answered right in everything): how many
    (False, False, True): 6,
    (False, False, False): 6,
    (False, True, True): 1,
    (False, True, False): 1,
    (True, False, True): 3,
    (True, False, False): 4,
    (True, True, True): 1,
}


@dataclass(frozen=True)
class Candidate:
    """A clip that could be shipped: its file's bytes, what is heard in that file, and its place in the quotas."""

    ogg: bytes
    clip: LabelledSound
    long: bool

    def traits(self) -> list[str]:
        """What the choice should vary in: the labels, and the length in half seconds."""
        return [*self.clip.labels.values(), f"{2 * len(self.clip.waveform) // SAMPLE_RATE} half seconds"]

    def fits(self, quota: tuple[bool, bool, bool], right: bool) -> bool:
        """Whether the clip counts for this quota, given that the toy answers it right or not."""
        return quota == ("Animal" in self.clip.labels, self.long, right)


def encode(clip: LabelledSound, long: bool) -> Candidate:
    """Write a clip as OGG/Vorbis into memory and read it back."""
    file = io.BytesIO()
    soundfile.write(file, clip.waveform, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    heard, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
    return Candidate(file.getvalue(), replace(clip, waveform=heard), long)


class TooFewError(RuntimeError):
    """Too few candidates fit a quota."""


def candidates(seed: int, count: int) -> list[Candidate]:
    """Held-out clips to choose from, half of them drowned in noise."""
    short = [encode(clip, long=False) for clip in make_clips(count, seed, noise=MIXED)]
    long = make_clips(count // 5, seed + 1, seconds=(4.0, 6.0), noise=MIXED)
    return short + [encode(clip, long=True) for clip in long]


def choose(offered: list[Candidate], all_right: list[bool], seed: int) -> list[Candidate]:
    """Fill the quotas, preferring labels and lengths that were chosen least so far; in random order.

    Raises:
        TooFewError: if too few candidates fit a quota.
    """
    chosen: list[Candidate] = []
    used: Counter[str] = Counter()
    for quota, count in QUOTAS.items():
        fitting = [one for one, right in zip(offered, all_right, strict=True) if one.fits(quota, right)]
        if len(fitting) < count:
            raise TooFewError(f"only {len(fitting)} of {count} clips for the quota {quota}")
        for _ in range(count):
            best = min(fitting, key=lambda one: sum(used[trait] for trait in one.traits()))
            fitting.remove(best)
            chosen.append(best)
            used.update(best.traits())
    random.Random(seed).shuffle(chosen)
    return chosen


def ship_clips(lalm: LALM, folder: Path, form: str, seed: int) -> Answers:
    """Choose clips and write them with their ``metadata.csv``; returns the answers about them."""
    chosen = found(lalm, form, seed)
    (folder / "audio").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file", *COLUMNS], lineterminator="\n")
        table.writeheader()
        for number, one in enumerate(chosen):
            name = f"clip_{number:02}.ogg"
            (folder / "audio" / name).write_bytes(one.ogg)
            table.writerow({"file": name, **{column: one.clip.labels.get(key) for column, key in COLUMNS.items()}})
    return ask(lalm, [one.clip for one in chosen], form)


def found(lalm: LALM, form: str, seed: int, count: int = 300) -> list[Candidate]:
    """The clips to ship, of this many candidates, or of twice as many where they are too few: a toy may be too good."""
    offered = candidates(seed, count)
    try:
        return choose(offered, all_right(lalm, [one.clip for one in offered], form), seed)
    except TooFewError as error:
        print(f"{error}; offering {2 * count} candidates", flush=True)
        return found(lalm, form, seed, 2 * count)


def all_right(lalm: LALM, sounds: list[LabelledSound], form: str) -> list[bool]:
    """Whether the toy answers everything about a sound right, for each of them."""
    right = [True] * len(sounds)
    for name, result in ask(lalm, sounds, form).items():
        having = [place for place, sound in enumerate(sounds) if name in sound.labels]
        for place, correct in zip(having, result.samples["truth"] == result.samples["answer"], strict=True):
            right[place] &= bool(correct)
    return right
