"""Run mypy over the package as it is installed: patches/ and recipes/ inside audio_lens_plugin/.

mypy does not follow setuptools' package-dir, so the three folders are laid out under build/ first.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAID_OUT = ROOT / "build" / "typecheck"


def main() -> int:
    shutil.rmtree(LAID_OUT, ignore_errors=True)
    package = LAID_OUT / "audio_lens_plugin"
    shutil.copytree(
        ROOT / "audio_lens_plugin", package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "clips")
    )
    for room in ("patches", "recipes"):
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "audio_lens_plugin"]
    return subprocess.run(command, cwd=LAID_OUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
