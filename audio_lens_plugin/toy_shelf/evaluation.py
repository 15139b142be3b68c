"""What a toy knows, measured by the library itself: a saved checkpoint, clips it never heard, the logit lens."""

from __future__ import annotations

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.datasets import ClipSet
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.toy_shelf.sounds import SAMPLE_RATE, LabelledSound
from audio_lens_plugin.tracks import TRACKS

BATCH = 48

Answers = dict[str, LensResult]
"""By track name: what every layer says at the last position, over the sounds that have the attribute."""


def ask(lalm: LALM, sounds: list[LabelledSound], form: str, silent: bool = False) -> Answers:
    """Ask for every attribute of every sound, in one form of words; or of silence of the same lengths."""
    answers = {}
    for name, track in TRACKS.items():
        having = [sound for sound in sounds if name in sound.labels]
        clips = [Clip(sound.waveform, SAMPLE_RATE, f"sound {place}") for place, sound in enumerate(having)]
        labels = tuple(sound.labels[name] for sound in having)
        chosen = ClipSet("held-out sounds", track, tuple(clip.name for clip in clips), clips, labels).samples(form)
        samples = [sample.silenced() for sample in chosen] if silent else chosen
        if having:
            answers[name] = logit_lens(lalm, samples, track.labels, form=form, batch_size=BATCH)
    return answers
