"""The pictures of a run: they draw its tables, track by track, and know no model.

Each comes with words for those who do not see it (``alt``) and a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audio_lens_plugin.paper.design import CLIP, NO_AUDIO, SILENCE
from audio_lens_plugin.paper.folder import write_figure
from audio_lens_plugin.recipes.causal_figures import before_after, effect_heatmap
from audio_lens_plugin.recipes.figure_style import COLOURS, QUIET, colour_of, line_with_band, open_frame
from audio_lens_plugin.report import Picture, picture

COLUMNS = 2
HEIGHT = 2.4  # of a panel, in inches
LETTER, HANDLE = 0.062, 0.6  # inches: the mean width of a letter of a legend, what stands beside its words
EMBEDDINGS = "layer (0 = embeddings)"
CONTROL_COLOURS = {CLIP: COLOURS[0], SILENCE: COLOURS[1], NO_AUDIO: COLOURS[4]}
OUTCOMES = {"success": ("answered rightly", COLOURS[0]), "failure": ("answered wrongly", COLOURS[1])}


class Drawn(NamedTuple):
    """A figure, the words that stand for it, and those below it."""

    figure: Figure
    alt: str
    caption: str


def keep(folder: Path, drawn: Iterable[tuple[str, Drawn]]) -> dict[str, Picture]:
    """Write figures into a folder, one at a time; returns them as a report shows them, by their names."""
    kept = {}
    for name, one in drawn:
        write_figure(folder, name, one.figure)
        kept[name] = picture(one.figure, alt=one.alt, caption=one.caption)
    return kept


def accuracy(table: pd.DataFrame) -> Drawn:
    """Accuracy restricted to labels by prompt form and control, and of free answers."""
    restricted, free = (table[table["measure"] == measure] for measure in ("labels", "free"))

    def draw(axes: Axes, track: str) -> None:
        forms = list(dict.fromkeys(table.loc[table["track"] == track, "form"]))
        for place, (control, colour) in enumerate(CONTROL_COLOURS.items()):
            part = _of(restricted, track, control=control)
            _dots(axes, part, forms, 0.18 * (place - 1), colour, control)
        _dots(axes, _of(free, track, control=CLIP), forms, 0.36, COLOURS[2], "clip, free answer")
        axes.axvline(_of(table, track)["chance"].iloc[0], color=QUIET, linestyle=":", linewidth=1, label="chance")
        axes.set_yticks(range(len(forms)), forms, fontsize=7)
        axes.set(xlim=(-0.02, 1.02), xlabel="accuracy", ylim=(len(forms) - 0.4, -0.6))

    heights = [0.34 * forms + 1.4 for forms in table.groupby("track", sort=False)["form"].nunique()]
    named = restricted.assign(of=restricted["track"] + ", " + restricted["control"])
    said = "; ".join(f"{of}: {value:.2f}" for of, value in named.groupby("of", sort=False)["value"].mean().items())
    return Drawn(
        _panels(_tracks(table), draw, width=4.4, heights=heights, own_rows=True),
        f"Accuracy by track, prompt form and control. Means over forms: {said}.",
        "Share of right answers, restricted to the labels (with the clip, with silence of the same length, without "
        "audio) and said freely, with 95 % bootstrap intervals over clips; dotted: chance.",
    )


def information(table: pd.DataFrame, forms: Mapping[str, str]) -> Drawn:
    """Information score by layer at each span, one form per track; the last position under silence beside it."""

    def draw(axes: Axes, track: str) -> None:
        heard = _of(table, track, control=CLIP)
        of_form = heard[(heard["form"] == forms[track]) | (heard["span"] == "audio")]
        for index, (span, part) in enumerate(of_form.groupby("span", sort=False)):
            line_with_band(axes, part, "score", colour_of(index), str(span), opacity=0.12)
        silent = _of(table, track, control=SILENCE, form=forms[track], span="last")
        axes.plot(silent["layer"], silent["score"], color=QUIET, linestyle="--", linewidth=1.2, label="last, silence")
        axes.axhline(heard["chance"].iloc[0], color=QUIET, linestyle=":", linewidth=1, label="chance")
        _by_layer(axes)

    last = table[(table["span"] == "last") & (table["control"] == CLIP)]
    said = []
    for track, form in forms.items():
        best = _of(last, track, form=form).nlargest(1, "score").iloc[0]
        said.append(f"{track}: {best['score']:.2f} after layer {best['layer']:.0f}")
    return Drawn(
        _panels(list(forms), draw, ylabel="information score"),
        f"Information score by layer, one panel per track. Highest at the last position: {'; '.join(said)}.",
        f"Share of clips whose true label is on top among the labels, by layer, {_forms(forms)}. "
        "Bands: 95 % bootstrap intervals over clips.",
    )


def forms_by_layer(table: pd.DataFrame, track: str) -> Drawn:
    """Information score at the last position, every form of a track."""
    last = _of(table, track, control=CLIP, span="last").rename(columns={"form": "prompt form"})
    best = last.nlargest(1, "score").iloc[0]
    title = f"{track}, last position, n = {last['samples'].iloc[0]} clips"
    return Drawn(
        effect_heatmap(
            last.rename(columns={"layer": EMBEDDINGS}),
            "prompt form",
            EMBEDDINGS,
            "score",
            title,
            "information score",
            fraction=True,
        ),
        f"{track}: information score at the last position by prompt form and layer; the highest is "
        f"{best['score']:.2f}, {best['prompt form']} after layer {best['layer']:.0f}.",
        f"{track}: information score at the last position, in every prompt form.",
    )


def question_words(table: pd.DataFrame, track: str, form: str) -> Drawn:
    """Information score at each word of the question."""
    words = _of(table, track, control=CLIP, form=form)
    best = words.nlargest(1, "score").iloc[0]
    numbered = [f"{number + 1} {text}" for number, text in zip(words["word"], words["text"], strict=True)]
    named = words.rename(columns={"layer": EMBEDDINGS}).assign(**{"word of the question": numbered})
    return Drawn(
        effect_heatmap(
            named, EMBEDDINGS, "word of the question", "score", f"{track}, {form}", "information score", fraction=True
        ),
        f"{track}: information score at each word of the question by layer; the highest is {best['score']:.2f} at "
        f"'{best['text']}' after layer {best['layer']}.",
        f"{track}: information score at the last token of each word of the question, prompt form {form}.",
    )


def curves(table: pd.DataFrame, forms: Mapping[str, str]) -> Drawn:
    """Probability of the true label by layer over clips answered rightly and wrongly."""

    def draw(axes: Axes, track: str) -> None:
        part = _of(table, track, control=CLIP, form=forms[track], span="last")
        for outcome, of_outcome in part.groupby("outcome", sort=False):
            words, colour = OUTCOMES[str(outcome)]
            if of_outcome["samples"].iloc[0]:
                line_with_band(axes, of_outcome, "probability", colour, words, opacity=0.15)
        counts = part.groupby("outcome")["samples"].first()
        axes.set_title(f"{counts['success']} right, {counts['failure']} wrong", fontsize=8, color=QUIET, loc="right")
        _by_layer(axes)

    return Drawn(
        _panels(list(forms), draw, ylabel="p(true label)"),
        "Probability of the true label at the last position by layer, over clips that are answered rightly and "
        f"wrongly, one panel per track: {', '.join(forms)}.",
        f"Mean probability of the true label at the last position by layer, {_forms(forms)}. Bands: 95 % bootstrap "
        "intervals over clips.",
    )


def critical_layers(table: pd.DataFrame, by: str = "track") -> Drawn:
    """Critical layer, as a share of the depth, against accuracy."""
    figure, axes = plt.subplots(figsize=(6.2, 4.2), layout="constrained")
    known = table[table["layer"].notna()]
    for index, (name, part) in enumerate(known.groupby(by, sort=False)):
        depth = part["layer"] / part["layers"]
        reach = np.abs(part[["low", "high"]].to_numpy(float).T / part["layers"].to_numpy() - depth.to_numpy())
        axes.errorbar(
            depth, part["accuracy"], xerr=reach, fmt="o", markersize=4, elinewidth=0.5, alpha=0.8,
            color=colour_of(index), label=str(name),
        )  # fmt: skip
    axes.set(xlabel="critical layer, as a share of the layers", ylabel="accuracy", ylim=(-0.02, 1.05))
    open_frame(axes)
    if len(known):
        _legend(figure, *axes.get_legend_handles_labels())
    return Drawn(
        figure,
        f"Critical layer against accuracy, {len(known)} points of {len(table)}: the others have no critical layer.",
        f"One point per prompt form and {by}: critical layer at the last position, as a share of the model's layers, "
        "with its 95 % bootstrap interval over clips, against accuracy restricted to the labels.",
    )


def attribute_share(table: pd.DataFrame, forms: Mapping[str, str]) -> Drawn:
    """Information at other spans as a share of that at the last position."""

    def draw(axes: Axes, track: str) -> None:
        part = _of(table, track)
        spans = list(dict.fromkeys(part["span"]))
        chosen = part[(part["form"] == forms[track]) | (part["span"] == "audio")]
        _dots(axes, chosen.rename(columns={"share": "value"}), spans, 0.0, COLOURS[0], None, along="span")
        axes.axvline(1.0, color=QUIET, linestyle=":", linewidth=1)
        axes.axvline(0.0, color=QUIET, linewidth=0.8)
        axes.set_yticks(range(len(spans)), spans, fontsize=8)
        axes.set(xlabel="share", ylim=(len(spans) - 0.4, -0.6), xlim=(-1.0, 2.0))

    said = "; ".join(
        f"{track} {line['span']} {_number(line['share'])}"
        for track, form in forms.items()
        for _, line in _of(table, track, form=form).iterrows()
    )
    return Drawn(
        _panels(list(forms), draw, heights=[2.0] * len(forms), own_rows=True),
        f"Information at other positions as a share of that at the last one. {said}.",
        f"Information score above chance, summed over layers, divided by the same at the last position (dotted: as "
        f"much), {_forms(forms)}. What lies beyond the frame is in the table.",
    )


def knockout(table: pd.DataFrame, forms: Mapping[str, str]) -> Drawn:
    """What is lost where the last position cannot read the audio, beside the control."""
    chosen = table[(table["queries"] == "last") & (table["keys"] == "audio")]
    names = {"probability": "value", "probability_low": "low", "probability_high": "high"}

    def draw(axes: Axes, track: str) -> None:
        for index, (cut, part) in enumerate(_of(chosen, track).rename(columns=names).groupby("cut", sort=False)):
            words = "last → audio" if cut == "keys" else "as many other keys"
            line_with_band(axes, part, "value", colour_of(index), words)
            sure = part[part["p_of_all"] < 0.05]
            axes.plot(sure["layer"], sure["value"], "*", color=colour_of(index), markersize=9)
        axes.axhline(0.0, color=QUIET, linestyle=":", linewidth=1)
        axes.set(xlabel="layer (0 = first block)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    said = []
    for track in forms:
        worst = _of(chosen, track, cut="keys").nsmallest(1, "probability").iloc[0]
        said.append(f"{track}: {worst['probability']:+.2f} around layer {worst['layer']:.0f}")
    return Drawn(
        _panels(list(forms), draw, ylabel="change of p(truth)"),
        f"Change of the probability of the true label where the last position cannot read the audio, by layer. "
        f"Largest loss: {'; '.join(said)}.",
        f"Change of p(truth) where the last position cannot read the audio in a window of layers, by its middle, "
        f"{_forms(forms)}, beside as many other keys drawn by chance. Stars: p < 0.05 of all windows together.",
    )


def knockout_pairs(table: pd.DataFrame, track: str) -> Drawn:
    """Every pair of queries and keys by layer."""
    mine = _of(table, track, cut="keys")
    mine = mine.assign(pair=mine["queries"] + " → " + mine["keys"])
    worst = mine.nsmallest(1, "probability").iloc[0]
    title = f"{track}, queries → keys cut, n = {mine['samples'].iloc[0]} clips"
    return Drawn(
        effect_heatmap(mine, "pair", "layer", "probability", title, "change of p(truth)"),
        f"{track}: change of the probability of the true label by pair of queries and keys and by layer; the largest "
        f"loss is {worst['probability']:+.2f}, {worst['pair']} around layer {worst['layer']:.0f}.",
        f"{track}: change of p(truth) where queries cannot read keys, by the middle of the window of layers.",
    )


def patching(table: pd.DataFrame, track: str) -> Drawn:
    """What a state brings back, by position and layer."""
    mine = _of(table, track)
    mine = mine[mine["position"] != "all"]  # to patch everything says nothing
    best = mine.nlargest(1, "value").iloc[0]
    title = f"{track}, states of the clip put into silence, n = {mine['samples'].iloc[0]} clips"
    return Drawn(
        effect_heatmap(mine, "position", "layer", "value", title, "recovered share", fraction=True),
        f"{track}: recovered share of the difference in logits by position and layer; the most is {best['value']:.2f} "
        f"at {best['position']} before layer {best['layer']:.0f}.",
        f"{track}: share of the difference in logits that a state of the clip's run brings back into a run that hears "
        "silence, by position and layer (0 = as with silence, 1 = as with the clip).",
    )


def grounding(table: pd.DataFrame) -> Drawn:
    """By layer, how much of what decides the answer is still at the audio positions."""

    def draw(axes: Axes, track: str) -> None:
        line_with_band(axes, _of(table, track), "value", COLOURS[0], "audio / all positions")
        axes.axhline(0.0, color=QUIET, linestyle=":", linewidth=1)
        axes.set(xlabel="layer (0 = first block)", ylim=(-0.6, 1.6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    tracks = _tracks(table)
    said = "; ".join(
        f"{track} {_number(part['value'].iloc[0])} to {_number(part['value'].iloc[-1])}"
        for track, part in table.groupby("track", sort=False)
    )
    return Drawn(
        _panels(tracks, draw, ylabel="grounding"),
        f"Grounding by layer, from the first block to the last: {said}.",
        "Effect of patching the audio positions over that of patching all positions, by layer, with 95 % bootstrap "
        "intervals over clips.",
    )


def enhancement(table: pd.DataFrame, by: str = "track") -> Drawn:
    """Accuracy on held-out clips before and after."""
    said = "; ".join(f"{line[by]} {line['before']:.2f} to {line['after']:.2f}" for _, line in table.iterrows())
    return Drawn(
        before_after(table.assign(setting=table[by]), "held-out clips"),
        f"Accuracy on held-out clips before and after the enhancement: {said}.",
        "Accuracy on held-out clips before and after the enhancement that did best on the development clips, with "
        "95 % bootstrap intervals; dotted: chance.",
    )


def enhancement_grid(table: pd.DataFrame, track: str) -> Drawn:
    """Change of accuracy on the development clips by source and target layer."""
    mine = _of(table, track).rename(columns={"source": "source layer", "target": "target layer"})
    best = mine.nlargest(1, "change").iloc[0]
    title = f"{track}, development clips (n = {mine['samples'].iloc[0]})"
    return Drawn(
        effect_heatmap(mine, "source layer", "target layer", "change", title, "change of accuracy"),
        f"{track}: change of accuracy on the development clips by source and target layer; the highest is "
        f"{best['change']:+.2f}, layer {best['source layer']:.0f} into {best['target layer']:.0f}.",
        f"{track}: change of accuracy on the development clips. The choice was made by these: they are no result.",
    )


def _tracks(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["track"]))


def _of(table: pd.DataFrame, track: str, **columns: str) -> pd.DataFrame:
    chosen = table["track"] == track
    for name, value in columns.items():
        chosen &= table[name] == value
    return table[chosen]


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}"


def _forms(forms: Mapping[str, str]) -> str:
    return f"prompt form {', '.join(dict.fromkeys(forms.values()))}"


def _dots(
    axes: Axes,
    table: pd.DataFrame,
    names: Sequence[str],
    aside: float,
    colour: str,
    label: str | None,
    along: str = "form",
) -> None:
    """Numbers with their intervals, one line of the picture per name."""
    if table.empty:
        return
    places = np.array([names.index(name) for name in table[along]]) + aside
    reach = np.abs(table[["low", "high"]].to_numpy(float).T - table["value"].to_numpy(float))
    axes.errorbar(
        table["value"], places, xerr=reach, fmt="o", markersize=3.5, elinewidth=0.8, color=colour, label=label
    )


def _by_layer(axes: Axes) -> None:
    axes.set(xlabel=EMBEDDINGS, ylim=(-0.02, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _panels(
    tracks: Sequence[str],
    draw: Callable[[Axes, str], None],
    *,
    ylabel: str = "",
    width: float = 3.1,
    heights: Sequence[float] | None = None,
    own_rows: bool = False,
) -> Figure:
    """One panel per track, with one legend.

    Args:
        heights: of the panels, in inches.
        own_rows: each panel has rows of its own, so that axes are not shared.
    """
    heights = heights or [HEIGHT] * len(tracks)
    across = min(COLUMNS, len(tracks))
    down = -(-len(tracks) // across)
    of_rows = [max(heights[row * across : (row + 1) * across]) for row in range(down)]
    figure, grid = plt.subplots(
        down, across, figsize=(width * across + 0.6, sum(of_rows) + 0.5), layout="constrained", squeeze=False,
        sharey=not own_rows, height_ratios=of_rows,
    )  # fmt: skip
    handles: dict[str, Any] = {}  # those of error bars are no artists
    for axes, track in zip(grid.flat, tracks, strict=False):
        draw(axes, track)
        axes.set_title(track, fontsize=10, loc="left")
        open_frame(axes)
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid.flat[len(tracks) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    if len(handles) > 1:
        _legend(figure, list(handles.values()), list(handles))
    return figure


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the panels, in as many columns as the figure is wide."""
    columns = int(figure.get_figwidth() / (HANDLE + LETTER * max(map(len, names))))
    figure.legend(handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=max(columns, 1))
