"""What a run will take, measured on this machine: two batches of every experiment are run, and kept for the run itself.

The first batch of an experiment has the longest clips: it tells how much memory is needed. The middle one tells how
long a batch takes.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.paper.design import EXPERIMENTS, Data, Settings, Unit
from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.paper.run import begin, load_for_run, run_unit

GIB = 2**30


def forecast(
    model: str,
    data: Data,
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Time and memory of a run, by experiment.

    Args:
        model: see `run.run_paper`, as for all of these.
        data: what the run is about.
        out: the folder of the run; measured batches stay there.
        settings: of the run.
        dtype: of the weights.
        device: where the model runs.

    Returns:
        one line per experiment: ``batches``; ``missing`` of them; ``cells`` (rows of results: a clip of the lens, an
        edited pass of the causal experiments); ``passes`` (of the language model's last block); ``seconds`` for what is
        missing, on one device; ``memory`` (GiB, the most that was held: of the accelerator, or of this process).

    Raises:
        ResultError: the folder holds another run.
    """
    lalm = load_for_run(model, dtype, device)
    run = begin(lalm, data, Path(out), settings or Settings())
    lines = []
    for experiment in EXPERIMENTS:
        mine = [unit for unit in run.units if unit.experiment == experiment]
        if mine:
            lines.append({"experiment": experiment, **_measured(lalm, run, data, mine)})
    return pd.DataFrame(lines)


def _measured(lalm: LALM, run: RunFolder, data: Data, units: list[Unit]) -> dict[str, float]:
    batches = [unit for unit in units if (unit.track, unit.form, unit.control) == _largest(run, units)]
    _forget_memory()
    run_unit(lalm, run, data, batches[0])
    memory = _memory()
    with _counting(lalm) as passes:
        started = time.perf_counter()
        result = run_unit(lalm, run, data, batches[len(batches) // 2])
        seconds = time.perf_counter() - started
    cells = len(getattr(result, "cells", result.samples))
    missing = sum(not run.part(unit).is_dir() for unit in units)
    return {
        "batches": len(units),
        "missing": missing,
        "cells": cells * missing,
        "passes": len(passes) * missing,
        "seconds": seconds * missing,
        "memory": memory,
    }


def _largest(run: RunFolder, units: list[Unit]) -> tuple[str, str, str]:
    """The question of these units that is put to most clips."""
    counts = run.clips["track"].value_counts()
    largest = max(units, key=lambda unit: counts[unit.track])
    return largest.track, largest.form, largest.control


@contextmanager
def _counting(lalm: LALM) -> Iterator[list[int]]:
    """Counts how often the last block runs."""
    passes: list[int] = []
    handle = lalm.blocks[-1]._module.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


def _forget_memory() -> None:
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _memory() -> float:
    """GiB: of the fullest accelerator, or of this process where there is none."""
    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
