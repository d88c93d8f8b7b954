"""Lays out what the documentation site is built of; `scripts/docs` calls it.

    python scripts/pages.py PAGES [--execute]

Into the new folder PAGES go the pages of docs, what they link to outside of it, and the notebooks as pages.
With `--execute` notebooks are run, and their pages have sound; else they show the outputs they were committed
with. A link to something that is not in the repository is an error.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere in the repository, where their readers on GitHub look for them.
INCLUDED = {
    "MODEL_CARD.md": "model-card.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples/piece.md",
    "examples/latent_flow/README.md": "examples/latent_flow.md",
}
# The home page says what the README says.
STANDS_FOR = {"README.md": "index.md", "docs": "index.md", "notebooks": "gallery/index.md"}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)([^)\s#]+)")
SOUND = re.compile(r'src="data:audio/(?:x-)?wav;base64,([^"]+)"(?: type="[^"]*")?')


def main() -> int:
    """Lays out the pages; 1 where a link leads nowhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path)
    parser.add_argument("--execute", action="store_true", help="run the notebooks, for pages with sound")
    arguments = parser.parse_args()
    site = Site(arguments.pages)
    site.add_files()
    site.add_gallery(execute=arguments.execute)
    for message in site.broken:
        print(message, file=sys.stderr)
    return bool(site.broken)


class Site:
    """The folder of pages, and where each file of the repository lies in it.

    Args:
        folder: The folder, which is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[str] = []
        docs = (path for path in sorted((ROOT / "docs").rglob("*")) if path.is_file())
        self.notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        self.places = {path: path.relative_to(ROOT / "docs") for path in docs}
        self.places |= {ROOT / source: Path(page) for source, page in INCLUDED.items()}
        self.places |= {path: Path("gallery", f"{path.stem}.md") for path in self.notebooks}
        self.links = {**self.places, **{ROOT / source: Path(page) for source, page in STANDS_FOR.items()}}
        shutil.rmtree(folder, ignore_errors=True)

    def add_files(self) -> None:
        """Adds everything but the notebooks."""
        for source, place in self.places.items():
            if source.suffix == ".md":
                self._write(place, self._with_links(source.read_text(encoding="utf-8"), source, place))
            elif source.suffix != ".ipynb":
                self._copy(source, place)

    def add_gallery(self, *, execute: bool) -> None:
        """Adds a page for each notebook, and one that lists them.

        Raises:
            nbclient.exceptions.CellExecutionError: A cell of a notebook fails.
        """
        import nbformat
        from nbconvert import MarkdownExporter
        from nbconvert.preprocessors import ExecutePreprocessor

        cards = []
        for path in self.notebooks:
            notebook = nbformat.read(path, as_version=4)
            if execute:
                print(f"running {path.name}", flush=True)
                ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": path.parent}})
            resources = {"output_files_dir": path.stem, "unique_key": path.stem}
            text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
            place = self.places[path]
            for name, content in resources["outputs"].items():
                self._write(place.parent / name, content)
            text = SOUND.sub(lambda found, place=place: self._sound(found[1], place), text)
            self._write(place, self._with_links(text, path, place))
            cards.append(_card(notebook, path, sorted(resources["outputs"])))
        head = "# Gallery\n\nNotebooks, each of which runs from top to bottom in minutes on a CPU.\n"
        self._write(Path("gallery", "index.md"), "\n".join([head, *cards]))
        # Which the navigation reads.
        self._write(Path("gallery", "SUMMARY.md"), _navigation(self.notebooks))

    def _with_links(self, text: str, source: Path, place: Path) -> str:
        """Text of a page with relative links that fit the site."""

        def moved(found: re.Match[str]) -> str:
            target = Path(os.path.normpath(source.parent / unquote(found[1])))
            if place.parts[0] == "gallery" and (self.folder / place.parent / found[1]).exists():
                return found[1]  # what the conversion wrote beside the page
            if target not in self.links:
                if not target.is_file():
                    self.broken.append(f"{source.relative_to(ROOT)}: links to {found[1]}, which is not there")
                    return found[1]
                self._copy(target, target.relative_to(ROOT))
                self.links[target] = target.relative_to(ROOT)
            return os.path.relpath(self.links[target], place.parent).replace(os.sep, "/")

        parts = CODE.split(text)
        return "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(parts))

    def _sound(self, encoded: str, place: Path) -> str:
        """Moves a sound out of a page into a file that browsers fetch when it is played, a third as large."""
        import soundfile

        content = base64.b64decode(encoded)
        samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
        stream = io.BytesIO()
        soundfile.write(stream, samples, rate, format="FLAC", subtype="PCM_16")
        name = f"{place.stem}/{hashlib.sha256(content).hexdigest()[:12]}.flac"
        self._write(place.parent / name, stream.getvalue())
        # From the file of the page; the build makes it fit the folder that each page gets.
        return f'src="{name}" type="audio/flac"'

    def _write(self, place: Path, content: str | bytes) -> None:
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def _copy(self, source: Path, place: Path) -> None:
        self._write(place, source.read_bytes())


def _title(path: Path) -> str:
    """The first heading of a notebook."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return heading[1].strip() if heading else path.stem


def _card(notebook: object, path: Path, files: list[str]) -> str:
    """A notebook in the list: title, what it is about, its first picture."""
    text = notebook.cells[0].source if notebook.cells else ""  # type: ignore[attr-defined]
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part and not part.startswith("#")]
    about = CODE.sub(lambda found: found[0], paragraphs[0]) if paragraphs else ""
    about = re.sub(r"\]\((?![a-z]+:)[^)]*\)", "]", about)
    about = re.sub(r"\[([^\]]*)\](?!\()", r"\1", about)
    pictures = [name for name in files if name.endswith((".png", ".svg", ".jpeg"))]
    picture = f"\n[![]({pictures[0]})]({path.stem}.md)\n" if pictures else ""
    return f"## [{_title(path)}]({path.stem}.md)\n\n{about}\n{picture}"


def _navigation(notebooks: list[Path]) -> str:
    lines = ["* [Overview](index.md)", *(f"* [{_title(path)}]({path.stem}.md)" for path in notebooks)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
