"""The pages of the documentation site: complete, and laid out so that their links hold."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

REFERENCE = ["audio", "latents", "losses", "evaluation", "training", "encoding", "pretrained"]


def documented(page: Path) -> dict[str, object]:
    """The objects of a page of the reference by name."""
    paths = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    parts = [path.rpartition(".") for path in paths]
    return {name: getattr(importlib.import_module(module), name) for module, _, name in parts}


@pytest.mark.parametrize("name", ["ear_vae", *REFERENCE])
def test_the_reference_has_all_that_is_public(repository: Path, name: str) -> None:
    module = importlib.import_module("ear_vae" if name == "ear_vae" else f"ear_vae.{name}")
    found = documented(repository / "docs" / "reference" / f"{name}.md")
    assert set(found) == set(module.__all__) - {"__version__"}
    assert all(found[public] is getattr(module, public) for public in found)


def test_every_page_is_in_the_navigation(repository: Path) -> None:
    listed = re.findall(r'= "([\w/-]+\.md)"', (repository / "zensical.toml").read_text(encoding="utf-8"))
    docs = repository / "docs"
    assert len(listed) == len(set(listed))
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} <= set(listed)


@pytest.fixture
def pages(repository: Path) -> ModuleType:
    pytest.importorskip("nbconvert")
    spec = importlib.util.spec_from_file_location("pages", repository / "scripts" / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def little_repository(folder: Path, sound: np.ndarray) -> Path:
    """A page, a card beside docs, a file of code and a notebook that was run, which link to each other."""
    import nbformat

    (folder / "docs").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "docs" / "index.md").write_text(
        "[card](../MODEL_CARD.md#limits) [code](../run.py) [n](../notebooks/01_n.ipynb) `[x](gone.md)`\n"
    )
    (folder / "MODEL_CARD.md").write_text("[home](docs/index.md) [web](https://example.org/a.md)\n")
    (folder / "run.py").write_text("pass\n")
    stream = io.BytesIO()
    soundfile.write(stream, sound, 8000, format="WAV", subtype="PCM_16")
    encoded = base64.b64encode(stream.getvalue()).decode()
    player = f'<audio controls><source src="data:audio/wav;base64,{encoded}" type="audio/wav" />'
    output = nbformat.v4.new_output("display_data", {"text/html": player})
    cells = [
        nbformat.v4.new_markdown_cell("# Listen\n\nTo [this](../docs/index.md)."),
        nbformat.v4.new_code_cell("1", outputs=[output]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "01_n.ipynb")
    return folder


def test_links_and_sounds_of_pages(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = np.random.default_rng(0).integers(-1000, 1000, 800).astype(np.int16)
    root = little_repository(tmp_path / "repository", sound)
    monkeypatch.setattr(pages, "ROOT", root)
    monkeypatch.setattr(pages, "INCLUDED", {"MODEL_CARD.md": "model-card.md"})
    monkeypatch.setattr(sys, "argv", ["pages.py", str(tmp_path / "pages")])
    assert pages.main() == 0, capsys.readouterr().err
    made = tmp_path / "pages"
    assert (made / "index.md").read_text() == (
        "[card](model-card.md#limits) [code](run.py) [n](gallery/01_n.md) `[x](gone.md)`\n"
    )
    assert (made / "model-card.md").read_text() == "[home](index.md) [web](https://example.org/a.md)\n"
    assert (made / "run.py").read_text() == "pass\n"
    notebook = (made / "gallery" / "01_n.md").read_text()
    assert "[this](../index.md)" in notebook
    assert "base64" not in notebook
    (file,) = re.findall(r'src="(01_n/\w+\.flac)" type="audio/flac"', notebook)
    np.testing.assert_array_equal(soundfile.read(made / "gallery" / file, dtype="int16")[0], sound)
    assert "[Listen](01_n.md)" in (made / "gallery" / "index.md").read_text()

    (root / "docs" / "index.md").write_text("[one](../gone.md)\n")
    assert pages.main() == 1
    assert "docs/index.md: links to ../gone.md, which is not there" in capsys.readouterr().err


@pytest.mark.slow
def test_the_built_site_has_the_sounds_where_its_pages_look(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zensical")
    monkeypatch.setattr(pages, "ROOT", little_repository(tmp_path / "repository", np.zeros(800, np.int16)))
    monkeypatch.setattr(pages, "INCLUDED", {"MODEL_CARD.md": "model-card.md"})
    monkeypatch.setattr(sys, "argv", ["pages.py", str(tmp_path / "pages")])
    assert pages.main() == 0
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\ndocs_dir = "pages"\n')
    command = [Path(sys.executable).with_name("zensical"), "build", "--clean"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    page = tmp_path / "site" / "gallery" / "01_n" / "index.html"
    (source,) = re.findall(r'src="([^"]+\.flac)"', page.read_text(encoding="utf-8"))
    assert (page.parent / source).is_file()
