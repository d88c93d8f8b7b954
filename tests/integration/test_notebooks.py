"""The notebooks are as they were saved, run from top to bottom, and say what they claim to say."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from script_loading import load_script

from ear_vae.pretrained.bundled import bundled_checkpoints

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")
pytestmark = [
    pytest.mark.skipif("ear-vae-tiny" not in bundled_checkpoints(), reason="needs the bundled checkpoint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NAMES = ("01_hear_it", "02_latents", "03_losses", "04_fine_tune", "05_compare", "06_latent_flow")


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "notebooks"


@pytest.fixture(scope="module")
def renewal(folder: Path) -> ModuleType:
    """The script that runs and saves the notebooks."""
    return load_script(folder / "renew.py")


def saved(path: Path) -> list[str]:
    """The lines that the saved notebook shows."""
    return lines_of(nbformat.read(path, as_version=4))


def lines_of(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout").splitlines()


def printed_by(path: Path, replacements: dict[str, str] | None = None) -> list[str]:
    """The lines that a notebook prints when it is run from top to bottom, if need be with other settings."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for old, new in (replacements or {}).items():
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": path.parent}}
    ).execute()
    return lines_of(notebook)


def numbers_of(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"[-+]?\d+(?:\.\d+)?", line)]


def si_sdr_of(lines: list[str]) -> list[float]:
    return [float(line.split("SI-SDR")[1].split()[0]) for line in lines if "SI-SDR" in line]


def test_every_notebook_is_tested(renewal: ModuleType) -> None:
    assert tuple(path.stem for path in renewal.notebooks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_not_stale(folder: Path, renewal: ModuleType, name: str) -> None:
    assert renewal.problems(folder / f"{name}.ipynb") == [], "run: python notebooks/renew.py"


def change_code(notebook: Any) -> None:
    notebook.cells[-2].source += "\n"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[1].source += "\nprint(1)"


def change_version(notebook: Any) -> None:
    notebook.metadata["ear_vae"]["version"] = "0.0.1"


def change_file(notebook: Any) -> None:
    notebook.metadata["ear_vae"]["model.safetensors"] = "0" * 16


def add_sound(notebook: Any) -> None:
    output = nbformat.v4.new_output("display_data", {"text/html": "<audio controls></audio>"})
    next(cell for cell in notebook.cells if cell.cell_type == "code").outputs = [output]


def run_out_of_order(notebook: Any) -> None:
    next(cell for cell in notebook.cells if cell.cell_type == "code").execution_count = 99


def grow(notebook: Any) -> None:
    notebook.cells[0].source += " " * 500_000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_code, "code was"),
        (change_version, "version was 0.0.1"),
        (change_file, "model.safetensors was 0000000000000000"),
        (add_sound, "it holds sound"),
        (run_out_of_order, "its cells were not run once, in order"),
        (grow, "more than 500000"),
    ],
)
def test_what_is_stale_is_found(
    tmp_path: Path, folder: Path, renewal: ModuleType, change: Callable[[Any], None], reason: str
) -> None:
    notebook = nbformat.read(folder / "01_hear_it.ipynb", as_version=4)
    change(notebook)
    nbformat.write(notebook, tmp_path / "01_hear_it.ipynb")
    (problem,) = renewal.problems(tmp_path / "01_hear_it.ipynb")
    assert reason in problem


def test_changed_text_is_not_stale(tmp_path: Path, folder: Path, renewal: ModuleType) -> None:
    """Words can be mended without running anything."""
    notebook = nbformat.read(folder / "01_hear_it.ipynb", as_version=4)
    notebook.cells[0].source += " More."
    nbformat.write(notebook, tmp_path / "01_hear_it.ipynb")
    assert renewal.problems(tmp_path / "01_hear_it.ipynb") == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(folder: Path, name: str) -> None:
    cells = nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    local = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in local if not (folder / link).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_spin_while_they_wait(folder: Path, name: str) -> None:
    """The way of waiting is read when torch is loaded, so it is chosen before any import that loads it."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert 'os.environ.setdefault("OMP_WAIT_POLICY", "passive")' in first
    assert [line for line in first.splitlines() if "import" in line and line[0] != "#"] == ["import os"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_fit_a_page(folder: Path, name: str) -> None:
    """A page of GitHub is some 900 pixels wide."""
    text = (folder / f"{name}.ipynb").read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    widths = [int.from_bytes(base64.b64decode(picture)[16:20], "big") for picture in pictures]
    assert widths
    assert max(widths) <= 1_000


def test_tune_is_the_same_each_time(folder: Path) -> None:
    """The notebooks' own music: decided by its seed, in stereo, at the stated peak."""
    tune = load_script(folder / "tunes.py").tune
    first, again, other = tune(1, 1.0), tune(1, 1.0), tune(2, 1.0)
    assert torch.equal(first, again)
    assert first.shape == other.shape == (2, 44_100)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert float(first.abs().max()) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_hear_it", "02_latents", "03_losses"])
def test_saved_is_what_it_prints(folder: Path, name: str) -> None:
    """Nothing is trained here, so figures are the same but for rounding."""
    path = folder / f"{name}.ipynb"
    now, before = printed_by(path), saved(path)
    assert [re.sub(r"[-+]?\d+(\.\d+)?", "#", line) for line in now] == [
        re.sub(r"[-+]?\d+(\.\d+)?", "#", line) for line in before
    ]
    for new, old in zip(now, before, strict=True):
        assert numbers_of(new) == pytest.approx(numbers_of(old), rel=0.02, abs=0.3), new
    ratios = si_sdr_of(now)
    if name == "02_latents":
        noisy = si_sdr_of([line for line in now if line.startswith("noise")])
        assert noisy == sorted(noisy, reverse=True)
    else:
        assert ratios[0] > 3


@pytest.mark.slow
def test_fine_tune(folder: Path) -> None:
    """The held-out song is rebuilt better after a minute, from the same latents."""
    lines = printed_by(folder / "04_fine_tune.ipynb")
    assert "80 steps, 0 of them left out" in lines
    assert not any("Tip:" in line or "TPU" in line for line in lines)
    before, after = (numbers_of(line) for line in lines if "held-out song:" in line)
    assert after[0] > before[0]  # SI-SDR
    assert after[1] < before[1]  # mel distance
    assert after[2] < before[2] - 0.05  # STFT distance
    assert "largest difference of the latents: 0" in lines


@pytest.mark.slow
def test_compare(folder: Path) -> None:
    """More bits are better than few; the low-pass has a good SI-SDR and a mel distance that finds it out."""
    page = folder / "runs" / "compare.html"
    lines = printed_by(folder / "05_compare.ipynb")
    assert page.is_file()
    mel = {
        line.split("  ")[0].strip(): float(line.split("mel distance")[1].split(",")[0])
        for line in lines
        if "mel distance" in line
    }
    si_sdr = dict(zip(mel, si_sdr_of(lines), strict=True))
    assert si_sdr["tiny"] > si_sdr["tiny, 4 bits"] + 1
    assert si_sdr["mp3, high"] > si_sdr["mp3, low"] > 3
    assert si_sdr["low-pass, 3 kHz"] > 5
    assert mel["low-pass, 3 kHz"] > 2 * mel["tiny"]


@pytest.mark.slow
def test_latent_flow(folder: Path, repository: Path) -> None:
    """Channels become alike, passes differ, and the flow knows more than nothing."""
    lines = printed_by(folder / "06_latent_flow.ipynb")
    (song,) = (line for line in lines if line.startswith("piece.ogg"))
    length = soundfile.info(repository / "examples" / "piece.ogg").frames
    assert song == f"piece.ogg: {-(-length // 256)} frames, 24.3 s"
    (normal,) = (line for line in lines if line.startswith("normalized"))
    assert all(float(word) == pytest.approx(1, abs=0.01) for word in normal.split(" ")[1::2])
    starts = [line.split("from")[1] for line in lines if line.startswith("crop")]
    assert len(set(starts)) == 2
    before, after = (float(line.split(": loss")[1]) for line in lines if ": loss" in line)
    assert 0.5 < after < before - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:5])
@pytest.mark.parametrize(("song", "rate", "channels"), [("a.mp3", 48_000, 2), ("a.wav", 44_100, 1)])
def test_your_own_file(tmp_path: Path, folder: Path, name: str, song: str, rate: int, channels: int) -> None:
    """A low tone under little noise comes back as well as the bundled model rebuilds such a thing."""
    music = tmp_path / "music"
    music.mkdir()
    time = np.arange(4 * rate)[:, None] / rate
    noise = np.random.default_rng(0).standard_normal((4 * rate, channels))
    soundfile.write(music / song, 0.3 * np.sin(2 * np.pi * 220 * time) + 0.001 * noise, rate)
    shutil.copytree(music, tmp_path / "held-out")
    lines = printed_by(
        folder / f"{name}.ipynb",
        {
            "../examples/piece.ogg": str(music / song),
            "MUSIC = None": f"MUSIC = Path({str(music)!r})",
            "HELD_OUT = None": f"HELD_OUT = Path({str(tmp_path / 'held-out')!r})",
            "ORIGINALS = None": f"ORIGINALS = Path({str(music)!r})",
            "STEPS = 80": "STEPS = 4",
            "runs/compare.html": str(tmp_path / "compare.html"),
        },
    )
    assert max(si_sdr_of(lines)) > 3
