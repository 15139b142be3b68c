"""``audio-lens paper``, ``merge`` and ``compare``: the whole paper for a model, in shares, and beside other models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from audio_lens_plugin.run_cli import BatchSize, Dtype, Model, Truncate, errors

if TYPE_CHECKING:
    from pandas import DataFrame

    from audio_lens_plugin.datasets import ClipSet
    from audio_lens_plugin.multiple_choice import QuestionSet
    from audio_lens_plugin.paper.design import Data

console = Console()

Sakura = Annotated[Path | None, typer.Option("--sakura", help="SAKURA as published: the folder that holds its tracks.")]
QuestionFile = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        help="Multiple-choice questions about clips: json, jsonl, csv, tsv, parquet, or a saved Hugging Face dataset.",
    ),
]


def paper(
    out: Annotated[Path, typer.Option(help="Folder of the run; what is finished there is not run again.")],
    model: Model,
    sakura: Sakura = None,
    questions: QuestionFile = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:0,cuda:1 (a process on each), or auto (one model over all).")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only the i-th of n shares; then `audio-lens merge`.")] = None,
    seed: Annotated[int, typer.Option(help="Of bootstraps, permutations, controls and the split.")] = 0,
    truncate: Truncate = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure two batches, print time and memory, stop.")
    ] = False,
) -> None:
    """Every analysis of the AudioLens paper for a model. A toy without data runs on its own clips."""
    from audio_lens_plugin.paper.design import Settings
    from audio_lens_plugin.paper.forecast import forecast
    from audio_lens_plugin.paper.run import run_paper

    data, share = _data(model, sakura, questions), _share(shard)
    settings = Settings(batch_size=batch_size, seed=seed, truncate=truncate)
    devices = [name.strip() for name in device.split(",")] if device else []
    if dry_run:
        table = forecast(model, data, out, settings=settings, dtype=dtype, device=devices[0] if devices else None)
        _print_forecast(table, max(len(devices), 1) * (share or (1, 1))[1])
        return
    try:
        path = run_paper(model, data, out, settings=settings, dtype=dtype, devices=devices, shard=share, progress=True)
    except KeyboardInterrupt:
        errors.print(f"stopped; finished batches are in {out}: the same command goes on from there", soft_wrap=True)
        raise
    if share:
        errors.print(f"shard {shard} is finished; when all are: audio-lens merge {out}", soft_wrap=True)
    print(path)


def merge(
    runs: Annotated[list[Path], typer.Argument(help="The folder of the shards, or their folders; the first gets all.")],
    sakura: Sakura = None,
    questions: QuestionFile = None,
) -> None:
    """Tables, figures and report of finished shards. Name the clips again to hear them in the report."""
    from audio_lens_plugin.loading import toys
    from audio_lens_plugin.paper.folder import RunFolder
    from audio_lens_plugin.paper.run import merge as merge_runs

    model = RunFolder.open(runs[0]).identity.model
    named = sakura or questions or model in toys()
    print(merge_runs(runs, _data(model, sakura, questions) if named else None))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and the report.")] = Path("out/compare"),
) -> None:
    """Lay runs of several models side by side."""
    from audio_lens_plugin.paper.compare import compare as compare_runs

    print(compare_runs(runs, out))


def _data(model: str, sakura: Path | None, questions: Path | None) -> Data:
    from audio_lens_plugin.datasets import DatasetError, toy_tracks
    from audio_lens_plugin.loading import toys
    from audio_lens_plugin.multiple_choice import sakura_whole

    found: dict[str, ClipSet | QuestionSet] = {}
    if sakura is not None:
        found |= sakura_whole(sakura)
    if questions is not None:
        found |= _questions(questions)
    if not found and model in toys():
        found |= toy_tracks(model)
    if not found:
        raise DatasetError("name the clips: --sakura FOLDER or --questions FILE (toys bring their own).")
    return found


def _questions(source: Path) -> dict[str, QuestionSet]:
    """A table, or a folder that a Hugging Face dataset was saved to."""
    from audio_lens_plugin.multiple_choice import questions

    if not source.is_dir():
        return questions(source)
    from datasets import load_from_disk

    return questions(load_from_disk(str(source)))


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+/\d+", text):
        raise ValueError(f"--shard takes i/n, for example 1/4, not {text!r}.")
    i, n = map(int, text.split("/"))
    return i, n


def _print_forecast(table: DataFrame, processes: int) -> None:
    shown = Table()
    for column in table.columns:
        shown.add_column(column, justify="left" if column == "experiment" else "right")
    for _, line in table.iterrows():
        shown.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value}" for value in line))
    console.print(shown)
    hours = table["seconds"].sum() / 3600
    console.print(
        f"{table['missing'].sum()} of {table['batches'].sum()} batches are missing: about {hours:.2f} hours on one "
        f"device, {hours / processes:.2f} on {processes}; at most {table['memory'].max():.1f} GiB. "
        "The measured batches are kept.",
        soft_wrap=True,
    )
