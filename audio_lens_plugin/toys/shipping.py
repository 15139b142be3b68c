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

from audio_lens_plugin.toys.evaluation import Right, right_answers
from audio_lens_plugin.toys.family import Toy
from audio_lens_plugin.toys.sounds import MIXED, SAMPLE_RATE, Clip, make_clips
from audio_lens_plugin.tracks import TRACKS, PromptForm

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
    clip: Clip
    long: bool

    def traits(self) -> list[str]:
        """What the choice should vary in: the labels, and the length in half seconds."""
        return [*self.clip.labels.values(), f"{2 * len(self.clip.waveform) // SAMPLE_RATE} half seconds"]

    def fits(self, quota: tuple[bool, bool, bool], right: bool) -> bool:
        """Whether the clip counts for this quota, given that the toy answers it right or not."""
        return quota == ("Animal" in self.clip.labels, self.long, right)


def encode(clip: Clip, long: bool) -> Candidate:
    """Write a clip as OGG/Vorbis into memory and read it back."""
    file = io.BytesIO()
    soundfile.write(file, clip.waveform, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    heard, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
    return Candidate(file.getvalue(), replace(clip, waveform=heard), long)


def candidates(seed: int) -> list[Candidate]:
    """Held-out clips to choose from, half of them drowned in noise."""
    short = [encode(clip, long=False) for clip in make_clips(300, seed, noise=MIXED)]
    return short + [encode(clip, long=True) for clip in make_clips(60, seed + 1, seconds=(4.0, 6.0), noise=MIXED)]


def choose(offered: list[Candidate], all_right: list[bool], seed: int) -> list[Candidate]:
    """Fill the quotas, preferring labels and lengths that were chosen least so far; in random order.

    Raises:
        RuntimeError: if too few candidates fit a quota.
    """
    chosen, used = [], Counter()
    for quota, count in QUOTAS.items():
        fitting = [one for one, right in zip(offered, all_right, strict=True) if one.fits(quota, right)]
        if len(fitting) < count:
            raise RuntimeError(f"only {len(fitting)} of {count} clips for the quota {quota}: offer more candidates")
        for _ in range(count):
            best = min(fitting, key=lambda one: sum(used[trait] for trait in one.traits()))
            fitting.remove(best)
            chosen.append(best)
            used.update(best.traits())
    random.Random(seed).shuffle(chosen)
    return chosen


def ship_clips(toy: Toy, folder: Path, form: PromptForm, seed: int) -> Right:
    """Choose clips and write them with their ``metadata.csv``; which answers about them are right."""
    offered = candidates(seed)
    chosen = choose(offered, [all_right(toy, one.clip, form) for one in offered], seed)
    (folder / "audio").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file", *COLUMNS], lineterminator="\n")
        table.writeheader()
        for number, one in enumerate(chosen):
            name = f"clip_{number:02}.ogg"
            (folder / "audio" / name).write_bytes(one.ogg)
            table.writerow({"file": name, **{column: one.clip.labels.get(key) for column, key in COLUMNS.items()}})
    return right_answers(toy, [one.clip for one in chosen], form)


def all_right(toy: Toy, clip: Clip, form: PromptForm) -> bool:
    """Whether the toy answers everything about a clip right."""
    return all(right[-1].all().item() for right in right_answers(toy, [clip], form).values())
