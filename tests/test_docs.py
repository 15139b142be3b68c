"""The documentation: every page is reached, every public name is on one, its code runs, and it needs no network."""

from __future__ import annotations

import ast
import html
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import yaml
from documents import blocks, program
from sakura_layout import lay_out

from audio_lens_plugin import _HOMES
from audio_lens_plugin.datasets import toy_clips

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
GUIDE = [page for page in PAGES if not page.startswith("api/")]


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def rooms_on(page: str) -> list[str]:
    """The modules that a page of the API shows."""
    return re.findall(r"^::: (\S+)$", text_of(page), flags=re.M)


def pages_of(nav: list) -> list[str]:
    """The pages of a table of contents, whatever sections they are in."""
    found = []
    for entry in nav:
        below = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_of(below) if isinstance(below, list) else [below]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that the pages' programs name."""
    lay_out(tmp_path / "SAKURA")
    clips = toy_clips("toy/qwen2-audio", "Gender")
    (female, male) = (clips.sources[clips.labels.index(label)] for label in ("female", "male"))
    shutil.copy(male, tmp_path / "a.ogg")
    shutil.copy(female, tmp_path / "b.ogg")
    pd.DataFrame({"file": ["a.ogg", "b.ogg"], "who": ["male", "female"]}).to_csv(tmp_path / "clips.csv", index=False)
    return tmp_path


def test_every_page_is_in_the_table_of_contents_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == PAGES


def test_every_room_is_on_one_page() -> None:
    rooms = [room for page in PAGES for room in rooms_on(page)]
    assert len(rooms) == len(set(rooms))
    assert {f"audio_lens_plugin.{home}" for home in _HOMES.values()} <= set(rooms)


def test_every_public_name_has_a_place_to_link_to(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    missing = [name for name, home in _HOMES.items() if f'id="audio_lens_plugin.{home}.{name}"' not in pages]
    assert not missing, "these have no docstring"


@pytest.mark.parametrize("page", [page for page in PAGES if rooms_on(page)])
def test_indented_lines_of_a_rooms_text_are_shown_as_code(page: str, site: Path) -> None:
    shown = (site / page).with_suffix(".html").read_text()
    code = html.unescape(re.sub(r"<[^>]+>", "", "\n".join(re.findall(r"<pre>.*?</pre>", shown, flags=re.S))))
    for room in rooms_on(page):
        said = ast.get_docstring(ast.parse(Path(import_module(room).__file__).read_text()), clean=False)
        for line in said.splitlines():
            assert not line.startswith("    ") or line.strip() in code, f"{room}: {line}"


def test_every_table_of_a_run_is_told_with_its_columns() -> None:
    from audio_lens_plugin.paper.tables import TABLES

    assert re.findall(r"^\| `(\w+)` \|", text_of("paper.md").split("## The tables")[1], flags=re.M) == list(TABLES)


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for path in pages:
        assert not fetched.findall(path.read_text()), path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", path.read_text()), path.name


@pytest.mark.parametrize("page", GUIDE)
def test_a_pages_code_runs_and_prints_what_the_page_says(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_of(page)
    assert {kind for kind, _ in blocks(text)} <= {"python", "text"}
    script = folder / "page.py"
    script.write_text(program(text))
    monkeypatch.chdir(folder)
    runpy.run_path(str(script))
    printed = capsys.readouterr().out
    for kind, content in blocks(text):
        assert kind != "text" or content in printed


def test_pages_include_what_is_tested_where_it_stands() -> None:
    """The README's code is run by its own test; CONTRIBUTING has none."""
    included = {name for page in PAGES for name in re.findall(r'^--8<-- "([^":]+)', text_of(page), flags=re.M)}
    assert included == {"README.md", "CONTRIBUTING.md"}
    assert not blocks((ROOT / "CONTRIBUTING.md").read_text())
