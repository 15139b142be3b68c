"""Pictures of what the lens saw: scores by layer, and layers by positions for one clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from audio_lens_plugin.recipes.logit_lens import LensResult

SPAN_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c17817", "#5b616a")
SUCCESS, FAILURE = "#1b6ca8", "#d1495b"
HEAT = "magma"


def overview(result: LensResult) -> Figure:
    """Scores and curves where truths are known, else one heatmap, labels by layer, of each of the first samples."""
    if result.samples["truth"].isna().any():
        return _untold(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    draw_information(left, result)
    draw_curves(right, result)
    return figure


def draw_information(axes: Axes, result: LensResult) -> None:
    """Information score by layer, one line per span, with bootstrap bands, chance, and the critical layer."""
    table = result.information()
    for colour, span in zip(SPAN_COLOURS, result.spans, strict=False):
        of_span = table[table["span"] == span]
        axes.plot(of_span["layer"], of_span["score"], color=colour, marker="o", markersize=3, label=span)
        axes.fill_between(of_span["layer"], of_span["low"], of_span["high"], color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1 / len(result.labels), color="#5b616a", linestyle=":", linewidth=1, label="chance")
    critical = result.critical_layer()
    if critical.layer is not None:
        axes.axvline(critical.layer, color=SPAN_COLOURS[5], linestyle="--", linewidth=1)
        axes.annotate(f"critical layer {critical}", (critical.layer, 1.02), fontsize=8, ha="center")
    axes.set(xlabel="layer (0 = embeddings)", ylabel="information score", ylim=(-0.02, 1.08))
    axes.set_title(f"{len(result.samples)} clips, accuracy {result.accuracy:.2f}", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def draw_curves(axes: Axes, result: LensResult, span: str = "last") -> None:
    """Probability of the true label by layer, over samples answered rightly and wrongly."""
    table = result.curves()
    for outcome, colour in (("success", SUCCESS), ("failure", FAILURE)):
        part = table[(table["span"] == span) & (table["outcome"] == outcome)]
        count = int(part["samples"].iloc[0])
        if count:
            axes.plot(part["layer"], part["probability"], color=colour, marker="o", markersize=3,
                      label=f"answered {'rightly' if outcome == 'success' else 'wrongly'} (n = {count})")
            axes.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="layer (0 = embeddings)", ylabel="p(true label)", ylim=(-0.02, 1.08))
    axes.set_title(f"true label at the {span} position", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def sample_heatmap(result: LensResult, sample: int = 0, label: str | None = None) -> Figure:
    """Layers by positions for one sample: probability of ``label`` (the true one if None), over the vocabulary."""
    about = result.samples.iloc[sample]
    label = label or about["truth"] or about["answer"]
    chosen = _distinct_rows(result, sample)
    values = result.log_probs[:, chosen, result.labels.index(label)].exp().numpy()
    figure, axes = plt.subplots(figsize=(max(5.0, 0.13 * len(chosen) + 1.6), 3.4), layout="constrained")
    image = axes.imshow(values, aspect="auto", origin="lower", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(0, len(values), max(1, len(values) // 8)))
    axes.set_ylabel("layer (0 = embeddings)")
    _position_ticks(axes, result, chosen)
    figure.colorbar(image, ax=axes, label=f"p({label!r})", pad=0.01)
    told = "" if about["truth"] is None else f", truth {about['truth']!r}"
    axes.set_title(f"{about['sample']}{told}, answer {about['answer']!r}", fontsize=10, loc="left")
    return figure


def _distinct_rows(result: LensResult, sample: int) -> list[int]:
    """Row numbers of one sample in the order of the sequence, a position that several names share taken once."""
    of_sample = result.rows[result.rows["sample"] == sample]
    return of_sample.drop_duplicates("position").sort_values("position").index.tolist()


def _position_ticks(axes: Axes, result: LensResult, chosen: list[int]) -> None:
    rows = result.rows.loc[chosen]
    audio = rows["start"].notna().to_numpy()
    texts = []
    for index, (token, start) in enumerate(zip(rows["token"], rows["start"], strict=True)):
        if not audio[index]:
            texts.append(token.replace("\n", "⏎").strip() or "␣")
        elif abs(start * 2 - round(start * 2)) < 1e-6:  # audio is marked every half second
            texts.append(f"{start:.1f} s")
        else:
            texts.append("")
    shown = [index for index, text in enumerate(texts) if text]
    axes.set_xticks(shown, [texts[index] for index in shown], rotation=90, fontsize=7)
    edges = np.flatnonzero(audio[1:] != audio[:-1]) + 0.5
    for edge in edges:
        axes.axvline(edge, color="white", linewidth=0.8)


def _untold(result: LensResult) -> Figure:
    count = min(len(result.samples), 4)
    figure, grid = plt.subplots(1, count, figsize=(2.6 * count + 1.2, 3.4), layout="constrained", squeeze=False)
    image: Any = None
    for sample, axes in enumerate(grid[0]):
        row = result.rows.index[(result.rows["sample"] == sample) & (result.rows["span"] == "last")][0]
        values = result.log_probs[:, row].exp().numpy()
        image = axes.imshow(values, aspect="auto", origin="lower", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks(range(len(result.labels)), result.labels, rotation=90, fontsize=8)
        axes.set_title(f"{result.samples['sample'].iloc[sample]}: {result.samples['answer'].iloc[sample]!r}", fontsize=9)
    grid[0, 0].set_ylabel("layer (0 = embeddings)")
    figure.colorbar(image, ax=grid[0, -1], label="p(label) at the last position")
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
