"""Pictures of edits: effects by layer and position, lines beside their control, ranked heads, before and after.

They draw tables and know no model. Layers count from 0, the first block, at the bottom or on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from pandas.api.types import is_numeric_dtype

from audio_lens_plugin.recipes.figure_style import COLOURS, HEAT, QUIET, colour_of, heat, line_with_band, open_frame

EFFECT = "RdBu_r"
NO_VALUE: dict[str, Any] = dict(facecolor="#f1f2f4", edgecolor="#b4b9c1", hatch="////", linewidth=0)
LETTER = 0.062  # inches, the mean width of a letter of tick labels


def effect_heatmap(
    table: pd.DataFrame, rows: str, columns: str, value: str, title: str, label: str, *, fraction: bool = False
) -> Figure:
    """Layers by positions, by heads, or by other layers. Cells without a value are hatched.

    Args:
        table: one line per cell.
        rows: column of the vertical axis. Numbers count upwards; words stand in order of appearance.
        columns: column of the horizontal axis, as ``rows``.
        value: column of the numbers.
        label: what the numbers are, with their unit.
        fraction: the numbers are shares: colours from 0 to 1, pointed ends where numbers lie beyond. Otherwise they are
            effects: colours on both sides of 0, equally far.

    Raises:
        ValueError: several lines for one cell.
    """
    down, across, values = _grid(table, rows, columns, value)
    width, height = np.clip(0.34 * len(across) + 2.4, 4.6, 14.0), np.clip(0.16 * len(down) + 1.8, 3.0, 9.0)
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    largest = np.nanmax(np.abs(values), initial=0.0) or 1.0
    image = heat(axes, values, HEAT) if fraction else heat(axes, values, EFFECT, -largest, largest)
    figure.colorbar(image, ax=axes, label=label, pad=0.02, extend=_beyond(values) if fraction else "neither")
    _name_columns(axes, across, width - 1.8)
    _name_rows(axes, down, height - 1.2)
    axes.set(xlabel=_axis_text(columns), ylabel=_axis_text(rows))
    axes.set_title(title, fontsize=10, loc="left")
    if np.isnan(values).any():
        axes.patch.set(**NO_VALUE)
        figure.legend(
            handles=[Patch(label="no value", **NO_VALUE)], fontsize=8, frameon=False, loc="outside lower right"
        )
    return figure


def effect_lines(
    table: pd.DataFrame,
    group: str,
    title: str,
    label: str,
    *,
    x: str = "layer",
    value: str = "value",
    low: str = "low",
    high: str = "high",
    chance: float | None = None,
) -> Figure:
    """One line with a band per group, such as a knockout and its control.

    Args:
        table: one line per point.
        group: column whose values are the lines, in order of appearance.
        label: what the numbers are, with their unit.
        x: column of the horizontal axis, numbers.
        value: column of the numbers; ``low`` and ``high`` are those of their interval.
        chance: where chance is marked; None marks 0 instead.
    """
    figure, axes = plt.subplots(figsize=(5.8, 4.0), layout="constrained")
    drawn = table.rename(columns={low: "low", high: "high"})
    for index, (name, part) in enumerate(drawn.groupby(group, sort=False)):
        line_with_band(axes, part.sort_values(x), value, colour_of(index), str(name), along=x)
    axes.axhline(chance or 0.0, color=QUIET, linestyle=":", linewidth=1, label=None if chance is None else "chance")
    axes.set(xlabel=_axis_text(x), ylabel=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_frame(axes)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def ranked_bars(
    table: pd.DataFrame,
    names: str,
    title: str,
    label: str,
    *,
    value: str = "value",
    low: str = "low",
    high: str = "high",
) -> Figure:
    """Bars with intervals, the largest on top; a name without a value stands below, without a bar.

    Args:
        table: one line per bar.
        names: column of what is ranked, such as heads.
        label: what the numbers are, with their unit.
        value: column of the numbers; ``low`` and ``high`` are those of their interval.
    """
    ranked = table.sort_values(value, ascending=False, na_position="last", kind="stable").reset_index(drop=True)
    figure, axes = plt.subplots(figsize=(5.8, 0.24 * len(ranked) + 1.3), layout="constrained")
    numbers = ranked[value].to_numpy(float)
    reach = np.abs(ranked[[low, high]].to_numpy(float).T - numbers)
    axes.barh(range(len(ranked)), numbers, color=COLOURS[0], height=0.7)
    axes.errorbar(numbers, range(len(ranked)), xerr=reach, fmt="none", ecolor=QUIET, elinewidth=1, capsize=2)
    for place in np.flatnonzero(np.isnan(numbers)):
        axes.text(0.0, float(place), " no value", color=QUIET, fontsize=8, va="center")
    axes.axvline(0.0, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(ranked)), ranked[names].astype(str).tolist(), fontsize=8)
    axes.set(xlabel=label, ylim=(len(ranked) - 0.4, -0.6))
    axes.set_title(title, fontsize=10, loc="left")
    open_frame(axes)
    return figure


def before_after(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy on held-out clips before and after an intervention, with intervals, per track or setting.

    Args:
        table: columns ``setting, before, before_low, before_high, after, after_low, after_high, chance, samples``.
    """
    settings = table.reset_index(drop=True)
    figure, axes = plt.subplots(figsize=(1.3 * len(settings) + 2.2, 4.0), layout="constrained")
    places = np.arange(len(settings))
    axes.plot([places - 0.12, places + 0.12], settings[["before", "after"]].T, color=QUIET, linewidth=0.8, alpha=0.6)
    for when, colour, aside in (("before", QUIET, -0.12), ("after", COLOURS[0], 0.12)):
        numbers = settings[when].to_numpy(float)
        reach = np.abs(settings[[f"{when}_low", f"{when}_high"]].to_numpy(float).T - numbers)
        axes.errorbar(places + aside, numbers, yerr=reach, fmt="o", color=colour, capsize=3, label=when)
    axes.hlines(settings["chance"], places - 0.3, places + 0.3, color=QUIET, linestyle=":", linewidth=1, label="chance")
    texts = [f"{name}\nn = {count}" for name, count in zip(settings["setting"], settings["samples"], strict=True)]
    axes.set_xticks(places, texts, fontsize=8)
    axes.set(ylabel="accuracy on held-out clips", xlim=(-0.5, len(settings) - 0.5), ylim=(-0.02, 1.08))
    axes.set_title(title, fontsize=10, loc="left")
    open_frame(axes)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _grid(
    table: pd.DataFrame, rows: str, columns: str, value: str
) -> tuple[Sequence[Any], Sequence[Any], Float[np.ndarray, "rows columns"]]:
    """The values of both axes in order, and the numbers at their crossings; NaN where there is none."""
    if table.duplicated([rows, columns]).any():
        raise ValueError(f"several lines for one cell of {rows!r} and {columns!r}; average or select them first.")
    (row, down), (column, across) = (
        pd.factorize(table[axis], sort=is_numeric_dtype(table[axis]), use_na_sentinel=False) for axis in (rows, columns)
    )
    values = np.full((len(down), len(across)), np.nan)
    values[row, column] = table[value].to_numpy(float, na_value=np.nan)
    return list(down), list(across), values


def _beyond(values: np.ndarray) -> str:
    below, above = bool(np.nanmin(values, initial=0.0) < 0), bool(np.nanmax(values, initial=1.0) > 1)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _name_columns(axes: Axes, names: Sequence[Any], room: float) -> None:
    """Tick labels: flat where all fit side by side in ``room`` inches, else upright, as many as fit."""
    texts = [_text(name) for name in names]
    flat = (max(map(len, texts), default=0) + 2) * LETTER * len(texts) <= room
    step = _step(len(texts), room / 0.17)
    axes.set_xticks(range(0, len(texts), step), texts[::step], rotation=0 if flat else 90, fontsize=8)


def _name_rows(axes: Axes, names: Sequence[Any], room: float) -> None:
    step = _step(len(names), room / 0.2)
    axes.set_yticks(range(0, len(names), step), [_text(name) for name in names][::step], fontsize=8)


def _step(count: int, fitting: float) -> int:
    return max(1, ceil(count / fitting))


def _text(name: Any) -> str:
    if pd.isna(name):
        return "none"
    if isinstance(name, float):
        return f"{name:g}"
    return str(name).replace("\n", "⏎").strip() or "␣"


def _axis_text(column: str) -> str:
    words = column.replace("_", " ")
    return f"{words} (0 = first block)" if words.endswith("layer") else words
