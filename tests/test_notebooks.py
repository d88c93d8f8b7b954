"""The notebooks run from top to bottom, and say what they claim to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ear_vae.bundled import bundled_checkpoints

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.skipif("ear-vae-tiny" not in bundled_checkpoints(), reason="needs the bundled checkpoint")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "notebooks are committed without outputs"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    # More noise on the latents, less of the song in the output.
    ratios = [float(line.split("SI-SDR")[1].split()[0]) for line in printed.splitlines() if "noise 0" in line]
    assert len(ratios) == 5
    assert ratios[0] > 3
    assert ratios == sorted(ratios, reverse=True)
