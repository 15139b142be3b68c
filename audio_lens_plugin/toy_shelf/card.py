"""The toy's model card: what it is, how it was made, and the figures it was measured at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.toy_shelf.evaluation import Answers, ask
from audio_lens_plugin.toy_shelf.shipping import QUOTAS
from audio_lens_plugin.toy_shelf.sounds import DROWNED, NOISY, LabelledSound, make_clips
from audio_lens_plugin.tracks import TRACKS

HELD_OUT = 400  # noisy clips, and as many drowned ones
FORMS = ("open+is", "reversed+is", "open+is+question")
BLIND = "open+is+question+no-audio"

TEXT = """\
---
library_name: transformers
pipeline_tag: audio-text-to-text
tags: [toy]
---

# {name}

**A toy, not a speech model.** This is {about}, {parameters:.2f} million parameters), made so that audio-lens-plugin can
be tried and tested without a network and without a GPU. It answers the questions of the four SAKURA tracks about
synthetic sounds. It knows nothing of real speech or real animals, and no other language than the sentences of the four
tracks. What is measured on it says nothing about large audio language models.

```python
import audio_lens_plugin

lalm = audio_lens_plugin.load("{name}")
```

Its window is 6 s; the weights are stored as 16-bit numbers and load as 32-bit ones.

## How it was made

    {command}

The clips it learned from ({clips:,} of 0.5 to 3 s, {long_clips:,} of 3 to 6 s) are made by `sounds.py`: speech is
numbers read by espeak-ng, where the language is the voice's, the gender one of its variants and the emotion a range of
speeds and pitches; animals are sketches of their calls in numpy. White noise lies over all of them. First the audio
part learned alone ({hearing_steps} steps), then the text stack on its embeddings ({reading_steps} steps). The answer
was trained in all prompt forms that play the clip. {history}

## Figures

Accuracy on {held_out} held-out clips (another seed), half of them noisy (3 to 30 dB), half drowned in noise (-12 to 0
dB): the share of clips whose true label is more probable than the track's other labels after the prompt. Measured on
the saved checkpoint by the library's logit lens. Chance is one over the number of labels; "one label" is what always
giving the same answer gets at best. The two last columns are controls: every clip replaced by silence of the same
length (the highest of the three forms), and the question asked without a clip (`{blind}`).

{accuracies}

The same by noise, with `{form}`:

{by_noise}

The information score by layer (0 = embeddings), `{form}`, last position, drowned clips:

{by_layer}

The drowned range was chosen, after looking at other held-out clips, so that there are wrong answers to study; it is
harder than what the toy learned from (-6 dB and more).

Where the assistant's answer is not opened at all, the toy says a whole sentence.

## The clips in `clips/`

{shipped_clips} held-out clips, 0.5 to 6 s, OGG/Vorbis, chosen so that about half of them are answered wrong in at
least one attribute; accuracy on them is therefore no measure of the toy. Right answers with `{form}`, as the files
are:

{shipped}
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(lalm: LALM, sounds: list[LabelledSound]) -> str:
    """Accuracy by track: in the forms, with silence (the best of the forms), and without a clip."""
    heard = [ask(lalm, sounds, form) for form in FORMS]
    silent = [ask(lalm, sounds, form, silent=True) for form in FORMS]
    blind = ask(lalm, sounds, BLIND)
    rows = []
    for name, track in TRACKS.items():
        controls = [max(answers[name].accuracy for answers in silent), blind[name].accuracy]
        counts = Counter(sound.labels[name] for sound in sounds if name in sound.labels)
        chances = [1 / len(track.labels), max(counts.values()) / counts.total()]
        shares = [answers[name].accuracy for answers in heard]
        numbers = [f"{number:.3f}" for number in (*chances, *shares, *controls)]
        rows.append([name, str(counts.total()), *numbers])
    return table(
        ["track", "clips", "chance", "one label", *(f"`{form}`" for form in FORMS), "silence", "no clip"], rows
    )


def noise_table(noisy: Answers, drowned: Answers) -> str:
    """Accuracy by track and noise."""
    rows = [[name, f"{noisy[name].accuracy:.3f}", f"{drowned[name].accuracy:.3f}"] for name in TRACKS]
    return table(["track", "noisy", "drowned"], rows)


def layer_table(answers: Answers) -> str:
    """The information score by track and layer; layer 0 is the embeddings."""
    rows = [[name, *(f"{score:.2f}" for score in answers[name].information()["score"])] for name in TRACKS]
    return table(["track", *(f"layer {layer}" for layer in range(len(rows[0]) - 1))], rows)


def shipped_table(answers: Answers) -> str:
    """How many answers about the shipped clips are right."""
    rows = [[name, str(round(a.accuracy * len(a.samples))), str(len(a.samples))] for name, a in answers.items()]
    return table(["track", "right", "clips"], rows)


def write_card(lalm: LALM, seed: int, shipped: Answers, facts: Mapping[str, Any]) -> str:
    """Measure the toy on held-out clips and write the card.

    Args:
        shipped: the answers about the shipped clips.
        facts: what the toy is and how it was made: ``name``, ``about``, ``history``, ``command``, ``clips``,
            ``long_clips``, ``hearing_steps``, ``reading_steps``.
    """
    noisy, drowned = make_clips(HELD_OUT, seed, noise=NOISY), make_clips(HELD_OUT, seed + 1, noise=DROWNED)
    of_noisy, of_drowned = ask(lalm, noisy, FORMS[0]), ask(lalm, drowned, FORMS[0])
    return TEXT.format(
        **facts,
        parameters=sum(parameter.numel() for parameter in lalm.module.parameters()) / 1e6,
        held_out=2 * HELD_OUT,
        form=FORMS[0],
        blind=BLIND,
        accuracies=accuracy_table(lalm, noisy + drowned),
        by_noise=noise_table(of_noisy, of_drowned),
        by_layer=layer_table(of_drowned),
        shipped_clips=sum(QUOTAS.values()),
        shipped=shipped_table(shipped),
    )
