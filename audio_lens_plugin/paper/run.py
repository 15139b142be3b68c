"""Every analysis of the AudioLens paper (arXiv 2506.05140) for one model, in one call.

    run_paper("toy/qwen2-audio", toy_tracks("toy/qwen2-audio"), "out/paper")
    run_paper("Qwen/Qwen2-Audio-7B-Instruct", sakura_whole("SAKURA"), "out/qwen2", devices=["cuda:0", "cuda:1"])

The work is a list of units (see `design`). Whoever runs it, on one machine or as one of several shards, takes units
that are not finished, one after the other, and leaves each as a folder of its own. When all are there, `finish` makes
tables, figures and the report of them; it needs no model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from audio_lens_plugin.labels import form_after
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load, toys
from audio_lens_plugin.multiple_choice import QuestionSet
from audio_lens_plugin.paper.design import CLIP, Data, Settings, Unit, by_length, samples_of, subjects_of
from audio_lens_plugin.paper.experiments import KINDS, Task
from audio_lens_plugin.paper.finish import finish
from audio_lens_plugin.paper.folder import Identity, RunFolder
from audio_lens_plugin.recipes.enhancement import split_groups
from audio_lens_plugin.results import ResultError

Shard = tuple[int, int]
LOOK_EVERY = 0.5  # seconds


def run_paper(
    model: str,
    data: Data,
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    dtype: torch.dtype | str | None = None,
    devices: Sequence[str] = (),
    shard: Shard | None = None,
    progress: bool = False,
) -> Path:
    """Run everything and write the report; what is finished in ``out`` is not run again.

    Args:
        model: a repo id, a folder, or a toy.
        data: clips by the name of their track (`multiple_choice.sakura_whole`, `datasets.toy_tracks`, or any other),
            and sets of questions by theirs (`multiple_choice.questions`). Where there are tracks, questions are only
            asked: what is causal is measured on the tracks.
        out: the folder of the run.
        settings: see `design.Settings`.
        dtype: of the weights; the checkpoint's own if None.
        devices: ``["cuda:0", "cuda:1"]``: one process on each; one name, or none, runs here. ``["auto"]`` spreads one
            model over all devices.
        shard: ``(i, n)``: only the i-th of n shares, i from 1. The last step is then `merge`.
        progress: show a bar.

    Returns:
        The path of ``report.html``; of the run's folder for a shard.

    Raises:
        ResultError: the folder holds another run.
        ValueError: a shard that does not exist.
    """
    settings, out = settings or Settings(), Path(out)
    i, n = shard or (1, 1)
    if not 1 <= i <= n:
        raise ValueError(f"shard {i}/{n}: the first number counts from 1 to the second.")
    with _bar(out, shard, progress) as tick:
        if len(devices) > 1:
            run = _on_devices(model, data, out, settings, dtype, devices, (i, n), tick)
        else:
            run = _share(model, data, out, settings, dtype, *devices, shard=(i, n), tick=tick)
    return run.path if shard else finish(run, data)


def begin(lalm: LALM, data: Data, out: Path, settings: Settings) -> RunFolder:
    """The folder of a run of this model, new or gone on with.

    Raises:
        LabelError: labels of a track begin with the same token of this model.
        ResultError: the folder holds another run.
        ValueError: too few clips to choose the enhancement by some and to judge it by others.
    """
    subjects = subjects_of(data)
    for subject in subjects:
        clips = data[subject.name]
        if subject.causal:
            split_groups(clips.groups(), clips.labels, settings.development, settings.seed)
        for form in subject.forms:
            opened = samples_of(clips, form, CLIP, [0])[0].prompt.answer
            lalm.labels(subject.labels, form_after([opened])).check_first()
    identity = Identity.of(lalm, _digest(data), subjects, settings)
    return RunFolder.begin(out, identity, _clip_table(data))


def run_unit(lalm: LALM, run: RunFolder, data: Data, unit: Unit) -> Any:
    """Compute one unit and leave it among the run's parts; returns its result."""
    clips, settings = data[unit.track], run.identity.settings
    (subject,) = (subject for subject in run.identity.subjects if subject.name == unit.track)
    indices = run.clips_of(unit.track)["index"].tolist()
    mine = indices[unit.batch * settings.batch_size : (unit.batch + 1) * settings.batch_size]
    samples = samples_of(clips, unit.form, unit.control, mine)
    _, compute = KINDS[unit.experiment]
    options = clips.options(mine) if isinstance(clips, QuestionSet) else None
    result = compute(Task(lalm, samples, unit, subject, settings, options))
    result.save(run.part(unit))
    return result


def merge(runs: Sequence[str | os.PathLike[str]], data: Data | None = None) -> Path:
    """Tables, figures and report of shards that ran in one folder, or in several; returns the path of the report.

    Args:
        runs: the folders; the finished batches of the others are copied into the first.
        data: the clips, to be played in the report; it has no sound without them.

    Raises:
        ResultError: runs of different things, batches that nobody finished, or other clips.
    """
    first, *others = (RunFolder.open(Path(path)) for path in runs)
    if data and _digest(data) != first.identity.data:
        raise ResultError(
            f"{first.path} was run on other clips than these. Name those, or none: the report is then mute."
        )
    for other in others:
        first.take(other)
    return finish(first, data or {})


def load_for_run(model: str, dtype: torch.dtype | str | None, device: str | None) -> LALM:
    """The model of a run; a toy on one thread, since on models this small more would only wait for each other."""
    if model in toys():
        torch.set_num_threads(1)
    return load(model, dtype=dtype, device_map=device)


def _share(
    model: str,
    data: Data,
    out: Path,
    settings: Settings,
    dtype: torch.dtype | str | None,
    device: str | None = None,
    *,
    shard: Shard,
    tick: Any = None,
) -> RunFolder:
    """Every n-th unit, as far as it is not finished; what others finish meanwhile is left out."""
    lalm = load_for_run(model, dtype, device)
    run = begin(lalm, data, out, settings)
    i, n = shard
    for unit in run.units[i - 1 :: n]:
        if not run.part(unit).is_dir():
            run_unit(lalm, run, data, unit)
        if tick is not None:
            tick()
    return run


def _on_devices(
    model: str,
    data: Data,
    out: Path,
    settings: Settings,
    dtype: torch.dtype | str | None,
    devices: Sequence[str],
    shard: Shard,
    tick: Any,
) -> RunFolder:
    """One process per device, each with a share of the share."""
    i, n = shard
    shares = [(i + place * n, n * len(devices)) for place in range(len(devices))]
    with ProcessPoolExecutor(len(devices), mp_context=get_context("spawn")) as pool:
        works: list[Future[RunFolder]] = [
            pool.submit(_share, model, data, out, settings, dtype, device, shard=share)
            for device, share in zip(devices, shares, strict=True)
        ]
        try:
            while wait(works, timeout=LOOK_EVERY).not_done:
                tick()
            runs = [work.result() for work in works]
        except BrokenProcessPool:
            raise RuntimeError(
                f"a worker died, perhaps for want of memory; finished batches are in {out}: the same command goes on."
            ) from None
    return runs[0]


def _digest(data: Data) -> str:
    """A content hash of all clips and what is asked about them."""
    return sha256("".join(clips.digest() for clips in data.values()).encode()).hexdigest()[:16]


def _clip_table(data: Data) -> pd.DataFrame:
    """The clips in the order of their batches; ``index`` is the place in the data set."""
    tables = []
    for track, clips in data.items():
        order, seconds, groups = by_length(clips), clips.seconds(), clips.groups()
        columns = {"clip": clips.names, "label": clips.labels, "group": groups, "seconds": seconds}
        chosen = {name: [values[index] for index in order] for name, values in columns.items()}
        tables.append(pd.DataFrame({"track": track, "index": order, **chosen}))
    return pd.concat(tables, ignore_index=True)


@contextmanager
def _bar(out: Path, shard: Shard | None, show: bool) -> Iterator[Any]:
    """A bar of the finished batches, whichever process finished them; gives what is called to move it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("loading the model", total=None)
        looked = 0.0

        def tick() -> None:
            nonlocal looked
            if not show or time.monotonic() - looked < LOOK_EVERY or not (out / "run.json").is_file():
                return
            run, looked = RunFolder.open(out), time.monotonic()
            i, n = shard or (1, 1)
            mine = run.units[i - 1 :: n]
            finished = sum(run.part(unit).is_dir() for unit in mine)
            unit = next((unit for unit in mine if not run.part(unit).is_dir()), mine[-1])
            bar.update(task, description=f"{unit.experiment} {unit.track}", completed=finished, total=len(mine))

        yield tick
