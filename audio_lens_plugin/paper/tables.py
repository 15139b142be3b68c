"""The tables of a run: tidy, made of the finished parts alone, the same to the last digit whoever computed the parts.

Every table but ``correlation`` has the columns ``track`` and ``form``; a number has its 95 % bootstrap interval over
clips (``low``, ``high``); a test has ``p``, and where many are made, ``p_of_all``, corrected for all of them. `TABLES`
says what each table holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from audio_lens_plugin.paper.design import CLIP, CONTROLS, ENHANCEMENT, FREE, KNOCKOUT, LENS, PATCHING, Subject
from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.recipes.attention_knockout import KnockoutResult
from audio_lens_plugin.recipes.enhancement import held_out_table, judged
from audio_lens_plugin.recipes.logit_lens import LensResult
from audio_lens_plugin.statistics import (
    bootstrap_mean,
    correlation,
    holm,
    label_permutation,
    mcnemar,
    paired_difference,
    sign_flips,
)

RESAMPLES = 19_999  # so many that p can stand a correction for all prompt forms
TABLES = {
    "answers": "every answer: restricted to the labels, and what was said freely",
    "accuracy": "share of right answers, against answers that do not depend on the clip (p)",
    "controls": "accuracy with the clip minus that of the controls",
    "information": "information score by span and layer, against predictions that do not depend on the clip (p)",
    "question_words": "information score at each word of the question, by layer",
    "curves": "probability of the true label by layer, over clips answered rightly (success) and wrongly (failure)",
    "changes": "that probability minus the one at the last layer, clip by clip, tested over all layers (p_of_all)",
    "critical_layers": "critical layer, last position, with the model's accuracy",
    "correlation": "critical layer against accuracy",
    "attribute_share": "information at other positions, as a share of that at the last",
    "knockout": "change of p(truth) and accuracy where queries cannot read keys, by window of layers",
    "patching": "what states of the clip bring back into silence, as a share of the difference in logits",
    "grounding": "effect of patching the audio over that of patching everything, by layer",
    "enhancement": "accuracy on held-out clips before and after the setting that did best on the others",
    "enhancement_development": "what the choice of the enhancement was made by: no result",
}


@dataclass(frozen=True)
class _Lens:
    """One lens result and what it was asked."""

    track: str
    form: str
    control: str
    result: LensResult

    def named(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with where it comes from before it."""
        return _named(table, track=self.track, form=self.form, control=self.control)


def run_tables(run: RunFolder) -> dict[str, pd.DataFrame]:
    """All tables of a finished run, by the names of `TABLES`; no ``question_words`` where each clip has its question.

    Raises:
        ResultError: units are missing.
    """
    run.check_whole()
    seed = run.identity.settings.seed
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for subject in run.identity.subjects:
        for lens in _lenses(run, subject):
            for name, table in _lens_tables(lens, seed).items():
                found[name].append(table)
        for form, control in subject.asked(FREE):
            found["answers"].append(_free_answers(run, subject, form, control))
        for name, table in _causal_tables(run, subject, seed).items():
            found[name].append(table)
    answers = _answers(found.pop("answers"))
    tables = {"answers": answers, "accuracy": _accuracy(answers, run, seed), "controls": _controls(answers, seed)}
    tables |= {name: pd.concat(parts, ignore_index=True) for name, parts in found.items() if parts}
    shown = [subject.name for subject in run.identity.subjects if subject.causal]
    critical = tables["critical_layers"]
    tables["correlation"] = correlations(critical[critical["track"].isin(shown)], seed)
    tables["enhancement"]["p_of_all"] = holm(tables["enhancement"]["p"].to_numpy())
    return {name: tables[name] for name in TABLES if name in tables}


def correlations(critical: pd.DataFrame, seed: int = 0, of: Sequence[str] = ("track", "form")) -> pd.DataFrame:
    """Critical layer, as a share of the model's layers, against accuracy: over all points, and within each track.

    The forms of a track share its clips, so its points are no independent ones: the mean of each track, too, is told.

    Args:
        critical: the table ``critical_layers``.
        of: the columns that make a point.

    Returns:
        columns ``of, measure, value, p, points``.
    """
    points = critical.assign(depth=critical["layer"] / critical["layers"])
    kinds = {" x ".join(of): points}
    several = points.groupby("track", sort=False)
    kinds |= {f"form within {track}": part for track, part in several}
    kinds["track"] = points.groupby([*of[:-2], "track"], sort=False)[["depth", "accuracy"]].mean()
    lines = []
    for name, part in kinds.items():
        found = correlation(part["depth"].to_numpy(), part["accuracy"].to_numpy(), seed)
        for measure in ("pearson", "spearman"):
            value, p = getattr(found, measure)
            lines.append({"of": name, "measure": measure, "value": value, "p": p, "points": found.points})
    return pd.DataFrame(lines)


def _named(table: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    for place, (name, value) in enumerate(columns.items()):
        table.insert(place, name, value)
    return table


def _lenses(run: RunFolder, subject: Subject) -> Iterator[_Lens]:
    """One after the other: those of a whole run would not fit into memory."""
    for form, control in subject.asked(LENS):
        yield _Lens(subject.name, form, control, run.result(LENS, subject.name, form, control))


def _lens_tables(lens: _Lens, seed: int) -> dict[str, pd.DataFrame]:
    result = lens.result
    samples = result.samples.rename(columns={"sample": "clip"})
    tables = {
        "answers": lens.named(samples[["clip", "truth", "answer"]].copy()),
        "information": lens.named(_information(result, seed)),
        "curves": lens.named(result.curves(seed)),
    }
    if lens.control == CLIP:
        tables["changes"] = _named(result.changes(seed=seed), track=lens.track, form=lens.form)
        tables["critical_layers"] = _named(_critical(result, seed), track=lens.track, form=lens.form)
        others = [span for span in result.spans if span != "last"]
        if others:
            tables["attribute_share"] = _named(_shares(result, others, seed), track=lens.track, form=lens.form)
    if "question" in result.spans and _one_question(result):
        tables["question_words"] = lens.named(_question_words(result, seed))
    return tables


def _information(result: LensResult, seed: int) -> pd.DataFrame:
    table = result.information(seed)
    for span in result.spans:
        p, p_of_all = label_permutation(result.label_shares(span), _truths(result, span), seed)
        table.loc[table["span"] == span, ["p", "p_of_all"]] = np.stack([p, p_of_all], axis=1)
    return table


def _truths(result: LensResult, span: str) -> np.ndarray:
    """The true label, as its place among the labels, of each sample that has the span."""
    samples = np.unique(result.rows.loc[result.rows["span"] == span, "sample"].to_numpy())
    return np.array([result.labels.index(truth) for truth in result.samples["truth"].iloc[samples]])


def _critical(result: LensResult, seed: int) -> pd.DataFrame:
    found, interval = result.critical_layer(), result.critical_interval(seed=seed)
    line = {
        "layer": np.nan if found.layer is None else found.layer,
        **interval._asdict(),
        "threshold": found.threshold,
        "best": found.best,
        "accuracy": result.accuracy,
        "layers": result.n_layers,
    }
    return pd.DataFrame([line])


def _shares(result: LensResult, spans: Sequence[str], seed: int) -> pd.DataFrame:
    score = result.information(seed)
    best = score[score["layer"] > 0].groupby("span")["score"].max()
    lines = []
    for span in spans:
        share = result.excess_share(span, seed=seed)
        lines.append({"span": span, "share": share.value, "low": share.low, "high": share.high, "best": best[span]})
    return pd.DataFrame(lines).assign(best_last=best["last"])


def _one_question(result: LensResult) -> bool:
    """Whether all samples are asked the same words: only then is the n-th word one thing."""
    asked = result.rows[result.rows["span"] == "question"]
    questions = asked.groupby("sample")["token"].agg(tuple)
    return len(set(questions)) == 1


def _question_words(result: LensResult, seed: int) -> pd.DataFrame:
    """Tokens of the question joined to words; a word's score is that of its last token, which has read all of it."""
    asked = result.rows[result.rows["span"] == "question"]
    tokens = asked.drop_duplicates("index").sort_values("index")["token"].tolist()
    begins = [place for place, token in enumerate(tokens) if place == 0 or token[:1].isspace()]
    ends = [*begins[1:], len(tokens)]
    truths = _truths(result, "question")[asked["sample"].factorize(sort=True)[0]]
    right = (result.label_logits[:, asked.index.tolist()].argmax(-1).numpy() == truths).astype(float)
    tables = []
    for word, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        of_word = right[:, (asked["index"] == end - 1).to_numpy()].T
        mean, low, high = bootstrap_mean(of_word, seed)
        scores = pd.DataFrame({"layer": range(len(mean)), "score": mean, "low": low, "high": high})
        tables.append(_named(scores, word=word, text="".join(tokens[begin:end]).strip()))
    return pd.concat(tables, ignore_index=True)


def _free_answers(run: RunFolder, subject: Subject, form: str, control: str) -> pd.DataFrame:
    samples = run.result(FREE, subject.name, form, control).samples.rename(columns={"sample": "clip"})
    free = samples[["clip", "truth", "said", "heard"]].copy()
    return _named(free, track=subject.name, form=form, control=control)


def _answers(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One line per clip, form and control: the restricted and the free answer beside each other, where both are."""
    every = pd.concat(parts, ignore_index=True)
    by = ["track", "form", "control", "clip", "truth"]
    return every.groupby(by, sort=False, dropna=False)[["answer", "said", "heard"]].first().reset_index()


def _accuracy(answers: pd.DataFrame, run: RunFolder, seed: int) -> pd.DataFrame:
    labels: dict[Any, list[str]] = {subject.name: list(subject.labels) for subject in run.identity.subjects}
    tables = []
    for measure, column, there in (("labels", "answer", "answer"), ("free", "heard", "said")):
        lines: list[dict[str, Any]] = []
        for (track, form, control), part in answers[answers[there].notna()].groupby(
            ["track", "form", "control"], sort=False
        ):
            truths = np.array([labels[track].index(truth) for truth in part["truth"]])
            # A free answer may name no label: it is then right for none.
            given = [labels[track].index(one) if isinstance(one, str) else -1 for one in part[column]]
            shares = np.equal.outer(given, np.arange(len(labels[track]))).astype(float)
            mean, low, high = bootstrap_mean((np.array(given) == truths).astype(float)[:, None], seed)
            p, _ = label_permutation(shares[:, None, :], truths, seed, RESAMPLES)
            lines.append(
                {
                    "track": track,
                    "form": form,
                    "control": control,
                    "measure": measure,
                    "value": mean.item(),
                    "low": low.item(),
                    "high": high.item(),
                    "chance": 1 / len(labels[track]),
                    "samples": len(part),
                    "p": p.item(),
                }
            )
        table = pd.DataFrame(lines)
        for _, part in table.groupby("control", sort=False):
            table.loc[part.index, "p_of_all"] = holm(part["p"].to_numpy())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _controls(answers: pd.DataFrame, seed: int) -> pd.DataFrame:
    known = answers[answers["answer"].notna()]
    right = known.assign(right=known["answer"] == known["truth"])
    wide = right.pivot_table(index=["track", "form", "clip"], columns="control", values="right", sort=False)
    lines = []
    for (track, form), part in wide.groupby(["track", "form"], sort=False):
        with_clip = _as_bool(part[CLIP])
        for control in CONTROLS[1:]:
            without = _as_bool(part[control])
            found, changed = paired_difference(without, with_clip, seed), mcnemar(without, with_clip)
            gain = {"difference": found.value, "low": found.low, "high": found.high}
            lines.append({"track": track, "form": form, "control": control, **gain, **changed._asdict()})
    table = pd.DataFrame(lines)
    return table.assign(p_of_all=holm(table["p"].to_numpy())) if lines else table


def _as_bool(column: pd.Series) -> Bool[np.ndarray, " clips"]:
    return column.to_numpy(float).astype(bool)


def _causal_tables(run: RunFolder, subject: Subject, seed: int) -> dict[str, pd.DataFrame]:
    form = subject.causal
    if form is None:
        return {}

    def result(experiment: str) -> Any:
        return run.result(experiment, subject.name, form, CLIP)

    patched = result(PATCHING)
    clips, settings = run.clips_of(subject.name), run.identity.settings
    chosen = judged(result(ENHANCEMENT), clips["group"].tolist(), settings.development, settings.seed)
    held = held_out_table({subject.name: chosen}, seed).drop(columns=["setting", "p_of_all"])
    tables = {
        "knockout": _knockout(result(KNOCKOUT), seed),
        "patching": patched.table(seed=seed).drop(columns=["site", "unit"]),
        "grounding": patched.grounding(seed=seed),
        "enhancement": held.assign(relative=held["gain"] / held["before"].replace(0.0, np.nan)),
        "enhancement_development": chosen.development(),
    }
    return {name: _named(table, track=subject.name, form=form) for name, table in tables.items()}


def _knockout(result: KnockoutResult, seed: int) -> pd.DataFrame:
    """The effects, with a test that flips the sign of each clip's change, corrected over the windows of a pair."""
    table = result.effects(seed)
    clean = result.baseline("probability", "clean")[result.cells["sample"].to_numpy()]
    cells = result.cells.assign(change=result.metric("probability") - clean)
    for (queries, keys, cut), part in cells.groupby(["queries", "keys", "cut"], sort=False):
        changes = part.pivot_table(index="sample", columns="layer", values="change")
        p, p_of_all = sign_flips(changes.to_numpy(), seed)
        mine = (table[["queries", "keys", "cut"]] == (queries, keys, cut)).all(axis=1)
        by_layer = table.loc[mine, "layer"]
        for name, values in (("p", p), ("p_of_all", p_of_all)):
            table.loc[mine, name] = by_layer.map(dict(zip(changes.columns, values, strict=True)))
    return table
