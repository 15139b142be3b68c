"""The package as it is installed: patches/ and recipes/ inside audio_lens_plugin/.

Tools that read source do not follow setuptools' package-dir, so the three folders are laid out under build/ for them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out(folder: Path) -> None:
    """Copy the package's source into a folder, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "audio_lens_plugin"
    shutil.copytree(
        ROOT / "audio_lens_plugin", package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "clips")
    )
    for room in ("patches", "recipes"):
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
