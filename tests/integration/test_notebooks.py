"""The notebooks run from top to bottom, and say what they claim to say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ear_vae.pretrained.bundled import bundled_checkpoints

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")
pytestmark = [
    pytest.mark.skipif("ear-vae-tiny" not in bundled_checkpoints(), reason="needs the bundled checkpoint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def printed_by(path: Path, song: Path | None = None) -> list[str]:
    """The lines that a notebook prints when it is run from top to bottom, if need be with another song."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "notebooks are committed without outputs"
        if song is not None:
            cell.source = cell.source.replace("../examples/piece.ogg", str(song))
            cell.source = cell.source.replace("../examples", str(song.parent))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs).splitlines()


def test_threads_do_not_spin_while_they_wait(repository: Path) -> None:
    """The way of waiting is read when torch is loaded, so it is chosen before any import that loads it."""
    notebooks = sorted((repository / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 4
    for path in notebooks:
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert 'os.environ.setdefault("OMP_WAIT_POLICY", "passive")' in cells[0]
        assert [line for line in cells[0].splitlines() if "import" in line and line[0] != "#"] == [
            "import os"
        ]


def si_sdr_of(lines: list[str]) -> list[float]:
    return [float(line.split("SI-SDR")[1].split()[0]) for line in lines]


@pytest.mark.slow
def test_reconstruct(repository: Path) -> None:
    """More noise on the latents, less of the song in the output."""
    ratios = si_sdr_of(
        [line for line in printed_by(repository / "notebooks" / "01_reconstruct.ipynb") if "noise 0" in line]
    )
    assert len(ratios) == 5
    assert ratios[0] > 3
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.slow
def test_finetune(repository: Path) -> None:
    """A few careful steps change the model a little, and do not break it."""
    lines = printed_by(repository / "notebooks" / "02_finetune.ipynb")
    assert "10 steps, 0 of them left out" in lines
    assert not any("Tip:" in line or "TPU" in line for line in lines)
    before, after = si_sdr_of([line for line in lines if "SI-SDR" in line])
    assert before != after
    assert after == pytest.approx(before, abs=1.0)


@pytest.mark.slow
def test_evaluate(repository: Path) -> None:
    """Low notes are kept better than high ones; 8 bits and little noise cost little, much noise much."""
    lines = printed_by(repository / "notebooks" / "03_evaluate.ipynb")
    low, high = (float(line.split(":")[1].split()[0]) for line in lines if line.startswith("residual below"))
    assert low > high + 6
    (sine,) = (line for line in lines if line.startswith("THD+N"))
    assert -70 < float(sine.split(":")[1].split()[0]) < -40
    curve = {
        line.split("SI-SDR")[0].strip(): line for line in lines if "mel distance" in line and "SI-SDR" in line
    }
    clean, half, eight, little, much = (
        si_sdr_of([curve[name]])[0] for name in ("none", "float16", "int8", "noise 0.01", "noise 1")
    )
    assert half == pytest.approx(clean, abs=0.01)
    assert eight == pytest.approx(clean, abs=0.1)
    assert little == pytest.approx(clean, abs=0.1)
    assert much < clean - 3


@pytest.mark.slow
def test_latent_flow(repository: Path) -> None:
    """Channels become alike, passes differ, and the flow knows more than nothing."""
    lines = printed_by(repository / "notebooks" / "06_latent_flow.ipynb")
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
@pytest.mark.parametrize("name", ["01_reconstruct.ipynb", "02_finetune.ipynb", "03_evaluate.ipynb"])
@pytest.mark.parametrize(("song", "rate", "channels"), [("a.mp3", 48_000, 2), ("a.wav", 44_100, 1)])
def test_your_own_file(
    tmp_path: Path, repository: Path, name: str, song: str, rate: int, channels: int
) -> None:
    """A low tone under little noise comes back as well as the bundled model rebuilds such a thing."""
    time = np.arange(3 * rate)[:, None] / rate
    noise = np.random.default_rng(0).standard_normal((3 * rate, channels))
    soundfile.write(tmp_path / song, 0.3 * np.sin(2 * np.pi * 220 * time) + 0.001 * noise, rate)
    lines = printed_by(repository / "notebooks" / name, tmp_path / song)
    assert max(si_sdr_of([line for line in lines if "SI-SDR" in line])) > 3


def test_every_notebook_is_tested(repository: Path) -> None:
    names = {path.name for path in (repository / "notebooks").glob("*.ipynb")}
    assert names == {
        "01_reconstruct.ipynb",
        "02_finetune.ipynb",
        "03_evaluate.ipynb",
        "06_latent_flow.ipynb",
    }
