"""Heatmaps of one sample: what stands above a position is what the position hears."""

from __future__ import annotations

from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.recipes.figure_style import save_figure
from audio_lens_plugin.recipes.lens_figures import sample_heatmap

BEFORE, STEP = 3, 0.04


def rows_of(heard: int, words: int = 4, step: float = STEP) -> pd.DataFrame:
    """Three words, audio positions that hear ``step`` seconds each (NaN: they keep no time), and more words."""
    count = BEFORE + heard + words
    audio = np.zeros(count, dtype=bool)
    audio[BEFORE : BEFORE + heard] = True
    start = np.where(audio, (np.arange(count) - BEFORE) * step, np.nan)
    token = np.where(audio, "<|AUDIO|>", [f"word{index}" for index in range(count)])
    return pd.DataFrame(
        {"position": np.arange(count) + 10, "token": token, "audio": audio, "start": start, "end": start + step}
    )


def click(at: float, seconds: float, rate: int = 8000) -> Clip:
    """Silence with one sample of full scale."""
    waveform = np.zeros(round(seconds * rate), dtype=np.float32)
    waveform[round(at * rate)] = 1.0
    return Clip(waveform, rate, "click")


def drawn(rows: pd.DataFrame, clip: Clip | None) -> Figure:
    values = np.linspace(0, 1, 9 * len(rows)).reshape(9, len(rows))
    figure = sample_heatmap(values, rows, "dog", "one clip", clip)
    figure.draw_without_rendering()
    return figure


def outline(axes: Axes) -> np.ndarray:
    """The corners of what was filled: along, and up."""
    return axes.collections[0].get_paths()[0].vertices


def marks(axes: Axes) -> dict[str, float]:
    """Where the texts of the horizontal axis stand."""
    return {text.get_text(): place for place, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}


def cell_under(figure: Figure, along: float) -> int:
    """The position of the heatmap that stands on the paper below a place of the waveform."""
    strip, heatmap = figure.axes[:2]
    on_paper = strip.transData.transform((along, 0))
    place = heatmap.transData.inverted().transform(on_paper)[0]
    edges = heatmap.collections[0].get_coordinates()[0, :, 0]
    return int(np.searchsorted(edges, place)) - 1


@pytest.mark.parametrize("heard", [50, 300])
@pytest.mark.parametrize("at", [0.0, 0.06, 1.3, 1.98])
def test_a_sound_stands_over_the_position_that_hears_it(at: float, heard: int) -> None:
    figure = drawn(rows_of(heard), click(at, heard * STEP))
    corners = outline(figure.axes[0])
    assert cell_under(figure, corners[corners[:, 1].argmax(), 0]) == BEFORE + int(at / STEP)
    plt.close(figure)


def test_without_time_the_whole_clip_lies_over_all_audio_positions() -> None:
    figure = drawn(rows_of(16, step=np.nan), click(2.55, 3.0))
    strip, heatmap = figure.axes[:2]
    corners = outline(strip)
    assert cell_under(figure, corners[corners[:, 1].argmax(), 0]) == BEFORE + int(16 * 2.55 / 3.0)
    assert list(marks(strip)) == ["0 s", "1 s", "2 s", "3 s"]
    assert list(marks(heatmap)) == [
        "word0",
        "word1",
        "word2",
        "audio 1",
        "audio 9",
        "word19",
        "word20",
        "word21",
        "word22",
    ]
    plt.close(figure)


def test_marks_of_time_stand_where_their_seconds_are() -> None:
    figure = drawn(rows_of(50), click(0.0, 2.0))
    strip, heatmap = figure.axes[:2]
    above, below = marks(strip), marks(heatmap)
    assert list(above)[::2] == ["0 s", "0.4 s", "0.8 s", "1.2 s", "1.6 s", "2 s"]
    assert cell_under(figure, above["0.4 s"] + 1e-6) == BEFORE + 10
    assert cell_under(figure, above["2 s"] - 1e-6) == BEFORE + 49
    assert [mark for mark in below if mark.endswith(" s")] == ["0 s", "0.5 s", "1 s", "1.5 s"]
    assert cell_under(figure, below["1.5 s"]) == BEFORE + 37  # which hears 1.48 to 1.52 s
    plt.close(figure)


def test_what_no_position_hears_is_not_drawn() -> None:
    figure = drawn(rows_of(50), click(2.5, 3.0))
    assert outline(figure.axes[0])[:, 1].max() == 0
    plt.close(figure)


def test_a_clip_ends_where_it_ends() -> None:
    figure = drawn(rows_of(50), click(0.5, 1.0))
    assert cell_under(figure, outline(figure.axes[0])[:, 0].max()) in (BEFORE + 24, BEFORE + 25)
    plt.close(figure)


@pytest.mark.parametrize("between", [0, 2])
def test_a_clip_lies_over_the_first_audio_alone(between: int) -> None:
    """Two clips of one second: the second begins anew, with or without words between that were not read."""
    first, second = rows_of(25, words=0), rows_of(25).iloc[BEFORE:]
    second = second.assign(position=second["position"] + 25 + between)
    figure = drawn(pd.concat([first, second], ignore_index=True), click(0.5, 1.0))
    assert cell_under(figure, outline(figure.axes[0])[:, 0].max()) == BEFORE + 24
    plt.close(figure)


def test_without_audio_positions_or_without_a_clip_there_is_no_waveform() -> None:
    for rows, clip in ((rows_of(0), click(0.5, 1.0)), (rows_of(20), None)):
        figure = drawn(rows, clip)
        assert len(figure.axes) == 2  # the heatmap and its colour bar
        assert figure.axes[0].get_title(loc="left") == "one clip"
        plt.close(figure)


def test_silence_is_drawn_as_a_line() -> None:
    figure = drawn(rows_of(20), click(0.1, 1.0).silenced())
    assert np.ptp(outline(figure.axes[0])[:, 1]) == 0
    assert figure.axes[0].get_ylim() == (-1, 1)
    plt.close(figure)


def test_many_positions_stay_small_and_words_stay_sharp() -> None:
    random = np.random.default_rng(0)
    rows = rows_of(300, words=40)
    noise = Clip(random.normal(size=96_000).astype(np.float32), 8000, "noise")
    figure = sample_heatmap(random.random((33, len(rows))), rows, "dog", "one clip", noise)
    assert figure.get_figwidth() < 16
    file = BytesIO()
    save_figure(figure, file, "svg")
    text = file.getvalue().decode()
    assert len(text) < 300_000
    assert "<image" in text
    assert all(f"<!-- word{index} -->" in text for index in (0, 305, 340)), "labels are drawn, not part of the image"
    plt.close(figure)
