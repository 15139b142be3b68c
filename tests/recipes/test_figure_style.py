"""Figures as files: equal numbers, equal files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from audio_lens_plugin.recipes.figure_style import save_figure


def saved(height: float, kind: str, file: BytesIO | Path) -> None:
    """A figure with what gets an id in an SVG: a clipped line, a marker, a hatch, an image."""
    figure, axes = plt.subplots()
    axes.plot([0, height], marker="o")
    axes.bar([0], [height], hatch="///")
    axes.imshow([[0, height]], extent=(0, 1, 0, 1))
    save_figure(figure, file, kind)
    plt.close(figure)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_equal_figures_are_equal_files(kind: str, tmp_path: Path) -> None:
    first, second, other = BytesIO(), tmp_path / f"figure.{kind}", BytesIO()
    for height, file in ((1.0, first), (1.0, second), (2.0, other)):
        saved(height, kind, file)
    assert first.getvalue() == second.read_bytes()
    assert first.getvalue() != other.getvalue()
