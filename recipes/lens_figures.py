"""Pictures of layers: scores by layer, and layers by positions. They draw tables and know no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audio_lens_plugin.recipes.figure_style import COLOURS, QUIET, colour_of, heat, line_with_band, open_frame

OUTCOMES = {"success": (COLOURS[0], "answered rightly"), "failure": (COLOURS[1], "answered wrongly")}


def scores_by_layer(information: pd.DataFrame, curves: pd.DataFrame, critical: float | None, title: str) -> Figure:
    """Information score of every span beside the success and failure curves of the last position.

    Args:
        information: columns ``span, layer, score, low, high, chance``.
        curves: columns ``span, outcome, layer, probability, low, high, samples``.
        critical: the critical layer, marked where it is defined.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    _draw_information(left, information, critical)
    left.set_title(title, fontsize=10, loc="left")
    _draw_curves(right, curves[curves["span"] == "last"])
    right.set_title("true label at the last position", fontsize=10, loc="left")
    for axes in (left, right):
        axes.set(xlabel="layer (0 = embeddings)", ylim=(-0.02, 1.08))
        open_frame(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def models_side_by_side(scores: pd.DataFrame) -> Figure:
    """Information score at the last position, one panel per track, one line per model.

    Args:
        scores: columns ``track, model, layer, depth, score, low, high, chance, critical``: depth is the layer as a
            share of its model's layers, so that models of different depth can be laid over each other; critical is the
            critical layer as such a share, NaN where it is undefined.
    """
    tracks = scores.groupby("track", sort=False)
    figure, grid = plt.subplots(1, len(tracks), figsize=(3.2 * len(tracks), 3.6), layout="constrained", squeeze=False)
    for axes, (track, of_track) in zip(grid[0], tracks, strict=True):
        for index, (model, part) in enumerate(of_track.groupby("model", sort=False)):
            colour = colour_of(index)
            line_with_band(axes, part, "score", colour, str(model), along="depth", opacity=0.07)
            axes.axvline(part["critical"].iloc[0], color=colour, linestyle="--", linewidth=1)
        axes.axhline(of_track["chance"].iloc[0], color=QUIET, linestyle=":", linewidth=1)
        axes.set_title(str(track), fontsize=10, loc="left")
        axes.set(xlabel="depth (share of layers)", ylim=(-0.02, 1.08))
        open_frame(axes)
    grid[0, 0].set_ylabel("information score, last position")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=len(names))
    return figure


def sample_heatmap(values: Float[np.ndarray, "layers positions"], rows: pd.DataFrame, label: str, title: str) -> Figure:
    """Layers by positions of one sample.

    Args:
        values: probability of ``label``.
        rows: one line per position, in the order of the sequence: ``token`` and ``start`` (seconds; NaN: no audio).
    """
    figure, axes = plt.subplots(figsize=(max(5.0, 0.12 * len(rows) + 1.6), 3.4), layout="constrained")
    image = heat(axes, values)
    axes.set_yticks(range(0, len(values), max(1, len(values) // 8)))
    axes.set_ylabel("layer (0 = embeddings)")
    texts = _position_texts(rows)
    shown = [index for index, text in enumerate(texts) if text]
    axes.set_xticks(shown, [texts[index] for index in shown], rotation=90, fontsize=7)
    audio = rows["start"].notna().to_numpy()
    for edge in np.flatnonzero(audio[1:] != audio[:-1]) + 0.5:
        axes.axvline(edge, color="white", linewidth=0.8)
    figure.colorbar(image, ax=axes, label=f"p({label!r})", pad=0.01)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def label_heatmaps(
    values: Mapping[str, Float[np.ndarray, "layers labels"]], labels: Sequence[str], position: str
) -> Figure:
    """Layers by labels, one panel per sample: the probability of each label at one position."""
    figure, grid = plt.subplots(
        1, len(values), figsize=(2.6 * len(values) + 1.2, 3.4), layout="constrained", squeeze=False
    )
    for axes, (title, of_sample) in zip(grid[0], values.items(), strict=True):
        image = heat(axes, of_sample)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes.set_title(title, fontsize=9)
    grid[0, 0].set_ylabel("layer (0 = embeddings)")
    figure.colorbar(image, ax=grid[0, -1], label=f"p(label) at the {position} position")
    return figure


def _draw_information(axes: Axes, table: pd.DataFrame, critical: float | None) -> None:
    for index, (span, part) in enumerate(table.groupby("span", sort=False)):
        line_with_band(axes, part, "score", colour_of(index), str(span))
    axes.axhline(table["chance"].iloc[0], color=QUIET, linestyle=":", linewidth=1, label="chance")
    axes.set_ylabel("information score")
    if critical is not None:
        axes.axvline(critical, color=QUIET, linestyle="--", linewidth=1, label=f"critical layer {critical:.2f}")


def _draw_curves(axes: Axes, table: pd.DataFrame) -> None:
    axes.set_ylabel("p(true label)")
    for outcome, part in table.groupby("outcome", sort=False):
        colour, words = OUTCOMES[str(outcome)]
        if count := int(part["samples"].iloc[0]):
            line_with_band(axes, part, "probability", colour, f"{words} (n = {count})")


def _position_texts(rows: pd.DataFrame) -> list[str]:
    """Tokens where there are words; for audio, seconds at every half second."""
    texts, marked = [], -1
    for token, start in zip(rows["token"], rows["start"], strict=True):
        half_seconds = -1 if np.isnan(start) else int(2 * start)
        if half_seconds < 0:
            texts.append(token.replace("\n", "⏎").strip() or "␣")
        else:
            texts.append(f"{half_seconds / 2:.1f} s" if half_seconds != marked else "")
        marked = half_seconds
    return texts
