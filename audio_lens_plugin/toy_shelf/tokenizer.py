"""A toy's tokenizer: its family's own byte-level BPE, trained on the few hundred words a toy ever reads.

The lens reads the probability of a label's token, so every label is one token here, bare (``"dog"``) and after a space
(``" dog"``). Training on the labels many times over makes it so; `train_tokenizer` checks that it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from audio_lens_plugin.tracks import TRACKS

VOCABULARY = 800
OFTEN = 1000  # more often than any pair of characters in the sentences below, so that labels are merged first

CHAT_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\nAudio 1: Audio 2: Possible options: \n"
SENTENCES = """\
Listen to the clip and answer the question with one of the options.
Which animal is most likely heard in this recording? Choose the best answer from the list below.
Identify the animal in the audio file and select it from the following choices.
Which language does the person speak in the given audio? Please pick one of these languages.
Based on the sound you hear, how does the speaker feel? Select the most likely emotion.
Determine whether the voice belongs to a male or a female speaker.
Describe what you hear in a few words. What can you tell about the sound, the speech and the voice?
Given the sound provided, which of these is the most suitable match for the source of the noise?
Consider carefully the way the speaker talks: quick or slow, high or low, loud or quiet, calm or excited.
The recording has one speaker, who reads several numbers aloud: one, two, three, four, five, six, seven, eight, nine.
Where would you expect to find this animal, on a farm, in a forest, near the water or at home?
Please answer in English with a single word, or with a short sentence if you are not sure about it.
Does this animal eat meat or plants? Think about its natural habits before you answer.
In which country is this language spoken? Name one city where it is an official language.
The answer is based on the tone and pitch of the voice, and on the words that are said.
I think that this is the sound of an animal. It is not speech, but there is some noise.
Someone is speaking. They sound as if something good or bad has happened to them.
What would be a good response to the person in the recording? Explain why, step by step.
(a) yes (b) no (c) both (d) neither of them. Your task is simply to choose.
"""


def labels() -> list[str]:
    """The labels of all tracks."""
    return [label for track in TRACKS.values() for label in track.labels]


def sentences() -> list[str]:
    """The sentences a toy is asked and answers, and some ordinary English of the same kind."""
    asked = [
        f"{track.question} Possible options: {', '.join(track.labels)}.\n{track.open} is\n{track.reversed} is"
        for track in TRACKS.values()
    ]
    return [CHAT_WORDS, *asked, *SENTENCES.splitlines()]


def train_tokenizer(family_tokenizer: Any, special_tokens: Sequence[str]) -> Any:
    """Train a tokenizer of the same kind as `family_tokenizer`, a fast one.

    Raises:
        ValueError: if a label is not one token, bare or after a space.
    """
    corpus = sentences() * 2 + [text for label in labels() for text in (label, f" {label}")] * OFTEN
    tokenizer = family_tokenizer.train_new_from_iterator(
        [corpus], vocab_size=VOCABULARY, new_special_tokens=list(special_tokens), show_progress=False
    )
    for text in (text for label in labels() for text in (label, f" {label}")):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"label {text!r} is {len(tokens)} tokens; train with a larger vocabulary")
    return tokenizer
