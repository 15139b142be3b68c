"""mkdocs runs this before it builds: the API pages are made of the package as it is installed (see `layout`)."""

from __future__ import annotations

from typing import Any

from layout import ROOT, lay_out
from mkdocs.plugins import event_priority


@event_priority(100)  # before mkdocstrings, which only takes folders that are there
def on_config(config: Any) -> None:
    """Lay the package out where mkdocs.yml lets mkdocstrings look for it."""
    lay_out(ROOT / "build" / "docs")
