"""The toy's model card: what it is, how it was made, and the figures it was measured at."""

from __future__ import annotations

from collections import Counter

from audio_lens_plugin.toys.evaluation import Right, right_answers, silenced
from audio_lens_plugin.toys.family import Toy
from audio_lens_plugin.toys.shipping import QUOTAS
from audio_lens_plugin.toys.sounds import DROWNED, NOISY, Clip, make_clips
from audio_lens_plugin.tracks import TRACKS, PromptForm

HELD_OUT = 400  # noisy clips, and as many drowned ones
FORMS = ("open+is", "reversed+is", "open+is+question")
BLIND = "open+is+question+no-audio"

TEXT = """\
---
library_name: transformers
pipeline_tag: audio-text-to-text
tags: [toy]
---

# Toy Qwen2-Audio

**A toy, not a speech model.** This is the real `Qwen2AudioForConditionalGeneration` of transformers with small numbers
(an audio tower of 3 layers and width 96, a text stack of 8 layers and width 128, {parameters:.2f} million parameters),
made so that audio-lens-plugin can be tried and tested without a network and without a GPU. It answers the questions of
the four SAKURA tracks about synthetic sounds. It knows nothing of real speech or real animals, and no other language
than the sentences of the four tracks. What is measured on it says nothing about large audio language models.

```python
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
```

Its window is 6 s; the weights are stored as 16-bit numbers and load as 32-bit ones.

## How it was made

    {command}

The clips it learned from ({clips:,} of 0.5 to 3 s, {long_clips:,} of 3 to 6 s) are made by `sounds.py`: speech is
numbers read by espeak-ng, where the language is the voice's, the gender one of its variants and the emotion a range of
speeds and pitches; animals are sketches of their calls in numpy. White noise lies over all of them. First the audio
part learned alone ({hearing_steps} steps), then the text stack on its embeddings ({reading_steps} steps). The answer
was trained in all prompt forms that play the clip.

## Figures

Accuracy on {held_out} held-out clips (another seed), half of them noisy (3 to 30 dB), half drowned in noise (-12 to 0
dB): the share of clips whose true label is more probable than the track's other labels after the prompt. Measured on
the saved checkpoint, through the processor. Chance is one over the number of labels; "one label" is what always giving
the same answer gets at best. The two last columns are controls: every clip replaced by silence of the same length (the
highest of the three forms), and the question asked without a clip (`{blind}`).

{accuracies}

The same by noise, with `{form}`:

{by_noise}

The information score by layer, `{form}`, last position, drowned clips:

{by_layer}

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


def share(right: Right, name: str) -> float:
    """The last layer's share of right answers."""
    return right[name][-1].float().mean().item()


def accuracy_table(toy: Toy, clips: list[Clip]) -> str:
    """Accuracy by track: in the forms, with the clips silenced (the best of the forms), and without a clip."""
    forms = [PromptForm.parse(form) for form in FORMS]
    heard = [right_answers(toy, clips, form) for form in forms]
    silent = [right_answers(toy, silenced(clips), form) for form in forms]
    blind = right_answers(toy, clips, PromptForm.parse(BLIND))
    rows = []
    for name, track in TRACKS.items():
        shares = [share(right, name) for right in heard]
        controls = [max(share(right, name) for right in silent), share(blind, name)]
        counts = Counter(clip.labels[name] for clip in clips if name in clip.labels)
        chances = [1 / len(track.labels), max(counts.values()) / counts.total()]
        numbers = [f"{number:.3f}" for number in (*chances, *shares, *controls)]
        rows.append([name, str(counts.total()), *numbers])
    return table(
        ["track", "clips", "chance", "one label", *(f"`{form}`" for form in FORMS), "silence", "no clip"], rows
    )


def noise_table(noisy: Right, drowned: Right) -> str:
    """Accuracy by track and noise."""
    rows = [[name, f"{share(noisy, name):.3f}", f"{share(drowned, name):.3f}"] for name in TRACKS]
    return table(["track", "noisy", "drowned"], rows)


def layer_table(right: Right) -> str:
    """The information score by track and layer."""
    rows = [[name, *(f"{score:.2f}" for score in right[name].float().mean(1).tolist())] for name in TRACKS]
    return table(["track", *(f"layer {layer}" for layer in range(len(rows[0]) - 1))], rows)


def shipped_table(right: Right) -> str:
    """How many answers about the shipped clips are right."""
    return table(["track", "right", "clips"], [[n, str(int(r[-1].sum())), str(r.shape[1])] for n, r in right.items()])


def write_card(toy: Toy, seed: int, shipped: Right, facts: dict[str, object]) -> str:
    """Measure the toy on held-out clips and write the card.

    Args:
        shipped: which answers about the shipped clips are right.
        facts: how the toy was made; ``command``, ``clips``, ``long_clips``, ``hearing_steps``, ``reading_steps``.
    """
    form = PromptForm.parse(FORMS[0])
    noisy, drowned = make_clips(HELD_OUT, seed, noise=NOISY), make_clips(HELD_OUT, seed + 1, noise=DROWNED)
    right_noisy, right_drowned = right_answers(toy, noisy, form), right_answers(toy, drowned, form)
    return TEXT.format(
        **facts,
        parameters=sum(parameter.numel() for parameter in toy.model.parameters()) / 1e6,
        held_out=2 * HELD_OUT,
        form=form,
        blind=BLIND,
        accuracies=accuracy_table(toy, noisy + drowned),
        by_noise=noise_table(right_noisy, right_drowned),
        by_layer=layer_table(right_drowned),
        shipped_clips=sum(QUOTAS.values()),
        shipped=shipped_table(shipped),
    )
