"""The look that all pictures share: colours, lines with bands, heatmaps. It draws numbers and knows no experiment."""

from __future__ import annotations

from io import BufferedWriter, BytesIO
from pathlib import Path
from typing import Literal

import pandas as pd
from jaxtyping import Shaped
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy import ndarray

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c17817", "#2f9c95")
QUIET = "#5b616a"
HEAT = "magma"
DPI = 160


def colour_of(index: int) -> str:
    """The colour of the index-th line of a picture; after the last they begin again."""
    return COLOURS[index % len(COLOURS)]


def line_with_band(
    axes: Axes, table: pd.DataFrame, column: str, colour: str, label: str, along: str = "layer", opacity: float = 0.15
) -> None:
    """A line of ``column`` with a band from the columns ``low`` to ``high``."""
    axes.plot(table[along], table[column], color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(table[along], table["low"], table["high"], color=colour, alpha=opacity, linewidth=0)


def heat(
    axes: Axes, values: Shaped[ndarray, "rows columns"], colours: str = HEAT, low: float = 0.0, high: float = 1.0
) -> AxesImage:
    """A heatmap whose first row is at the bottom."""
    return axes.imshow(
        values, aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
    )


def open_frame(axes: Axes) -> None:
    """No lines above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, file: BytesIO | BufferedWriter | Path, kind: Literal["svg", "png"]) -> None:
    """Write a figure so that equal figures are equal files: without a date, and with ids that do not change."""
    with rc_context({"svg.hashsalt": "audio-lens"}):
        figure.savefig(file, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
