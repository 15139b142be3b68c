"""The four SAKURA tracks as data: what is asked, with which words, and which answers are possible.

An attribute is asked for in one of several *prompt forms* (AudioLens, arXiv 2506.05140, and its repository). A form is
written as words joined by ``+``, the same on the command line, in a result's header and in Python:

    open+is                     user: [clip]                         assistant: The sound file's animal is
    reversed+is                 user: [clip]                         assistant: The animal in the sound file is
    open+is+question            user: [clip] What animal makes the sound?          assistant: The sound file's animal is
    open+is+options             user: [clip] What animal ...? Possible options: dog, cat, ...   assistant: The sound ...
    open                        the same without " is"
    open+is+no-audio            the control: the same words, no clip

This room knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal


@dataclass(frozen=True)
class Attribute:
    """What is asked about clips: its name in tables, the word that names it in a prompt, and the possible answers."""

    name: str
    attribute: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Track(Attribute):
    """One attribute of a clip, and the sentences that ask for it.

    Source of labels and sentences: the code of AudioLens (github ckyang1124/AudioLens).

    Raises:
        ValueError: a sentence does not name the attribute, so that no position of a prompt would be that of its word.
    """

    question: str
    open: str
    reversed: str

    def __post_init__(self) -> None:
        for sentence in (self.open, self.reversed):
            if self.attribute.casefold() not in sentence.casefold():
                raise ValueError(f"track {self.name}: the sentence {sentence!r} does not name {self.attribute!r}.")


TRACKS: dict[str, Track] = {
    track.name: track
    for track in (
        Track(
            name="Animal",
            attribute="animal",
            labels=("dog", "cat", "pig", "cow", "frog", "hen", "rooster", "sheep", "crow"),
            question="What animal makes the sound?",
            open="The sound file's animal",
            reversed="The animal in the sound file",
        ),
        Track(
            name="Emotion",
            attribute="emotion",
            labels=("angry", "disgust", "fear", "happy", "sad"),
            question="What is the emotion of the speaker in the speech?",
            open="The speaker's emotion",
            reversed="The emotion of the speaker",
        ),
        Track(
            name="Gender",
            attribute="gender",
            labels=("male", "female"),
            question="What is the gender of the speaker in the speech?",
            open="The speaker's gender",
            reversed="The gender of the speaker",
        ),
        Track(
            name="Language",
            attribute="language",
            labels=("English", "German", "Spanish", "French", "Italian", "Chinese", "Japanese", "Korean"),
            question="What is the language spoken in the speech?",
            open="The speech's spoken language",
            reversed="The spoken language of the speech",
        ),
    )
}
"""SAKURA's tracks by name."""


Order = Literal["open", "reversed"]
Turn = Literal["none", "question", "options"]
ORDERS: tuple[Order, ...] = ("open", "reversed")
TURNS: tuple[Turn, ...] = ("none", "question", "options")


@dataclass(frozen=True)
class PromptForm:
    """One way to ask for a track's attribute. ``str(form)`` and `PromptForm.parse` are inverse to each other."""

    order: Order = "open"
    verb: bool = True
    turn: Turn = "none"
    audio: bool = True

    @classmethod
    def parse(cls, text: str) -> PromptForm:
        """Read ``"open+is+question"``.

        Raises:
            ValueError: for a word that is no part of a form; the message lists all forms.
        """
        known = {str(form): form for form in cls.all()}
        if text not in known:
            raise ValueError(f"unknown prompt form {text!r}; forms are: {', '.join(known)}")
        return known[text]

    @classmethod
    def all(cls) -> tuple[PromptForm, ...]:
        """Every form, the paper's with audio first, the controls without audio after them."""
        return tuple(
            cls(order, verb, turn, audio)
            for audio, order, verb, turn in product((True, False), ORDERS, (True, False), TURNS)
        )

    def __str__(self) -> str:
        words: list[str] = [self.order]
        words += ["is"] if self.verb else []
        words += [self.turn] if self.turn != "none" else []
        words += [] if self.audio else ["no-audio"]
        return "+".join(words)

    def answer(self, track: Track) -> str:
        """The assistant's opened turn, for example ``"The sound file's animal is"``."""
        return getattr(track, self.order) + (" is" if self.verb else "")

    def question(self, track: Track) -> str | None:
        """The user's words, without the options; None where the user only plays the clip."""
        return None if self.turn == "none" else track.question

    def options(self, track: Track) -> tuple[str, ...] | None:
        """The options named after the question, or None."""
        return track.labels if self.turn == "options" else None
