"""Run mypy over the package as it is installed (see `layout`)."""

from __future__ import annotations

import subprocess
import sys

from layout import ROOT, lay_out

LAID_OUT = ROOT / "build" / "typecheck"


def main() -> int:
    lay_out(LAID_OUT)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "audio_lens_plugin"]
    return subprocess.run(command, cwd=LAID_OUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
