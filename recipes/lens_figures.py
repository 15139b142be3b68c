"""Pictures of layers: scores by layer, and layers by positions. They draw tables and know no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.recipes.figure_style import COLOURS, HEAT, QUIET, colour_of, heat, line_with_band, open_frame

OUTCOMES = {"success": (COLOURS[0], "answered rightly"), "failure": (COLOURS[1], "answered wrongly")}
CELL, AUDIO_WIDTH, MARK_WIDTH = 0.12, 7.0, 0.45  # inches: a position, all audio positions at the most, a mark of time
SLICES = 800  # of a waveform, each drawn as its lowest and highest value
MARKS, STEPS, EVERY = 12, (0.5, 1, 2, 5), 8  # marks of a time axis, seconds between them; audio positions without time


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
    across = min(2, len(tracks))
    down = ceil(len(tracks) / across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.4 * across, 2.6 * down + 0.5), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(tracks) :]:
        axes.remove()
    for axes, (track, of_track) in zip(grid.flat, tracks, strict=False):
        for index, (model, part) in enumerate(of_track.groupby("model", sort=False)):
            colour = colour_of(index)
            line_with_band(axes, part, "score", colour, str(model), along="depth", opacity=0.07)
            axes.axvline(part["critical"].iloc[0], color=colour, linestyle="--", linewidth=1)
        axes.axhline(of_track["chance"].iloc[0], color=QUIET, linestyle=":", linewidth=1)
        axes.set_title(str(track), fontsize=10, loc="left")
        axes.set(xlabel="depth (share of layers)", ylim=(-0.02, 1.08))
        open_frame(axes)
        axes.set_ylabel("information score")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=across)
    return figure


def sample_heatmap(
    values: Float[np.ndarray, "layers positions"],
    rows: pd.DataFrame,
    label: str,
    title: str,
    clip: Clip | None = None,
) -> Figure:
    """Layers by positions of one sample, under the waveform of its clip. Many audio positions are drawn narrower.

    Args:
        values: probability of ``label``.
        rows: one line per position, in the order of the sequence: ``position``, ``token``, ``audio`` (does it hear?),
            and the seconds ``start`` and ``end`` of what it hears (NaN: no audio, or a model that keeps no time).
        clip: drawn above the first stretch of audio positions, each under the seconds it hears; where the model keeps
            no time, the whole clip lies over all of them. Nothing is drawn where ``rows`` have no audio.
    """
    edges = _cell_edges(rows["audio"].to_numpy())
    heard = _first_stretch(rows)
    above = clip is not None and len(heard) > 0
    figure, panels = plt.subplots(
        1 + above,
        figsize=(max(5.0, edges[-1] + 1.6), 3.4 + 0.9 * above),
        height_ratios=(1, 4)[-1 - above :],
        layout="constrained",
        squeeze=False,
    )
    if clip is not None and above:
        panels[0, 0].set_xlim(edges[0], edges[-1])
        _draw_clip(panels[0, 0], clip, rows.iloc[heard], edges[heard[0] : heard[-1] + 2])
    panels[0, 0].set_title(title, fontsize=10, loc="left")
    image = _draw_positions(panels[-1, 0], values, rows, edges)
    figure.colorbar(image, ax=panels[-1, 0], label=f"p({label!r})", pad=0.01)
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


def _draw_positions(
    axes: Axes,
    values: Float[np.ndarray, "layers positions"],
    rows: pd.DataFrame,
    edges: Float[np.ndarray, " edges"],
) -> QuadMesh:
    """The heatmap, as an image whose labels are text, with lines where audio begins and ends."""
    layers = np.arange(len(values) + 1) - 0.5
    image = axes.pcolormesh(edges, layers, values, cmap=HEAT, vmin=0.0, vmax=1.0, rasterized=True)
    axes.set_yticks(range(0, len(values), max(1, len(values) // 8)))
    axes.set_ylabel("layer (0 = embeddings)")
    texts = _position_texts(rows)
    shown = [index for index, text in enumerate(texts) if text]
    middles = (edges[1:] + edges[:-1]) / 2
    axes.set_xticks(middles[shown], [texts[index] for index in shown], rotation=90, fontsize=7)
    for change in np.flatnonzero(np.diff(rows["audio"])) + 1:
        axes.axvline(edges[change], color="white", linewidth=0.8)
    return image


def _cell_edges(audio: Bool[np.ndarray, " positions"]) -> Float[np.ndarray, " edges"]:
    """Where cells begin and end, in inches: words have room for their text, audio positions share what they have."""
    audio_cell = min(CELL, AUDIO_WIDTH / max(audio.sum(), 1))
    return np.concatenate([[0.0], np.cumsum(np.where(audio, audio_cell, CELL))])


def _first_stretch(rows: pd.DataFrame) -> Int[np.ndarray, " heard"]:
    """The first neighbouring positions that hear one clip; at the next clip seconds begin anew."""
    audio = np.flatnonzero(rows["audio"])
    steps = rows.iloc[audio][["position", "start"]].diff()
    breaks = np.flatnonzero((steps["position"] > 1) | (steps["start"] < 0))
    return audio[: breaks[0]] if len(breaks) else audio


def _draw_clip(axes: Axes, clip: Clip, heard: pd.DataFrame, edges: Float[np.ndarray, " edges"]) -> None:
    """A clip's lowest and highest values, slice by slice, each over the position that hears it."""
    ends = np.append(heard["start"], heard["end"].iloc[-1])
    if np.isnan(ends).any():
        ends = np.linspace(0.0, clip.seconds, len(edges))
    places = np.linspace(edges[0], edges[-1], SLICES + 1)
    cuts = np.rint(np.interp(places, edges, ends) * clip.rate).astype(int)
    pieces = [clip.waveform[first : past + 1] for first, past in pairwise(cuts)]
    pieces = [piece for piece in pieces if piece.size]  # the last position may hear beyond the clip's end
    lows, highs = [piece.min() for piece in pieces], [piece.max() for piece in pieces]
    middles = (places[1:] + places[:-1]) / 2
    axes.fill_between(middles[: len(pieces)], lows, highs, color=COLOURS[0], linewidth=0.4)
    largest = np.abs(clip.waveform).max() or 1.0
    axes.set(ylim=(-largest, largest), yticks=[])
    room = max(1, min(MARKS, int((edges[-1] - edges[0]) / MARK_WIDTH)))
    marks = MaxNLocator(room, steps=[1, 2, 5, 10]).tick_values(ends[0], ends[-1])
    marks = marks[(marks >= ends[0]) & (marks <= ends[-1])]
    axes.xaxis.tick_top()
    axes.set_xticks(np.interp(marks, ends, edges), [f"{mark:g} s" for mark in marks], fontsize=7)
    axes.spines[["left", "right", "bottom"]].set_visible(False)
    axes.spines["top"].set_bounds(edges[0], edges[-1])


def _position_texts(rows: pd.DataFrame) -> list[str]:
    """Tokens where there are words; of audio some seconds, or some numbers where the model keeps no time."""
    step = next((step for step in STEPS if rows["end"].max() <= MARKS * step), STEPS[-1])
    texts, count = [], 0
    for token, audio, start, end in rows[["token", "audio", "start", "end"]].itertuples(index=False):
        count = count + 1 if audio else 0
        if not audio:
            texts.append(token.replace("\n", "⏎").strip() or "␣")
        elif np.isnan(start):
            texts.append(f"audio {count}" if count % EVERY == 1 else "")
        else:
            mark = step * ceil(round(start / step, 6))
            texts.append(f"{mark:g} s" if mark < round(end, 6) else "")
    return texts
