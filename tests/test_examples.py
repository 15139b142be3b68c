"""The notebooks of examples/ run from top to bottom, and what is stored in them is small and without errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FIGURES = {"causal_audio": 9, "first_look": 2, "own_clips": 2, "own_family": 1, "paper_on_a_toy": 2}  # at least


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def figures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def clutter(notebook: nbformat.NotebookNode) -> list[str]:
    """Errors and warnings among the outputs."""
    kinds = [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]
    return [output.get("text", output.get("evalue", "")) for output in kinds]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelSpecManager:
    """The Python that runs this test as the only kernel; what Jupyter and IPython write goes to a folder of ours."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    return KernelSpecManager(kernel_dirs=[str(spec.parent.parent)], ensure_native_kernel=False)


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_errors_and_draws(path: Path, kernels: KernelSpecManager, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell["outputs"] = []
    folder = tmp_path / "run"
    folder.mkdir()
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    NotebookClient(notebook, km=manager, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    assert not clutter(notebook)
    assert figures(notebook) >= FIGURES[path.stem]
    assert not list(folder.iterdir()), "a notebook leaves nothing behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_a_whole_run_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 600_000
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not clutter(notebook)
    assert figures(notebook) >= FIGURES[path.stem]
