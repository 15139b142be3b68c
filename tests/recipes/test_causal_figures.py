"""Pictures of edits say what they show: their texts, their cells, and where there is no value."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from audio_lens_plugin.recipes.causal_figures import before_after, effect_heatmap, effect_lines, ranked_bars


@pytest.fixture(autouse=True)
def no_picture_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def effects(layers: int = 3, positions: tuple[str, ...] = ("last", "audio 0.4–0.8 s")) -> pd.DataFrame:
    """The effect of layer l at the position i is l - 10 i."""
    lines = [(layer, name, layer - 10.0 * i) for layer in range(layers) for i, name in enumerate(positions)]
    return pd.DataFrame(lines, columns=["layer", "position", "effect"])


def heatmap(table: pd.DataFrame, columns: str = "position", **options) -> Figure:
    return effect_heatmap(table, "layer", columns, "effect", "patching", "change of log p (nats)", **options)


def drawn(figure: Figure) -> np.ndarray:
    return figure.axes[0].images[0].get_array().filled(np.nan)


def ticks(figure: Figure, axis: str) -> list[str]:
    return [text.get_text() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def overlaps(figure: Figure, axis: str) -> bool:
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]
    return any(one.overlaps(other) for one, other in pairwise(boxes))


# ------------------------------------------------------------------------------------------------------------ heatmaps


def test_layers_count_upwards_and_positions_stand_in_order_of_appearance() -> None:
    figure = heatmap(effects().sort_values("layer", ascending=False, kind="stable"))
    assert drawn(figure).tolist() == [[0.0, -10.0], [1.0, -9.0], [2.0, -8.0]]
    assert ticks(figure, "y") == ["0", "1", "2"]
    assert ticks(figure, "x") == ["last", "audio 0.4–0.8 s"]


def test_the_axes_and_the_colours_say_what_they_are() -> None:
    figure = heatmap(effects())
    picture, bar = figure.axes
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("position", "layer (0 = first block)")
    assert picture.get_title(loc="left") == "patching"
    assert bar.get_ylabel() == "change of log p (nats)"


def test_heads_are_numbers_in_order() -> None:
    table = pd.DataFrame({"layer": 0, "head": [2, 0, 1], "effect": [2.0, 0.0, 1.0]})
    assert drawn(heatmap(table, "head")).tolist() == [[0.0, 1.0, 2.0]]


def test_no_effect_is_the_middle_colour() -> None:
    low, high = heatmap(effects()).axes[0].images[0].get_clim()
    assert (low, high) == (-10.0, 10.0)


@pytest.mark.parametrize(("effect", "pointed"), [(0.5, "neither"), (1.5, "max"), (-0.5, "min")])
def test_fractions_go_from_zero_to_one_and_those_beyond_are_marked(effect: float, pointed: str) -> None:
    image = heatmap(effects(1).assign(effect=effect), fraction=True).axes[0].images[0]
    assert image.get_clim() == (0.0, 1.0)
    assert image.colorbar.extend == pointed


def test_a_cell_that_is_not_there_is_hatched_and_told() -> None:
    figure = heatmap(effects().iloc[1:])
    assert np.isnan(drawn(figure)).sum() == 1
    assert figure.axes[0].patch.get_hatch()
    assert legend(figure) == ["no value"]


def test_a_cell_without_a_number_is_hatched_and_told() -> None:
    table = effects()
    table.loc[3, "effect"] = np.nan
    figure = heatmap(table)
    assert np.argwhere(np.isnan(drawn(figure))).tolist() == [[1, 1]]
    assert legend(figure) == ["no value"]


def test_a_full_heatmap_has_no_hatch() -> None:
    figure = heatmap(effects())
    assert figure.axes[0].patch.get_hatch() is None
    assert legend(figure) == []


def test_several_lines_for_one_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="several lines for one cell of 'layer' and 'position'"):
        heatmap(pd.concat([effects(), effects()]))


def test_an_axis_without_a_value_is_named_none() -> None:
    table = pd.DataFrame({"layer": [0, 0], "head": pd.array([3, None], dtype="Int64"), "effect": [1.0, 2.0]})
    assert ticks(heatmap(table, "head"), "x") == ["3", "none"]


@pytest.mark.parametrize(("layers", "positions"), [(2, 3), (80, 6), (4, 200), (32, 32)])
def test_no_labels_lie_over_each_other(layers: int, positions: int) -> None:
    figure = heatmap(effects(layers, tuple(f"audio {i}–{i + 1} s" for i in range(positions))))
    assert not overlaps(figure, "x")
    assert not overlaps(figure, "y")


# --------------------------------------------------------------------------------------------------------------- lines


def lines() -> pd.DataFrame:
    table = pd.DataFrame({"layer": [1, 0, 0, 1], "keys": ["audio", "audio", "random", "random"]})
    return table.assign(value=[-0.5, -0.1, 0.0, 0.1]).assign(low=lambda t: t.value - 0.1, high=lambda t: t.value + 0.2)


def test_every_group_is_a_line_along_the_layers_with_its_band() -> None:
    figure = effect_lines(lines(), "keys", "knockout", "change of p(true label)")
    axes = figure.axes[0]
    audio, random, zero = axes.lines
    assert (audio.get_xdata().tolist(), audio.get_ydata().tolist()) == ([0, 1], [-0.1, -0.5])
    assert random.get_ydata().tolist() == [0.0, 0.1]
    assert list(zero.get_ydata()) == [0.0, 0.0]
    assert axes.collections[0].get_paths()[0].get_extents().intervaly.tolist() == pytest.approx([-0.6, 0.1])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer (0 = first block)", "change of p(true label)")
    assert legend(figure) == ["audio", "random"]


def test_chance_is_marked_where_it_is() -> None:
    figure = effect_lines(lines(), "keys", "knockout", "accuracy", chance=0.25)
    assert list(figure.axes[0].lines[-1].get_ydata()) == [0.25, 0.25]
    assert legend(figure) == ["audio", "random", "chance"]


# ---------------------------------------------------------------------------------------------------------------- bars


def test_bars_are_ranked_with_the_largest_on_top_and_keep_their_intervals() -> None:
    table = pd.DataFrame({"head": ["0.1", "2.3", "1.0"], "value": [0.5, 2.0, np.nan]})
    figure = ranked_bars(table.assign(low=table.value - 0.1, high=table.value + 0.4), "head", "heads", "effect (nats)")
    axes = figure.axes[0]
    assert ticks(figure, "y") == ["2.3", "0.1", "1.0"]
    assert [bar.get_width() for bar in axes.patches[:2]] == [2.0, 0.5]
    assert axes.collections[0].get_segments()[0][:, 0].tolist() == pytest.approx([1.9, 2.4])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first bar is the uppermost
    assert [(text.get_text().strip(), text.get_position()[1]) for text in axes.texts] == [("no value", 2.0)]
    assert axes.get_xlabel() == "effect (nats)"


def test_many_bars_do_not_lie_over_each_other() -> None:
    table = pd.DataFrame({"head": [f"layer {i}, head 0" for i in range(60)], "value": range(60)})
    assert not overlaps(ranked_bars(table.assign(low=0, high=60), "head", "heads", "effect"), "y")


# ---------------------------------------------------------------------------------------------------- before and after


def test_accuracy_stands_before_and_after_with_chance_and_the_number_of_clips() -> None:
    table = pd.DataFrame({"setting": ["Animal", "Gender"], "before": [0.5, 0.7], "after": [0.6, np.nan]})
    intervals = dict(
        before_low=0.4, before_high=0.8, after_low=0.5, after_high=0.9, chance=[0.11, 0.5], samples=[54, 60]
    )
    figure = before_after(table.assign(**intervals), "enhancement")
    axes = figure.axes[0]
    before, after = (axes.containers[index] for index in (0, 1))
    assert before.lines[0].get_ydata().tolist() == [0.5, 0.7]
    assert after.lines[0].get_ydata()[0] == 0.6
    assert before.lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([0.4, 0.8])
    assert ticks(figure, "x") == ["Animal\nn = 54", "Gender\nn = 60"]
    assert axes.get_ylabel() == "accuracy on held-out clips"
    assert sorted(legend(figure)) == ["after", "before", "chance"]
    assert not overlaps(figure, "x")
