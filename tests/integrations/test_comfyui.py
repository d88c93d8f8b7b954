"""The calls of ComfyUI's audio nodes, and the example node."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import before_and_after, blocks
from torch import Tensor

from ear_vae import EarVAE
from ear_vae.dsp.resampling import resample


@pytest.fixture(scope="module")
def file(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node where the page's command puts it."""
    place = tmp_path_factory.mktemp("comfyui")
    (place / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    command, source, destination = blocks("comfyui.md", "sh")[0].split()
    subprocess.run([command, str(repository / source), destination], cwd=place, check=True)
    return place / "ComfyUI" / "custom_nodes" / "ear_vae_node.py"


@pytest.fixture(scope="module")
def loader(file: Path) -> Any:
    """The node as ComfyUI makes it: from the mapping of a file that it runs by its path."""
    spec = importlib.util.spec_from_file_location("ear_vae_node", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["EarVAELoader"]()


def encode_node(vae: Any, waveform: Tensor, sample_rate: int) -> Tensor:
    """VAE Encode Audio: resamples to what the VAE works on, and has channels last."""
    wanted = getattr(vae, "audio_sample_rate", 44_100)
    if wanted != sample_rate:
        waveform = resample(waveform, sample_rate, wanted)
    latents: Tensor = vae.encode(waveform.movedim(1, -1))
    return latents


def decode_node(vae: Any, latents: Tensor, **tiles: int) -> Tensor:
    """VAE Decode Audio, or its tiled form."""
    audio: Tensor = vae.decode_tiled(latents, **tiles) if tiles else vae.decode(latents)
    return audio.movedim(-1, 1)


def test_through_the_nodes(loader: Any, tmp_path: Path, narrow_vae: EarVAE) -> None:
    narrow_vae.save_pretrained(tmp_path / "model")
    [vae] = getattr(loader, loader.FUNCTION)(str(tmp_path / "model"), "cpu")
    waveform = 0.3 * torch.randn(2, 2, 4000, generator=torch.Generator().manual_seed(1))
    latents = encode_node(vae, waveform, 48_000)
    expected = narrow_vae.encode(waveform, 48_000).mean
    torch.testing.assert_close(latents, expected)
    audio = narrow_vae.decode(expected)
    torch.testing.assert_close(decode_node(vae, latents), audio)
    torch.testing.assert_close(decode_node(vae, latents, tile_y=512, overlap=64), audio)


def test_the_page_for_nodes_of_ones_own() -> None:
    waveform = 0.3 * torch.randn(1, 2, 2560, generator=torch.Generator().manual_seed(1))
    names: dict[str, Any] = {"waveform": waveform}
    exec(before_and_after("comfyui.md")[1], names)
    vae = EarVAE.from_pretrained("ear-vae-tiny")
    torch.testing.assert_close(names["audio"], vae.decode(vae.encode(waveform).mean))


def test_what_the_node_shows(loader: Any, file: Path) -> None:
    assert loader.RETURN_TYPES == ("VAE",)
    shown = loader.INPUT_TYPES()
    assert shown["required"]["model"] == ("STRING", {"default": "ear-vae-tiny"})
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("other", [True, False])
def test_another_package_of_the_name(other: bool, file: Path, tmp_path: Path) -> None:
    fork = tmp_path / "ear_vae"
    fork.mkdir()
    (fork / "__init__.py").write_text("class Encoder: pass\n" if other else "raise ImportError('none')\n")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(file)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert "ImportError: this node needs the package ear-vae: pip install ear-vae" in last
    assert (f"another ear_vae lies in ['{fork}']: uninstall or move it first" in last) is other
