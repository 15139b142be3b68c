"""The demo: toy models, the clips that ship with them, and a report about all four attributes, models side by side.

It is also the shortest complete example of the package: load, ask, read every layer, look, and then edit: what the lens
sees of one model and one attribute is followed to its causes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console

from audio_lens_plugin.causal_sections import enhance_section, heads_section, knockout_section, patch_section
from audio_lens_plugin.datasets import Samples, toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load, toys
from audio_lens_plugin.recipes.activation_patching import activation_patching
from audio_lens_plugin.recipes.attention_knockout import attention_knockout
from audio_lens_plugin.recipes.enhancement import enhance_sweep
from audio_lens_plugin.recipes.figure_style import save_figure
from audio_lens_plugin.recipes.lens_figures import models_side_by_side
from audio_lens_plugin.recipes.listening_heads import listening_heads
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.recipes.pairs import pairs_from
from audio_lens_plugin.recipes.scores import CellResult
from audio_lens_plugin.report import (
    Section,
    html_table,
    lens_section,
    picture,
    right_and_wrong,
    subtitle_of,
    write_report,
)
from audio_lens_plugin.tracks import TRACKS

FORM = "reversed+is"
POSITIONS = ("audio", "answer", "attribute", "last")
CAUSAL_TOY, CAUSAL_TRACK, CAUSAL_FORM = "toy/qwen2-audio", "Animal", "reversed+is+question"
PATCHED = ("audio", "question", "attribute", "answer", "last")
ASKED = (
    "A prompt is a clip, the model's chat template, and an assistant's turn left open.",
    "Every position of the sequence has one role; audio positions know which part of the clip they hear, where the "
    "model keeps time.",
)
TOYS = (
    "Toys: tiny models of the real classes, trained on synthetic speech and sounds.",
    "They show how the tools work and how a listening model looks from inside; their numbers say nothing about real "
    "models.",
)
CAUSAL_CAVEAT = "A toy, one attribute, and the few clips that ship with it; enhancement tries one coefficient."


@dataclass(frozen=True)
class Look:
    """What the demo saw of one model: a printed prompt, and one result, its samples and its summary per track."""

    shown: str
    results: Mapping[str, LensResult]
    samples: Mapping[str, Samples]
    lines: Sequence[dict[str, str]]


def run_demo(models: Sequence[str], out: Path, console: Console) -> Path:
    """Run the lens on the four attributes for each model, edit one, and write ``report.html``; returns its path.

    Raises:
        LoadError: a model that is not on the shelf of toys.
    """
    for model in models:
        if model not in toys():
            raise LoadError(f"the demo runs on toys ({', '.join(toys())}); for {model!r} use `audio-lens run lens`.")
    looks = {model: _look(model, out / model.removeprefix("toy/"), console) for model in models}
    sections = [_opening(looks)]
    if len(models) > 1:
        sections.append(_side_by_side(looks, out))
    sections += [section for model, look in looks.items() for section in _sections(model, look)]
    sections += _causes(CAUSAL_TOY if CAUSAL_TOY in models else models[0], out, console)
    (any_result, *_) = looks[models[0]].results.values()
    subtitle = subtitle_of(any_result).replace(models[0], ", ".join(models))
    return write_report(out / "report.html", f"Audio lens: {', '.join(models)}", subtitle, sections)


def _look(model: str, out: Path, console: Console) -> Look:
    lalm = load(model)
    samples = {track: toy_clips(model, track).samples(FORM) for track in TRACKS}
    console.print(f"{model}: a toy, {lalm.n_layers} layers. One prompt, every position labelled:\n")
    shown = str(lalm.batch([samples["Animal"][0].prompt]))
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    results, lines = {}, []
    for name, asked in samples.items():
        results[name] = logit_lens(lalm, asked, TRACKS[name].labels, POSITIONS, form=FORM)
        results[name].save(out / name)
        _save_pictures(results[name], asked, out / name)
        lines.append({"model": model, **_summary(lalm, name, asked, results[name])})
        console.print("  ".join(f"{key}: {value}" for key, value in lines[-1].items()), highlight=False, soft_wrap=True)
    console.print()
    return Look(shown, results, samples, lines)


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


def _save_pictures(result: LensResult, samples: Samples, stem: Path) -> None:
    """Scores of all clips, and the clip whose answer is the surest, as PNG beside the tables."""
    surest = int(result.log_probs[-1, _last_rows(result)].amax(-1).argmax())
    sample = result.plot_sample(surest, clip=samples[surest].prompt.clips[0])
    for name, figure in (("scores", result.plot()), ("clip", sample)):
        save_figure(figure, stem.with_name(f"{stem.name.lower()}_{name}.png"), "png")
        plt.close(figure)


def _last_rows(result: LensResult) -> list[int]:
    return result.rows.index[result.rows["span"] == "last"].tolist()


def _opening(looks: Mapping[str, Look]) -> Section:
    return Section(
        "At a glance",
        TOYS,
        table=html_table(pd.DataFrame([line for look in looks.values() for line in look.lines])),
        caveat="The shipped clips are held out from training and chosen so that about half are answered wrongly in at "
        "least one attribute; a toy's accuracy on all held-out clips is in its model card.",
    )


def _side_by_side(looks: Mapping[str, Look], out: Path) -> Section:
    figure = models_side_by_side(pd.concat([_depths(model, look) for model, look in looks.items()]))
    save_figure(figure, out / "side_by_side.png", "png")
    return Section(
        "The models side by side",
        ("The same recipe, the same names, whatever the model: where does the answer appear on the way through it?",),
        figures=(
            picture(
                figure,
                alt=f"Information score at the last position by depth for {', '.join(looks)}, one panel per attribute",
                caption="Share of clips whose true label is on top among the labels, by depth, with bootstrap "
                "intervals over clips; dashed: the critical layer, dotted: chance. Each toy is shown its own clips.",
            ),
        ),
    )


def _depths(model: str, look: Look) -> pd.DataFrame:
    """The scores at the last position, with layers as shares of the model's depth."""
    tables = []
    for track, result in look.results.items():
        score = result.information()
        at_last = score[score["span"] == "last"]
        layers, critical = at_last["layer"].max(), result.critical_layer().layer
        depth = {"depth": at_last["layer"] / layers, "critical": np.nan if critical is None else critical / layers}
        tables.append(at_last.assign(track=track, model=model, **depth))
    return pd.concat(tables)


def _sections(model: str, look: Look) -> list[Section]:
    asked = Section(f"{model}: what it is asked", ASKED, listing=look.shown)
    lenses = [
        lens_section(result, f"{model}: {track}", right_and_wrong(result, look.samples[track]))
        for track, result in look.results.items()
    ]
    return [replace(section, group=model) for section in (asked, *lenses)]


def _causes(model: str, out: Path, console: Console) -> list[Section]:
    """Every causal recipe once: one model, one attribute, the clips that ship with it."""
    samples = toy_clips(model, CAUSAL_TRACK).samples(CAUSAL_FORM)
    labels, form = TRACKS[CAUSAL_TRACK].labels, CAUSAL_FORM
    lalm = load(model, attn_implementation="eager")  # heads show their weights under eager attention alone
    pairs = pairs_from(samples, "other")
    patched = activation_patching(lalm, pairs, labels, positions=PATCHED, how="resample", form=form)
    cut = attention_knockout(lalm, samples, labels, "last", "audio", form=form)
    listening = listening_heads(lalm, samples, labels, form=form)
    enhanced = enhance_sweep(lalm, samples, labels, coefficients=(1.0,), form=form)
    about = f"{model}: {CAUSAL_TRACK}"
    sections = [
        patch_section(patched, f"{about}, patched"),
        knockout_section(cut, f"{about}, attention cut"),
        heads_section(listening, f"{about}, heads that listen"),
        enhance_section(enhanced, f"{about}, enhanced"),
    ]
    folder = out / model.removeprefix("toy/")
    results: list[CellResult] = [patched, cut, listening, enhanced]
    for result, section in zip(results, sections, strict=True):
        result.save(folder / result.recipe)
        console.print(f"{section.title}: {section.text[0]}", markup=False, highlight=False, soft_wrap=True)
    return [replace(section, group="Causes", caveat=f"{CAUSAL_CAVEAT} {section.caveat}") for section in sections]
