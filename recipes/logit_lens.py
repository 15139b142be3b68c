"""The logit lens: which answer would the model give if it stopped after layer l?

The method, after AudioLens (arXiv 2506.05140 and its code, as far as both are public), with its symbols:

1. The state h at layer l and position i goes through the final norm and the unembedding; the softmax over the whole
   vocabulary gives p. Layer 0 is the embeddings, layer l the output of block l, so layer L is the model's own output.
2. Among a track's labels Y, each is read by the first token of its word.
3. The information score I(l, i) is the share of samples whose true label has the highest p among the labels.
4. Success and failure curves: the mean p of the true label over samples that the model answers rightly or wrongly.
5. The critical layer is the mean of l weighted by s(l) = max(0, I(l) - (1 + a) / |Y|), with a = 0.2.

All layers come from ONE forward pass, and only the asked-for positions meet the unembedding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.checks import Finding, Probe
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes import lens_figures
from audio_lens_plugin.recipes.engine import Desk, Plan, header_of, labels_for, sweep, weight_bytes
from audio_lens_plugin.results import Header, load_tables, same_header, save_tables
from audio_lens_plugin.spans import Role, Selection
from audio_lens_plugin.statistics import (
    ROUNDING,
    Estimate,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_ratio,
    sign_flips,
)

RECIPE = "logit_lens"
SAMPLE_COLUMNS = ["sample", "truth", "answer"]
SHOWN_SAMPLES = 4
ROW_COLUMNS = ["sample", "span", "index", "position", "token", "start", "end"]


@dataclass(frozen=True)
class CriticalLayer:
    """Where the answer is decided (AudioLens): a weighted mean of layers, counted from 1.

    Attributes:
        layer: the critical layer; None where no layer's score exceeds the threshold: it is undefined.
        threshold: (1 + a) / number of labels.
        best: the highest information score of any layer.
    """

    layer: float | None
    threshold: float
    best: float

    def __str__(self) -> str:
        if self.layer is None:
            return f"undefined: no layer's information score exceeds {self.threshold:.3f} (the best is {self.best:.3f})"
        return f"{self.layer:.2f}"


class CriticalInterval(NamedTuple):
    """How far the critical layer may be trusted.

    Attributes:
        low: lower end of the 95 % bootstrap interval, of the resamples that have a critical layer; NaN where none has.
        high: upper end.
        undefined: share of resamples in which no layer's score exceeds the threshold.
    """

    low: float
    high: float
    undefined: float


@dataclass(frozen=True, repr=False)
class LensResult:
    """What the lens saw. Rows are (sample, position) pairs; the layer axis starts with the embeddings.

    Attributes:
        header: where it came from; ``header.labels`` names the label axis.
        samples: one line per sample: ``sample``, ``truth`` (None where unknown), ``answer`` (the label on top at the
            last layer and position).
        rows: one line per row: ``sample`` (index into samples), ``span`` (the name asked for), ``index`` within the
            span, ``position`` (counted without padding), ``token``, ``start`` and ``end`` (seconds, audio only).
        label_logits: logit of each label.
        log_partition: log of the softmax's denominator, so that log p = logit - log_partition.
        top_ids: the best words of each layer and row, as token ids; empty without ``top_k``.
        top_log_probs: their log-probabilities.
        top_words: the text of every id in ``top_ids``.
    """

    header: Header
    samples: pd.DataFrame
    rows: pd.DataFrame
    label_logits: Float[torch.Tensor, "layers rows labels"]
    log_partition: Float[torch.Tensor, "layers rows"]
    top_ids: Int[torch.Tensor, "layers rows top"]
    top_log_probs: Float[torch.Tensor, "layers rows top"]
    top_words: dict[int, str]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words."""
        return self.header.labels

    @property
    def n_layers(self) -> int:
        """Number of blocks; the layer axis has one entry more."""
        return len(self.label_logits) - 1

    @property
    def spans(self) -> list[str]:
        """The names of the positions that were read, as asked for."""
        return list(dict.fromkeys(self.rows["span"]))

    @property
    def log_probs(self) -> Float[torch.Tensor, "layers rows labels"]:
        """Log-probability of each label over the whole vocabulary."""
        return self.label_logits - self.log_partition[..., None]

    @property
    def accuracy(self) -> float:
        """Share of samples that the model answers rightly, restricted to the labels."""
        known = self._with_truth()
        return float((known["truth"] == known["answer"]).mean())

    def label_shares(self, span: str = "last") -> Float[np.ndarray, "samples layers labels"]:
        """The share of a span's positions that have each label on top, for each sample that has the span.

        Raises:
            ValueError: the span was not read.
        """
        chosen = (self.rows["span"] == self._known_span(span)).to_numpy()
        names, sample = np.unique(self.rows.loc[chosen, "sample"].to_numpy(), return_inverse=True)
        top = self.label_logits.argmax(-1).numpy()[:, chosen]
        counts = np.zeros((len(names), len(top), len(self.labels)))
        np.add.at(counts, (sample, np.arange(len(top))[:, None], top), 1)
        return counts / counts.sum(axis=-1, keepdims=True)

    def information(self, seed: int = 0) -> pd.DataFrame:
        """The information score per span and layer, with a 95 % bootstrap interval over samples.

        A span of several positions counts, for each sample, the share of its positions that have the true label on
        top.

        Returns:
            columns ``span, layer, score, low, high, chance, samples``.

        Raises:
            ValueError: the true labels are not known.
        """
        tables = []
        for span in self.spans:
            of_span = self._scores(span)
            mean, low, high = bootstrap_mean(of_span, seed)
            table = pd.DataFrame({"span": span, "layer": range(len(mean)), "score": mean, "low": low, "high": high})
            tables.append(table.assign(chance=1 / len(self.labels), samples=len(of_span)))
        return pd.concat(tables, ignore_index=True)

    def curves(self, seed: int = 0) -> pd.DataFrame:
        """Mean probability of the true label over samples answered rightly and wrongly, per span and layer.

        Returns:
            columns ``span, outcome, layer, probability, low, high, samples``; an outcome without samples has NaN.

        Raises:
            ValueError: the true labels are not known.
        """
        known = self._with_truth()
        success = (known["truth"] == known["answer"]).to_numpy()
        probability, tables = self._true_probability(), []
        for span in self.spans:
            values = self._per_sample(span, probability)
            of_span = success[self._samples_with(span)]
            for outcome, chosen in (("success", of_span), ("failure", ~of_span)):
                mean, low, high = bootstrap_mean(values[chosen], seed)
                table = pd.DataFrame({"span": span, "outcome": outcome, "layer": range(len(mean))})
                tables.append(table.assign(probability=mean, low=low, high=high, samples=int(chosen.sum())))
        return pd.concat(tables, ignore_index=True)

    def changes(self, span: str = "last", seed: int = 0) -> pd.DataFrame:
        """By how much the probability of the true label at each layer exceeds that at the last one, clip by clip.

        Whether it does so at all is tested with flipped signs (`statistics.sign_flips`), corrected over the layers: the
        highest of many layers is higher than the last by chance alone.

        Returns:
            columns ``outcome, layer, change, low, high, p, p_of_all, samples``, layers from 1 to the last but one; an
            outcome without samples has no lines.

        Raises:
            ValueError: the true labels are not known, or the span was not read.
        """
        known = self._with_truth()
        success = (known["truth"] == known["answer"]).to_numpy()[self._samples_with(self._known_span(span))]
        values = self._per_sample(span, self._true_probability())
        above = (values - values[:, -1:])[:, 1:-1]
        tables = []
        for outcome, chosen in (("success", success), ("failure", ~success)):
            if chosen.any():
                mean, low, high = bootstrap_mean(above[chosen], seed)
                p, p_of_all = sign_flips(above[chosen], seed)
                table = pd.DataFrame({"outcome": outcome, "layer": range(1, len(mean) + 1), "change": mean})
                tables.append(table.assign(low=low, high=high, p=p, p_of_all=p_of_all, samples=int(chosen.sum())))
        return pd.concat(tables, ignore_index=True)

    def critical_layer(self, span: str = "last", a: float = 0.2) -> CriticalLayer:
        """The critical layer of a span. The embeddings (layer 0) are no layer and carry no weight.

        Raises:
            ValueError: the true labels are not known, or the span was not read.
        """
        score = self._scores(span).mean(axis=0)[1:]
        threshold = (1 + a) / len(self.labels)
        layer = _critical_layers(score[None], threshold).item()
        return CriticalLayer(None if np.isnan(layer) else layer, threshold, float(score.max()))

    def critical_interval(
        self, span: str = "last", a: float = 0.2, seed: int = 0, resamples: int = 1000
    ) -> CriticalInterval:
        """A percentile bootstrap over samples of the critical layer.

        Raises:
            ValueError: the true labels are not known, or the span was not read.
        """
        scores = bootstrap_means(self._scores(span)[:, 1:], seed, resamples)
        layers = _critical_layers(scores, (1 + a) / len(self.labels))
        defined = layers[~np.isnan(layers)]
        low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
        return CriticalInterval(float(low), float(high), 1 - len(defined) / resamples)

    def excess_share(self, span: str, seed: int = 0) -> Estimate:
        """How much a span holds, as a share of what the last position holds, with a 95 % bootstrap interval.

        What a position holds is its information score above chance, summed over layers (without the embeddings) and
        the samples that have the span. There is no share, but NaN, where the last position holds nothing above chance.

        Raises:
            ValueError: the true labels are not known, or the span was not read.
        """
        held = self._excess(span)
        both = np.isin(self._samples_with("last"), self._samples_with(span))
        whole = self._excess("last")[both]
        if whole.sum() <= 0:
            return Estimate(np.nan, np.nan, np.nan)
        value, low, high = bootstrap_ratio(held[:, None], whole, seed)
        return Estimate(value.item(), low.item(), high.item())

    def to_frame(self) -> pd.DataFrame:
        """Tidy: one line per sample, position, layer and label, with its logit and log-probability."""
        layers, rows, labels = self.label_logits.shape
        row, layer, label = np.meshgrid(range(rows), range(layers), range(labels), indexing="ij")
        frame = self.rows.iloc[row.ravel()].reset_index(drop=True)
        about = self.samples.iloc[frame["sample"]].reset_index(drop=True)
        frame = frame.assign(sample=about["sample"], truth=about["truth"], answer=about["answer"])
        return frame.assign(
            layer=layer.ravel(),
            label=np.array(self.labels)[label.ravel()],
            logit=self.label_logits.transpose(0, 1).flatten().numpy(),
            log_prob=self.log_probs.transpose(0, 1).flatten().numpy(),
        )

    def top_frame(self) -> pd.DataFrame:
        """The best words: one line per sample, position, layer and rank (from 0). Empty without ``top_k``."""
        layers, rows, top = self.top_ids.shape
        row, layer, rank = np.meshgrid(range(rows), range(layers), range(top), indexing="ij")
        frame = self.rows.iloc[row.ravel()].reset_index(drop=True)
        ids = self.top_ids.transpose(0, 1).flatten().tolist()
        return frame.assign(
            sample=self.samples["sample"].iloc[frame["sample"]].to_numpy(),
            layer=layer.ravel(),
            rank=rank.ravel(),
            word=[self.top_words[token] for token in ids],
            token_id=ids,
            log_prob=self.top_log_probs.transpose(0, 1).flatten().numpy(),
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``logit_lens.json`` and parquet tables into a folder; `LensResult.load` reads it back."""
        layers, rows = self.log_partition.shape
        partition = pd.DataFrame(
            {
                "row": np.repeat(range(rows), layers),
                "layer": np.tile(range(layers), rows),
                "log_partition": self.log_partition.T.flatten().numpy(),
            }
        )
        tables = {"lens": self.to_frame(), "samples": self.samples, "rows": self.rows, "partition": partition}
        return save_tables(folder, self.header, {**tables, "top": self.top_frame()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LensResult:
        """Read a saved result.

        Raises:
            ResultError: the folder holds none.
        """
        header, tables = load_tables(folder, RECIPE)
        rows, layers = len(tables["rows"]), int(tables["partition"]["layer"].max()) + 1
        top = tables["top"]

        def tensor(column: pd.Series, *shape: int) -> torch.Tensor:
            return torch.from_numpy(column.to_numpy().copy()).reshape(rows, layers, *shape).transpose(0, 1).contiguous()

        return cls(
            header=header,
            samples=tables["samples"],
            rows=tables["rows"],
            label_logits=tensor(tables["lens"]["logit"], len(header.labels)),
            log_partition=tensor(tables["partition"]["log_partition"]),
            top_ids=tensor(top["token_id"].astype("int64"), len(top) // (rows * layers)),
            top_log_probs=tensor(top["log_prob"].astype("float32"), len(top) // (rows * layers)),
            top_words=dict(zip(top["token_id"].tolist(), top["word"].tolist(), strict=True)),
        )

    @classmethod
    def concat(cls, parts: Sequence[LensResult]) -> LensResult:
        """Join the results of several batches of one experiment.

        Raises:
            ResultError: they come from different experiments.
        """
        offsets = np.cumsum([0] + [len(part.samples) for part in parts])
        rows = [
            part.rows.assign(sample=part.rows["sample"] + offset) for part, offset in zip(parts, offsets, strict=False)
        ]
        return cls(
            header=same_header([part.header for part in parts]),
            samples=pd.concat([part.samples for part in parts], ignore_index=True),
            rows=pd.concat(rows, ignore_index=True),
            label_logits=torch.cat([part.label_logits for part in parts], dim=1),
            log_partition=torch.cat([part.log_partition for part in parts], dim=1),
            top_ids=torch.cat([part.top_ids for part in parts], dim=1),
            top_log_probs=torch.cat([part.top_log_probs for part in parts], dim=1),
            top_words={token: word for part in parts for token, word in part.top_words.items()},
        )

    def plot(self) -> Figure:
        """Scores and curves by layer where truths are known, else the labels of the first samples by layer."""
        if self._truth_known:
            title = f"{len(self.samples)} clips, accuracy {self.accuracy:.2f}"
            critical = self.critical_layer().layer
            return lens_figures.scores_by_layer(self.information(), self.curves(), critical, title)
        last = self.rows.index[self.rows["span"] == "last"][:SHOWN_SAMPLES]
        names = self.samples.iloc[self.rows.loc[last, "sample"]]
        titles = [f"{sample}: {answer!r}" for sample, answer in zip(names["sample"], names["answer"], strict=True)]
        values = self.log_probs[:, last.tolist()].exp().unbind(1)
        panels = {title: value.numpy() for title, value in zip(titles, values, strict=True)}
        return lens_figures.label_heatmaps(panels, self.labels, "last")

    def positions(self, sample: int = 0) -> pd.DataFrame:
        """Every position of a sample that was read, once, in the order of the sequence.

        Returns:
            columns as ``rows``, and ``audio``: whether the position hears the clip. The index is that of ``rows``.
        """
        rows = self.rows[self.rows["sample"] == sample]
        heard = rows["start"].notna() | rows["span"].str.fullmatch(r"audio(\[\d+\])?(@.+)?")
        rows = rows.assign(audio=rows["position"].isin(rows.loc[heard, "position"]))
        return rows.drop_duplicates("position").sort_values("position")  # several names may share a position

    def plot_sample(self, sample: int = 0, label: str | None = None, clip: Clip | None = None) -> Figure:
        """One sample as a heatmap, layers by positions: the probability of a label (the true one if None).

        Args:
            clip: what the first audio positions hear, to be drawn above them.
        """
        about = self.samples.iloc[sample]
        truth = None if pd.isna(about["truth"]) else about["truth"]
        label = label or truth or about["answer"]
        rows = self.positions(sample)
        values = self.log_probs[:, rows.index.tolist(), self.labels.index(label)].exp().numpy()
        told = "" if truth is None else f", truth {truth!r}"
        title = f"{about['sample']}{told}, answer {about['answer']!r}"
        return lens_figures.sample_heatmap(values, rows, label, title, clip)

    def __repr__(self) -> str:
        said = f"logit lens of {self.header.model}: {len(self.samples)} samples, {self.n_layers} layers, "
        said += f"positions {', '.join(self.spans)}, labels {', '.join(self.labels)}"
        return said + (f"; critical layer (last): {self.critical_layer()}" if self._truth_known else "")

    def _repr_html_(self) -> str:
        head = f"<p>{escape(repr(self))}</p>"
        if not self._truth_known:
            return head + self.samples.to_html(index=False)
        scores = self.information().pivot_table(index="layer", columns="span", values="score", sort=False)
        return head + scores.to_html(float_format="{:.3f}".format)

    @property
    def _truth_known(self) -> bool:
        return not self.samples["truth"].isna().any()

    def _with_truth(self) -> pd.DataFrame:
        if not self._truth_known:
            raise ValueError(
                "the true labels of these samples are not known; run the lens on samples, not on a bare batch."
            )
        return self.samples

    def _known_span(self, span: str) -> str:
        if span not in self.spans:
            raise ValueError(f"{span!r} was not read; this result has {self.spans}.")
        return span

    def _truths(self) -> Int[np.ndarray, " samples"]:
        """The true label of each sample, as its place among the labels."""
        index = {word: place for place, word in enumerate(self.labels)}
        return self._with_truth()["truth"].map(index).to_numpy().astype("int64")

    def _scores(self, span: str) -> Float[np.ndarray, "samples layers"]:
        """The share of a span's positions that have the true label on top."""
        truths = self._truths()
        shares = self.label_shares(span)
        return np.take_along_axis(shares, truths[self._samples_with(span), None, None], axis=-1)[..., 0]

    def _excess(self, span: str) -> Float[np.ndarray, " samples"]:
        """Score above chance summed over layers 1 to L, in units of chance: whole numbers for a single position."""
        return (self._scores(span)[:, 1:] * len(self.labels) - 1).sum(axis=1)

    def _true_probability(self) -> Float[np.ndarray, "layers rows"]:
        truth = torch.from_numpy(self._truths()[self.rows["sample"].to_numpy()]).expand(len(self.label_logits), -1)
        return self.log_probs.gather(-1, truth[..., None])[..., 0].exp().double().numpy()

    def _samples_with(self, span: str) -> np.ndarray:
        return np.unique(self.rows.loc[self.rows["span"] == span, "sample"].to_numpy())

    def _per_sample(self, span: str, values: Float[np.ndarray, "layers rows"]) -> Float[np.ndarray, "samples layers"]:
        """The mean of a span's positions within each sample that has them."""
        chosen = (self.rows["span"] == span).to_numpy()
        table = pd.DataFrame(values[:, chosen].T)
        return table.groupby(self.rows.loc[chosen, "sample"].to_numpy(), sort=True).mean().to_numpy()


def _critical_layers(
    scores: Float[np.ndarray, "resamples layers"], threshold: float
) -> Float[np.ndarray, " resamples"]:
    """The mean of layers, counted from 1, weighted by how far their scores exceed the threshold; NaN if none does."""
    above = scores - threshold
    weights = np.where(above > ROUNDING, above, 0.0)
    total = weights.sum(axis=1)
    weighted = (weights * np.arange(1, scores.shape[1] + 1)).sum(axis=1)
    return np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)


def logit_lens(
    lalm: LALM,
    data: Sequence[Sample] | PromptBatch,
    labels: Labels | Sequence[str],
    positions: Sequence[str] = ("last",),
    *,
    top_k: int = 0,
    whole: bool = False,
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LensResult:
    """Read every layer of a model at named positions, in one forward pass per batch.

    Args:
        data: samples whose answers are known, or one batch from ``lalm.prompt(...)``.
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        positions: names of positions (see `spans`); ``last`` is always read, too, since it holds the model's answer.
        top_k: also keep this many best words of the whole vocabulary per layer and position.
        whole: read whole labels, by the log-probability of all their tokens, teacher-forced, instead of first tokens:
            for labels that share their first token. One pass per label, at the last position alone.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        folder: keep finished batches here and go on from them.

    Raises:
        LabelError: labels that begin with the same token, without ``whole``.
        SpanError: a position that no prompt has.
        ValueError: ``whole`` together with other positions than ``last`` or with ``top_k``.
    """
    prompts = data.prompts if isinstance(data, PromptBatch) else [sample.prompt for sample in data[:1]]
    labels = labels_for(lalm, labels, prompts, whole)
    spans = list(dict.fromkeys([*positions, "last"]))
    if whole and (spans != ["last"] or top_k):
        raise ValueError("whole labels are read at the last position alone, without top_k: a label follows the prompt.")
    options = {"positions": spans, "top_k": top_k, "whole": whole, "label_form": labels.form, "truncate": truncate}
    header = header_of(lalm, RECIPE, form, labels.words, options)
    if isinstance(data, PromptBatch):
        return _read(lalm, data, [str(row) for row in range(len(data))], [None] * len(data), labels, header)

    def compute(samples: Sequence[Sample], desk: Desk) -> LensResult:
        batch = lalm.batch([sample.prompt for sample in samples], truncate)
        truths = [labels.words[labels.index(sample.label)] for sample in samples]
        found = _read(lalm, batch, [sample.name for sample in samples], truths, labels, header)
        desk.advance(len(samples), len(samples))
        return found

    return sweep(
        data,
        compute,
        LensResult,
        header=header,
        batch_size=batch_size,
        folder=folder,
        progress=progress,
    )


def plan(lalm: LALM, batch: PromptBatch, labels: int, positions: Sequence[str] = ("last",), top_k: int = 0) -> Plan:
    """What the lens will take for a batch (see `Plan`); nothing runs.

    Beyond the forward pass it holds one chunk of states and their logits, once in the model's dtype and once in fp32.

    Args:
        labels: number of labels.
    """
    pairs = {pair for name in {*positions, "last"} for pair in _pairs(batch.at(name))}
    words, width = lalm.unembed._module.weight.shape
    rows = max(ops.CHUNK_ROWS // len(pairs), 1) * len(pairs)
    chunk = min(rows, ops.CHUNK_ROWS)
    size = lalm.unembed._module.weight.element_size()
    read = sum(len(batch.at(name)) for name in dict.fromkeys([*positions, "last"]))
    numbers = (labels + 1 + top_k) * 4 + top_k * 8  # label logits, partition and best logits in fp32; best ids in int64
    return Plan(
        layers=lalm.n_layers + 1,
        positions=batch.shape[1],
        read=read,
        weights=weight_bytes(lalm),
        working=rows * width * size + chunk * words * (size + 4),
        result=(lalm.n_layers + 1) * read * numbers,
    )


def _pairs(chosen: Selection) -> list[tuple[int, int]]:
    return list(zip(chosen.rows.tolist(), chosen.cols.tolist(), strict=True))


def _read(
    lalm: LALM,
    batch: PromptBatch,
    names: Sequence[str],
    truths: Sequence[str | None],
    labels: Labels,
    header: Header,
) -> LensResult:
    selections = [batch.at(span) for span in header.options["positions"]]
    if header.options["whole"]:
        scores = _whole_label_scores(lalm, batch, labels)
    else:
        scores = _token_scores(lalm, batch, selections, labels.first, header.options["top_k"])
    label_logits, log_partition, top_ids, top_logits = scores
    is_last = torch.tensor([chosen.name == "last" for chosen in selections for _ in range(len(chosen))])
    answers = [header.labels[index] for index in label_logits[-1, is_last].argmax(-1).tolist()]
    return LensResult(
        header=header,
        samples=pd.DataFrame({"sample": list(names), "truth": list(truths), "answer": answers}, columns=SAMPLE_COLUMNS),
        rows=_row_table(batch, selections),
        label_logits=label_logits,
        log_partition=log_partition,
        top_ids=top_ids,
        top_log_probs=top_logits - log_partition[..., None],
        top_words={token: lalm.tokenizer.decode([token]) for token in top_ids.unique().tolist()},
    )


def _token_scores(
    lalm: LALM, batch: PromptBatch, selections: Sequence[Selection], label_ids: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, ...]:
    """Label logits, log-partition, best ids and their logits: ``[layers, rows, ...]``, rows as selected."""
    rows, cols = (torch.cat([getattr(chosen, axis) for chosen in selections]) for axis in ("rows", "cols"))
    # A position that several names share meets the unembedding once.
    pairs, back = torch.unique(torch.stack([rows, cols]), dim=1, return_inverse=True)
    with torch.no_grad(), lalm.trace(batch, use_cache=False) as tracer:
        scores = save(ops.lens(lalm.blocks, lalm.ln_final, lalm.unembed, pairs[0], pairs[1], label_ids, top_k))
        tracer.stop()
    return tuple(score.cpu()[:, back] for score in scores)


def _whole_label_scores(lalm: LALM, batch: PromptBatch, labels: Labels) -> tuple[torch.Tensor, ...]:
    """As `_token_scores`, at the last position; a label's logit is its log-probability, so the partition is 0."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    count, width = ids.shape
    columns = []
    for tokens in labels.tokens:
        fed = torch.tensor(tokens[:-1], dtype=ids.dtype).expand(count, -1)
        longer = {"input_ids": torch.cat([ids, fed], 1), "attention_mask": torch.cat([mask, torch.ones_like(fed)], 1)}
        rows = torch.arange(count).repeat_interleave(len(tokens))
        cols = torch.arange(width - 1, width - 1 + len(tokens)).repeat(count)
        wanted = torch.tensor(tokens).repeat(count)
        with torch.no_grad(), lalm.trace({**batch.inputs, **longer}, use_cache=False) as tracer:
            log_probs = save(ops.lens_of_tokens(lalm.blocks, lalm.ln_final, lalm.unembed, rows, cols, wanted))
            tracer.stop()
        columns.append(log_probs.cpu().unflatten(1, (count, len(tokens))).sum(-1))
    label_logits = torch.stack(columns, dim=-1)
    nothing = torch.zeros(*label_logits.shape[:2], 0)
    return label_logits, torch.zeros(label_logits.shape[:2]), nothing.long(), nothing


def _row_table(batch: PromptBatch, selections: Sequence[Selection]) -> pd.DataFrame:
    positions = batch.positions
    first = (positions.roles != Role.PAD).int().argmax(dim=1)
    lines = []
    for chosen in selections:
        seen: dict[int, int] = {}
        for row, col in zip(chosen.rows.tolist(), chosen.cols.tolist(), strict=True):
            index = seen[row] = seen.get(row, -1) + 1
            start, end = positions.seconds[row, col].tolist()
            token = positions.token_text(row, col)
            lines.append((row, chosen.name, index, col - int(first[row]), token, start, end))
    return pd.DataFrame(lines, columns=ROW_COLUMNS)


def the_lens_ends_in_the_models_logits(probe: Probe) -> Finding:
    """The lens after the last block says what the model says."""
    batch = probe.batch(*probe.clips)
    every_word = torch.arange(probe.lalm.unembed._module.out_features)
    logits, *_ = _token_scores(probe.lalm, batch, [batch.at("last")], every_word, top_k=0)
    return probe.rounding("the lens ends in the model's logits", logits[-1], probe.logits(batch)[:, -1])


INVARIANTS = (the_lens_ends_in_the_models_logits,)
