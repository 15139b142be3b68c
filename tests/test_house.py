"""The house stands: floors, lazy imports, packaging, nothing of one machine in the repository."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from audio_lens_plugin import __all__ as public_names
from audio_lens_plugin import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "audio_lens_plugin"
FOLDERS = {PACKAGE: PACKAGE, f"{PACKAGE}.patches": "patches", f"{PACKAGE}.recipes": "recipes"}

# design.md's floors, one finer: a room imports only from lines above its own. "patches.*" is every family.
FLOORS = [
    ["ops", "audio", "spans", "labels", "tracks", "towers", "causal"],
    ["prompts", "results", "statistics"],
    ["patch"],
    ["patches", "patches.*"],
    ["bridge", "checks"],
    ["lalm"],
    ["loading"],
    ["recipes", "recipes.engine", "recipes.scores", "recipes.pairs", "recipes.figure_style"],
    ["recipes.cells", "recipes.lens_figures", "recipes.causal_figures"],
    ["recipes.ears", "recipes.twins"],
    ["recipes.cuts"],
    ["recipes.*"],
    ["recipes.enhancement"],
    ["datasets"],
    ["multiple_choice"],
    ["report"],
    ["causal_sections"],
    ["paper", "paper.design"],
    ["paper.experiments"],
    ["paper.folder"],
    ["paper.tables", "paper.findings", "paper.figures"],
    ["paper.sections"],
    ["paper.finish"],
    ["paper.run", "paper.compare"],
    ["paper.forecast"],
    ["demo", "run_cli"],
    ["paper_cli"],
    ["cli"],
    ["toy_shelf", "toy_shelf.*"],
]


def rooms() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split(".")[1:], *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return {name: path for name, path in found.items() if name}


def floor_of(room: str) -> int:
    for floor, names in enumerate(FLOORS):
        if room in names:
            return floor
    for floor, names in enumerate(FLOORS):
        if any(name.endswith(".*") and room.startswith(name[:-1]) for name in names):
            return floor
    raise AssertionError(f"{room} has no floor: add it to FLOORS")


def household(room: str) -> str:
    """Rooms that live together import from each other as they like: the toys, and the rooms of one family."""
    parts = room.split(".")
    return parts[0] if parts[0] == "toy_shelf" else ".".join(parts[:2])


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")}
    return inside & set(rooms())


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_from_the_floors_below(room: str) -> None:
    above = {
        other
        for other in imported_rooms(rooms()[room])
        if floor_of(other) >= floor_of(room) and household(other) != household(room)
    }
    assert not above, f"{room} (floor {floor_of(room)}) imports from its own floor or above: {above}"


def test_families_do_not_know_each_other() -> None:
    for room, path in rooms().items():
        if room.startswith("patches."):
            family = room.split(".")[1]
            others = {name for name in imported_rooms(path) if name.startswith("patches.")}
            assert all(name.split(".")[1] == family for name in others), f"{room} imports {others}"


def test_the_traced_room_imports_torch_alone_and_at_the_top() -> None:
    tree = ast.parse((ROOT / PACKAGE / "ops.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(node in tree.body for node in imports)
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names}
    assert names <= {"torch", "typing", "collections.abc", "math"}
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))


@pytest.mark.parametrize(
    "code", ["import audio_lens_plugin", "import audio_lens_plugin.cli", "import audio_lens_plugin.tracks"]
)
def test_importing_does_not_import_torch(code: str) -> None:
    check = f"{code}; import sys; print(sorted({{'torch', 'transformers', 'nnsight', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    package = __import__(PACKAGE)
    assert all(getattr(package, name) is not None for name in public_names)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_the_version_stands_in_one_form_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_patches_and_recipes_inside_the_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: setuptools leaves a build folder behind
    for folder in (PACKAGE, "patches", "recipes"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = ("patches/qwen2_audio.py", "patches/qwen_audio/modeling.py", "patches/desta/modeling.py")
    for name in (*inside, "recipes/logit_lens.py", "report.html.jinja", "py.typed"):
        assert f"{PACKAGE}/{name}" in names
    assert any(name.startswith(f"{PACKAGE}/toy_shelf/qwen2-audio/clips/audio/") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert all(top.startswith(PACKAGE) for top in tops), f"the wheel puts {tops} into site-packages"


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_is_over_five_megabytes() -> None:
    assert not [path.name for path in tracked_files() if path.stat().st_size > 5_000_000]


def test_no_absolute_path_of_one_machine_is_in_the_repository() -> None:
    marks = [f"/{folder}/" for folder in ("work", "root", "home", "tmp")]
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".jinja", ".csv", ""}:
            text = path.read_text(errors="ignore")
            assert not [mark for mark in marks if f'"{mark}' in text or f" {mark}" in text], path


def test_no_public_name_is_that_of_a_room() -> None:
    """Whoever imports the room would otherwise find the module in the place of the function."""
    tops = {room.split(".")[0] for room in rooms()}
    assert not tops & set(public_names)
