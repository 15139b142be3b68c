"""The demo: a toy model, the clips that ship with it, and a report about all four attributes.

It is also the shortest complete example of the package: load, ask, read every layer, look.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console

from audio_lens_plugin.datasets import ClipSet, toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load, toys
from audio_lens_plugin.prompts import with_clips
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.report import Section, html_table, lens_section, subtitle_of, write_report
from audio_lens_plugin.tracks import TRACKS

FORM = "reversed+is"
POSITIONS = ("audio", "answer", "attribute", "last")


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
    results, lines = {}, []
    for name, clips in sets.items():
        results[name] = logit_lens(lalm, clips.samples(FORM), clips.track.labels, POSITIONS, form=FORM)
        results[name].save(out / name)
        _save_pictures(results[name], out / name)
        lines.append(_summary(lalm, name, clips, results[name]))
        console.print("  ".join(f"{key}: {value}" for key, value in lines[-1].items()), highlight=False)
    sections = [_opening(lines), Section("What the model is asked", (_ASKED,), listing=shown)]
    sections += [lens_section(results[name], name, _examples(results[name], sets[name])) for name in sets]
    return write_report(out / "report.html", f"Audio lens: {model}", subtitle_of(results["Animal"]), sections)


_ASKED = (
    "A prompt is a clip, the model's chat template, and an assistant's turn left open. Every position of the sequence "
    "has one role; audio positions know which part of the clip they hear."
)


def _summary(lalm: LALM, name: str, clips: ClipSet, result: LensResult) -> dict[str, str]:
    """One line of the first table; the silence control runs the same prompts on silent clips."""
    silent = [
        replace(sample, prompt=with_clips(sample.prompt, [clip.silenced() for clip in sample.prompt.clips]))
        for sample in clips.samples(FORM)
    ]
    control = logit_lens(lalm, silent, clips.track.labels, form=FORM)
    return {
        "attribute": name,
        "clips": str(len(clips)),
        "accuracy": f"{result.accuracy:.2f}",
        "with silence": f"{control.accuracy:.2f}",
        "chance": f"{1 / len(clips.track.labels):.2f}",
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


def _examples(result: LensResult, clips: ClipSet) -> list:
    """The first clip that is answered rightly and the first that is not."""
    right = (result.samples["truth"] == result.samples["answer"]).tolist()
    found = [right.index(outcome) for outcome in (True, False) if outcome in right]
    return [(index, clips.samples(FORM)[index].prompt.clips[0]) for index in found]
