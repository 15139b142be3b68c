"""What a run computes, as data: the experiments, what they are asked about, and the batches that they are divided into.

A *unit* is one batch of clips in one prompt form under one control in one experiment. Units are the same whoever runs
them, in whatever order, on however many machines; that is why a run that was killed, or divided, ends in the same
numbers as one that was not.

    experiment    prompt forms            controls                      what it gives
    lens          all                     clip, silence, no-audio       logit lens at all layers
    free          all                     clip, silence                 what the model says when nobody restricts it
    knockout      one                     clip                          who must read whom, in which layers
    patching      one                     clip                          which states bring the clip back into silence
    enhancement   one                     clip                          each source and target layer of the paper's edit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from urllib.parse import quote

from audio_lens_plugin.datasets import ClipSet
from audio_lens_plugin.multiple_choice import ASKED, LETTERS, QuestionSet
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.tracks import PromptForm

CLIP, SILENCE, NO_AUDIO = "clip", "silence", "no-audio"
CONTROLS = (CLIP, SILENCE, NO_AUDIO)
LENS, FREE, KNOCKOUT, PATCHING, ENHANCEMENT = "lens", "free", "knockout", "patching", "enhancement"
EXPERIMENTS = (LENS, FREE, KNOCKOUT, PATCHING, ENHANCEMENT)
CAUSAL_FORM = "reversed+is+question"
Data = Mapping[str, ClipSet | QuestionSet]
"""What a run is about: tracks and sets of questions by their names."""


@dataclass(frozen=True)
class Settings:
    """What may be chosen of a run.

    Attributes:
        batch_size: clips per forward pass.
        seed: of bootstraps, permutations, controls and the split.
        development: share of the clips that the enhancement is chosen by.
        window: layers that a knockout cuts together.
        new_tokens: length of a free answer, in tokens.
        truncate: cut clips that are longer than the model's window.
    """

    batch_size: int = 8
    seed: int = 0
    development: float = 0.5
    window: int = 3
    new_tokens: int = 12
    truncate: bool = False


@dataclass(frozen=True)
class Subject:
    """What is asked about some clips; no clip is in it, so that it can stand in a file.

    Attributes:
        name: of the track, or of the set of questions.
        labels: the possible answers.
        clips: how many there are.
        forms: the prompt forms of the lens.
        free: the prompt forms of free answers.
        causal: the prompt form of the causal experiments, which figures and findings show; None without these.
    """

    name: str
    labels: tuple[str, ...]
    clips: int
    forms: tuple[str, ...]
    free: tuple[str, ...]
    causal: str | None

    def asked(self, experiment: str) -> list[tuple[str, str]]:
        """The prompt forms and controls of an experiment."""
        if experiment == LENS:
            return list(product(self.forms, CONTROLS))
        if experiment == FREE:
            return list(product(self.free, (CLIP, SILENCE)))
        return [] if self.causal is None else [(self.causal, CLIP)]


@dataclass(frozen=True)
class Unit:
    """One batch of one experiment."""

    experiment: str
    track: str
    form: str
    control: str
    batch: int

    @property
    def place(self) -> Path:
        """Where its result lies among the parts of a run."""
        return Path(self.experiment, quote(self.track, safe=" ()"), self.form, self.control, f"{self.batch:04}")


def subjects_of(data: Data) -> list[Subject]:
    """Every track in the paper's prompt forms, every set of questions in letters.

    Where there are tracks, the causal experiments are theirs alone: questions beside them ask for the same once more.
    """
    forms = tuple(str(form) for form in PromptForm.all() if form.audio)
    of_track = {"forms": forms, "free": forms, "causal": CAUSAL_FORM}
    tracks = any(isinstance(recordings, ClipSet) for recordings in data.values())
    of_questions = {"forms": (LETTERS,), "free": (ASKED,), "causal": None if tracks else LETTERS}
    return [
        Subject(
            name,
            recordings.track.labels,
            len(recordings),
            **(of_questions if isinstance(recordings, QuestionSet) else of_track),
        )
        for name, recordings in data.items()
    ]


def units(subjects: Sequence[Subject], batch_size: int) -> list[Unit]:
    """Every unit of a run, in the order of its work."""
    return [
        Unit(experiment, subject.name, form, control, batch)
        for experiment in EXPERIMENTS
        for subject in subjects
        for form, control in subject.asked(experiment)
        for batch in range(ceil(subject.clips / batch_size))
    ]


def by_length(clips: ClipSet | QuestionSet) -> list[int]:
    """Indices of the clips, the longest first: what does not fit into memory is told at once.

    Clips of a batch are then nearly as long as each other, so that little of it is padding.
    """
    seconds = clips.seconds()
    return sorted(range(len(clips)), key=lambda index: (-seconds[index], clips.names[index]))


def samples_of(clips: ClipSet | QuestionSet, form: str, control: str, indices: Sequence[int]) -> list[Sample]:
    """Some of the clips, asked in a form under a control."""
    asked = clips.samples(f"{form}+{NO_AUDIO}" if control == NO_AUDIO else form)
    chosen = [asked[index] for index in indices]
    return [sample.silenced() for sample in chosen] if control == SILENCE else chosen
