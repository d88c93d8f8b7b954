"""Run the notebooks from top to bottom and save them with their outputs.

    python notebooks/renew.py                    # all of them, some minutes
    python notebooks/renew.py 01_hear_it         # some of them
    python notebooks/renew.py --check            # runs nothing, says which have to be renewed and why

What is saved shows on a page that plays no sound and should load fast: sound and progress bars are left out,
pictures are stored with few colours, and a notebook has at most 500 kB.
Needs `pip install "ear-vae[notebooks]"`.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

from ear_vae import __version__

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 500_000
COLOURS = 160
TIMEOUT_SECONDS = 300
# What the outputs come from besides the cells: the model, the music, and the code that notebooks import.
SHIPPED = ("../checkpoints/ear-vae-tiny/model.safetensors", "../checkpoints/ear-vae-tiny/config.json")
READ = re.compile(r"\.\./examples/[\w/]+\.\w+")
IMPORTED = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
MARK = "ear_vae"


def notebooks() -> list[Path]:
    """Returns the notebooks of this folder, in order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def fingerprints(notebook: Any, folder: Path = FOLDER) -> dict[str, str]:
    """Says what the outputs of a notebook depend on, so that a later change shows.

    Not the whole package: that its results stay the same is what the tests are for, those that are marked
    `slow` run the notebooks among them.

    Args:
        notebook: Parsed notebook.
        folder: Folder that its paths are relative to.

    Returns:
        By name: a hash of the code cells, of the files they read and of the modules beside them, and the
        version of the package.
    """
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    read = {*SHIPPED, *READ.findall(code)}
    places = [folder, folder / "../examples/latent_flow"]
    modules = {place / f"{name}.py" for place in places for name in IMPORTED.findall(code)}
    files = {folder / path for path in read} | {path for path in modules if path.is_file()}
    return {
        "version": __version__,
        "code": _short_hash(code.encode()),
        **{path.name: _file_hash(path) for path in sorted(files)},
    }


def problems(path: Path) -> list[str]:
    """Lists why a notebook has to be renewed; nothing where it is as this script left it."""
    notebook = nbformat.read(path, as_version=4)
    saved = notebook.metadata.get(MARK)
    if saved is None:
        return ["it was never run by this script"]
    now = fingerprints(notebook)
    found = [
        f"{name} was {saved.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once, in order")
    for output in (output for cell in code for output in cell.outputs):
        if output.output_type == "error":
            found.append(f"a cell failed: {output.ename}: {output.evalue}")
        elif _has_sound(output):
            found.append("it holds sound")
    if (size := path.stat().st_size) > MAX_BYTES:
        found.append(f"it has {size} bytes, more than {MAX_BYTES}")
    return found


def renew(path: Path) -> float:
    """Runs a notebook and saves it with its outputs, without sound; returns how many seconds it took."""
    import nbclient

    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        startup_timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        # When each cell was run would differ each time.
        record_timing=False,
    ).execute()
    seconds = time.monotonic() - start
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                _shrink(output)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        MARK: fingerprints(notebook),
    }
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise SystemExit(f"error: {path.name} would have {len(text.encode())} bytes, more than {MAX_BYTES}")
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return seconds


def _is_progress(output: Any) -> bool:
    """Whether an output is a progress bar, as a widget or as text that is written over, or a warning."""
    if output.output_type == "stream":
        # Between two states of a bar the cursor only moves.
        moves = not output.text.replace("\x1b[A", "").strip()
        return output.name == "stderr" or moves or "\r" in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _has_sound(output: Any) -> bool:
    data = json.dumps(output.get("data", {}))
    return "<audio" in data or "audio/" in data


def _shrink(output: Any) -> None:
    """Takes sound out of an output, and most colours out of its pictures."""
    if _has_sound(output):
        output.data = {"text/plain": "(sound: it plays here when the notebook is run)"}
    picture = output.get("data", {}).get("image/png")
    if picture is not None:
        output.data["image/png"] = _with_few_colours(base64.b64decode(picture))


def _with_few_colours(png: bytes) -> str:
    from PIL import Image

    written = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def _file_hash(path: Path) -> str:
    # A checkout on Windows may have other ends of lines.
    content = path.read_bytes()
    return _short_hash(content.replace(b"\r\n", b"\n") if path.suffix in (".py", ".json") else content)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to take, without .ipynb (all)")
    parser.add_argument("--check", action="store_true", help="run nothing, only say what has to be renewed")
    options = parser.parse_args()
    chosen = [path for path in notebooks() if not options.names or path.stem in options.names]
    if unknown := sorted(set(options.names) - {path.stem for path in chosen}):
        parser.error(f"no such notebook: {', '.join(unknown)}")
    stale = False
    for path in chosen:
        if options.check:
            for problem in problems(path):
                stale = True
                print(f"{path.name}: {problem}", file=sys.stderr)
        else:
            seconds = renew(path)
            print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size // 1000} kB", flush=True)
    if stale:
        print("renew them with: python notebooks/renew.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
