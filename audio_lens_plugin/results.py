"""What an experiment returns: tensors with a header that says where they came from, saved as parquet and JSON.

A result is a folder: ``<recipe>.json`` (the header) beside one parquet file per table, tidy, readable by anything.
Folders appear whole or not at all: they are written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

PACKAGES = ("audio-lens-plugin", "torch", "transformers", "nnsight", "transformer-lens", "numpy")


class ResultError(ValueError):
    """A saved result that cannot be read, or results that do not belong together."""


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide numbers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Header:
    """Where a result came from.

    Attributes:
        recipe: the experiment's name.
        model: repo id, folder or toy.
        revision: commit or branch of the checkpoint, if known.
        weights: a fingerprint of configuration and weights.
        dtype: of the weights.
        attention: the attention implementation that ran.
        form: the prompt form, or "custom".
        labels: the label words, in the order of every label axis.
        options: the recipe's own settings.
        versions: of the packages that computed it.
    """

    recipe: str
    model: str
    revision: str | None
    weights: str
    dtype: str
    attention: str
    form: str
    labels: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)


def save_tables(folder: str | os.PathLike[str], header: Header, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Write a header and its tables as a folder, whole or not at all; an older result there is replaced.

    Raises:
        ResultError: the folder is there and holds something else; nothing is touched.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / f"{header.recipe}.json").is_file():
        raise ResultError(f"{folder} holds something that is no result of {header.recipe}; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        ready = Path(scratch) / "ready"  # the scratch folder itself is readable by its owner alone
        ready.mkdir()
        for name, table in tables.items():
            table.to_parquet(ready / f"{name}.parquet", index=False)
        text = json.dumps(asdict(header), indent=2, ensure_ascii=False)
        (ready / f"{header.recipe}.json").write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        ready.rename(folder)
    return folder


def load_tables(folder: str | os.PathLike[str], recipe: str) -> tuple[Header, dict[str, pd.DataFrame]]:
    """Read what `save_tables` wrote.

    Raises:
        ResultError: the folder holds no result of this recipe.
    """
    folder = Path(folder)
    head = folder / f"{recipe}.json"
    if not head.is_file():
        raise ResultError(f"{folder} holds no result of {recipe}: there is no {head.name} in it.")
    fields = json.loads(head.read_text(encoding="utf-8"))
    fields["labels"] = tuple(fields["labels"])
    return Header(**fields), {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def same_header(headers: Sequence[Header]) -> Header:
    """The header that all parts of one result share.

    Raises:
        ResultError: they differ, so their numbers must not stand in one table.
    """
    first, *others = headers
    for other in others:
        differing = [name for name, value in asdict(first).items() if asdict(other)[name] != value]
        if differing:
            raise ResultError(f"results do not belong together: they differ in {', '.join(differing)}.")
    return first
