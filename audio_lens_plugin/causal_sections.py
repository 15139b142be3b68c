"""Sections of a report about causal recipes: what an edit did, in words, with its figures and their tables.

A sentence names one number of many: the largest of them is partly luck, and its interval does not know that it was
picked. The tables hold them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from audio_lens_plugin.recipes.activation_patching import PatchResult
from audio_lens_plugin.recipes.attention_knockout import KnockoutResult
from audio_lens_plugin.recipes.enhancement import EnhanceResult
from audio_lens_plugin.recipes.listening_heads import HeadsResult
from audio_lens_plugin.report import Picture, Section, html_table, picture
from audio_lens_plugin.statistics import paired_difference

TOP_HEADS = 10
FEW = 50
PICKED = "What is named in the text is the strongest of many, so it flatters."


def patch_section(result: PatchResult, title: str) -> Section:
    """What patching recovered: one figure and one table per site, and the grounding coefficient where there is one."""
    table = result.table()
    sites = list(dict.fromkeys(table["site"]))
    denoising = result.header.options["direction"] == "denoise"
    best = _strongest(table, denoising)
    into, brought = ("corrupted", "clean") if denoising else ("clean", "corrupted")
    clean, corrupted = (result.baseline("accuracy", run).mean() for run in ("clean", "corrupted"))
    ahead = paired_difference(result.baseline("logit_diff", "corrupted"), result.baseline("logit_diff", "clean"))
    text = (
        f"{'Most is recovered' if denoising else 'Least is left'} by patching {_place(best)}: "
        f"{_interval(best, signed=False)}.",
        f"{len(result.samples)} pairs of prompts: {clean:.0%} are answered rightly as they are, {corrupted:.0%} when "
        f"corrupted. States of the {brought} run are put into the {into} one; of the difference in logits between the "
        "true label and its rival, 0 is what the corrupted run has, 1 the clean one's. The clean runs are ahead by "
        f"{ahead.value:.2f} ({ahead.low:.2f} to {ahead.high:.2f}) logits.",
        *_grounding(result),
    )
    figures = tuple(_patch_picture(result, title, site, _place(best)) for site in sites)
    caveat = _caveat(len(result.samples), "pairs")
    if ahead.low <= 0:
        caveat = f"The clean runs are not clearly ahead, so a share of what they are ahead by means little. {caveat}"
    return Section(title, text, _patch_table(table), figures, caveat=caveat.strip())


def knockout_section(result: KnockoutResult, title: str) -> Section:
    """What became of the answer without some of the attention, beside the control."""
    effects = result.effects()
    cut = effects[effects["cut"] == "keys"]
    worst = cut.sort_values("probability", kind="stable").iloc[0]
    text = (
        f"Most is lost when {worst['queries']} cannot read {worst['keys']} around layer {worst['layer']:.0f}: p(truth) "
        f"changes by {_interval(worst, 'probability')}, accuracy by {_interval(worst, 'accuracy')}."
        f"{_control(effects, worst)}",
        f"Of {len(result.samples)} clips the model answers {result.baseline('accuracy', 'clean').mean():.0%} rightly "
        f"while nothing is cut. {result.header.options['window']} layers are cut at a time.",
    )
    figure = picture(
        result.plot(),
        alt=f"{title}: change of the probability of the true label by layer around which attention is cut. {text[0]}",
        caption="Change of the probability of the true label, by the middle of the window of layers that is cut."
        + (" Dotted: nothing changes." if len(set(_pair_names(cut))) == 1 else ""),
    )
    table = effects.assign(pair=_pair_names(effects))
    shown = _crossed(table, ["pair", "layer"], "cut", "probability")
    return Section(title, text, html_table(shown), (figure,), caveat=_caveat(len(result.samples), "clips"))


def heads_section(result: HeadsResult, title: str) -> Section:
    """Which heads look at the audio, and which of them matter."""
    ranked = result.ranked()
    first, listener = ranked.iloc[0], result.ranked("difference").iloc[0]
    read = f"{result.header.options['queries']} → {result.header.options['keys']}"
    text = (
        f"Most is lost without {_head(first)}: p(truth) "
        f"changes by {_interval(first, 'effect')}; {first['mass']:.0%} of its attention lies there.",
        f"The head that looks there most because of what is heard is {_head(listener)}: the share of its attention is "
        f"{_interval(listener, 'difference')} larger than over silence; without it p(truth) changes by "
        f"{_interval(listener, 'effect')}.",
        f"{len(result.samples)} clips, {len(ranked)} heads, {read}.",
    )
    figures = tuple(
        picture(
            result.plot(by),
            alt=f"{title}: {what} by layer and head. {sentence}",
            caption=f"{what[0].upper()}{what[1:]}, by layer and head.",
        )
        for by, what, sentence in (
            ("effect", "change of the probability of the true label when one head cannot read the audio", text[0]),
            ("difference", "share of attention on the audio, with the clip minus with silence", text[1]),
        )
    )
    measures = {name: _intervals(ranked, name) for name in ("effect", "mass", "difference")}
    table = ranked[["layer", "head"]].assign(**measures).head(TOP_HEADS)
    return Section(title, text, html_table(table), figures, caveat=_caveat(len(result.samples), "clips"))


def enhance_section(result: EnhanceResult, title: str) -> Section:
    """Whether the setting that did best on development clips helps on held-out ones."""
    line, tried = result.held_out().iloc[0], result.development()
    real = "the gain is real" if line["gain_low"] > 0 else "whether it helps is not known from so many clips"
    if line["gained"] == line["lost"] == 0:
        real = "no answer becomes right or wrong"
    verdict = "it harms" if line["gain_high"] < 0 else real
    text = (
        f"On {line['samples']} held-out clips accuracy goes from {line['before']:.2f} to {line['after']:.2f}, a change "
        f"of {_interval(line, 'gain')}: {verdict}. {line['gained']} clips are gained and {line['lost']} lost "
        f"(McNemar's exact test: p = {line['p']:.2g}).",
        f"Of {len(tried)} settings, the one that did best on {tried['samples'].iloc[0]} development clips is "
        f"{result.chosen}.",
    )
    figures = (
        picture(
            result.plot_held_out(),
            alt=f"{title}: accuracy on held-out clips before and after. {text[0]}",
            caption="Accuracy on the held-out clips, with 95 % bootstrap intervals; dotted: chance.",
        ),
        picture(
            result.plot(),
            alt=f"{title}: change of accuracy on the development clips, by layers. {text[1]}",
            caption="Change of accuracy on the development clips. The choice was made by these: they are no result.",
        ),
    )
    intervals = {name: _interval(line, name, signed=name == "gain") for name in ("before", "after", "gain")}
    counts = {name: line[name] for name in ("samples", "chance", "gained", "lost", "p")}
    table = pd.DataFrame([{"setting": str(result.chosen), **intervals, **counts}])
    few = f"{line['samples']} held-out clips are few: read the interval." if line["samples"] < FEW else ""
    return Section(title, text, html_table(table), figures, caveat=few)


def _strongest(table: pd.DataFrame, denoising: bool) -> pd.Series:
    """The patch that does most; to patch everything says little, so it only counts where it was all there is."""
    parts = table[table["position"] != "all"]
    return (parts if len(parts) else table).sort_values("value", ascending=not denoising, kind="stable").iloc[0]


def _place(line: pd.Series) -> str:
    """Where a patch was made, in words."""
    token = f" {line['token']!r}" if "token" in line and pd.notna(line["token"]) else ""
    layer = "" if pd.isna(line["layer"]) else f" of layer {line['layer']:.0f}"
    unit = "" if pd.isna(line["unit"]) else f", unit {line['unit']}"
    return f"{line['position']}{token} at {line['site']}{layer}{unit}"


def _patch_picture(result: PatchResult, title: str, site: str, best: str) -> Picture:
    return picture(
        result.plot(site=site),
        alt=f"{title}: recovered difference in logits at {site}, by layer and position; the strongest is {best}",
        caption=f"{site}: share of the difference in logits, 0 as in the corrupted run, 1 as in the clean one.",
    )


def _patch_table(table: pd.DataFrame) -> str:
    """Layers by positions where positions were patched by name; else one line per place."""
    if "index" in table or table["unit"].notna().any():
        shown = [name for name in table.columns if name not in ("value", "low", "high") and table[name].notna().any()]
        return html_table(table[shown].assign(recovered=_intervals(table, signed=False)))
    named = table.assign(layer=table["layer"].astype("object").where(table["layer"].notna(), "–"))
    by = ["site", "layer"] if len(set(table["site"])) > 1 else ["layer"]
    return html_table(_crossed(named, by, "position", "value", signed=False))


def _grounding(result: PatchResult) -> tuple[str, ...]:
    """Where the audio holds what decides the answer; nothing if audio and all positions were not both patched."""
    streamed = result.cells[result.cells["site"] == "hook_resid_pre"]
    if result.header.options["direction"] != "denoise" or not {"audio", "all"} <= set(streamed["position"]):
        return ()
    table = result.grounding()
    first, last = table.iloc[0], table.iloc[-1]
    return (
        "Grounding, the effect of patching the audio over that of patching all positions: "
        f"{_interval(first, signed=False)} at layer {first['layer']:.0f}, {_interval(last, signed=False)} at layer "
        f"{last['layer']:.0f}.",
    )


def _control(effects: pd.DataFrame, worst: pd.Series) -> str:
    same = (effects[["queries", "keys", "layer"]] == worst[["queries", "keys", "layer"]]).all(axis=1)
    control = effects[same & (effects["cut"] == "control")]
    if control.empty:
        return ""
    return f" As many other keys, drawn by chance: {_interval(control.iloc[0], 'probability')} of p(truth)."


def _pair_names(effects: pd.DataFrame) -> pd.Series:
    return effects["queries"] + " → " + effects["keys"]


def _head(line: pd.Series) -> str:
    return f"layer {line['layer']:.0f} head {line['head']:.0f}"


def _crossed(table: pd.DataFrame, rows: Sequence[str], columns: str, value: str, signed: bool = True) -> pd.DataFrame:
    """One line per combination of rows, one column per name in columns, numbers with their intervals."""
    cells = table.assign(cell=_intervals(table, value, signed))
    crossed = cells.pivot_table(index=list(rows), columns=columns, values="cell", aggfunc="first", sort=False)
    return crossed.reset_index().rename_axis(columns=None)


def _intervals(table: pd.DataFrame, value: str = "value", signed: bool = True) -> list[str]:
    return [_interval(line, value, signed) for _, line in table.iterrows()]


def _interval(line: pd.Series, value: str = "value", signed: bool = True) -> str:
    """For people: a number with its 95 % interval."""
    low, high = ("low", "high") if value == "value" else (f"{value}_low", f"{value}_high")
    sign = "+" if signed else ""
    if pd.isna(line[value]):
        return "–"
    number, lowest, highest = (f"{line[name]:{sign}.2f}".replace("-", "−") for name in (value, low, high))
    return f"{number} ({lowest} to {highest})"


def _caveat(count: int, what: str) -> str:
    return f"{count} {what} are few: read the intervals, not the numbers. {PICKED}" if count < FEW else PICKED
