"""The demo: a toy model, the clips that ship with it, and a report about all four attributes.

It is also the shortest complete example of the package: load, ask, read every layer, look.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console

from audio_lens_plugin.datasets import Samples, toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load, toys
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.report import Section, html_table, lens_section, right_and_wrong, subtitle_of, write_report
from audio_lens_plugin.tracks import TRACKS

FORM = "reversed+is"
POSITIONS = ("audio", "answer", "attribute", "last")
ASKED = (
    "A prompt is a clip, the model's chat template, and an assistant's turn left open. Every position of the sequence "
    "has one role; audio positions know which part of the clip they hear."
)


def run_demo(model: str, out: Path, console: Console) -> Path:
    """Run the lens on the four attributes and write ``report.html``; returns its path.

    Raises:
        LoadError: ``model`` is not on the shelf of toys.
    """
    if model not in toys():
        raise LoadError(f"the demo runs on toys ({', '.join(toys())}); for {model!r} use `audio-lens run lens`.")
    lalm = load(model)
    sets = {track: toy_clips(model, track) for track in TRACKS}
    console.print(f"{model}: a toy, {lalm.n_layers} layers. One prompt, every position labelled:\n")
    shown = str(lalm.batch([sets["Animal"].samples(FORM)[0].prompt]))
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    lines, sections = [], []
    for name, clips in sets.items():
        samples = clips.samples(FORM)
        result = logit_lens(lalm, samples, clips.track.labels, POSITIONS, form=FORM)
        result.save(out / name)
        _save_pictures(result, out / name)
        lines.append(_summary(lalm, name, samples, result))
        console.print("  ".join(f"{key}: {value}" for key, value in lines[-1].items()), highlight=False, soft_wrap=True)
        sections.append(lens_section(result, name, right_and_wrong(result, samples)))
    opening = [_opening(lines), Section("What the model is asked", (ASKED,), listing=shown)]
    return write_report(out / "report.html", f"Audio lens: {model}", subtitle_of(result), [*opening, *sections])


def _summary(lalm: LALM, name: str, samples: Samples, result: LensResult) -> dict[str, str]:
    """One line of the first table; the silence control runs the same prompts on silent clips."""
    control = logit_lens(lalm, [sample.silenced() for sample in samples], result.labels, form=FORM)
    return {
        "attribute": name,
        "clips": str(len(samples)),
        "accuracy": f"{result.accuracy:.2f}",
        "with silence": f"{control.accuracy:.2f}",
        "chance": f"{1 / len(result.labels):.2f}",
        "critical layer": str(result.critical_layer()),
    }


def _save_pictures(result: LensResult, stem: Path) -> None:
    """Scores of all clips, and the clip whose answer is the surest, as PNG beside the tables."""
    surest = int(result.log_probs[-1, _last_rows(result)].amax(-1).argmax())
    for name, figure in (("scores", result.plot()), ("clip", result.plot_sample(surest))):
        figure.savefig(stem.with_name(f"{stem.name.lower()}_{name}.png"), dpi=160)
        plt.close(figure)


def _last_rows(result: LensResult) -> list[int]:
    return result.rows.index[result.rows["span"] == "last"].tolist()


def _opening(lines: list[dict[str, str]]) -> Section:
    return Section(
        "At a glance",
        (
            "A toy: a tiny model of the real classes, trained on synthetic speech and sounds. It shows how the tools "
            "work and how a listening model looks from inside; its numbers say nothing about real models.",
        ),
        table=html_table(pd.DataFrame(lines)),
        caveat="The shipped clips are held out from training and chosen so that about half are answered wrongly in at "
        "least one attribute; the toy's accuracy on all held-out clips is in its model card.",
    )
