"""The bundled checkpoint, offline, on the example piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ear_vae import EarVAE
from ear_vae.audio import read_audio
from ear_vae.dsp.si_sdr import scale_invariant_sdr_db
from ear_vae.pretrained.bundled import bundled_checkpoints

PIECE = Path(__file__).parents[2] / "examples" / "piece.ogg"
pytestmark = pytest.mark.skipif(
    "ear-vae-tiny" not in bundled_checkpoints() or not PIECE.exists(), reason="needs the source checkout"
)


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    return EarVAE.from_pretrained("ear-vae-tiny")


def test_it_is_small_and_whole(vae: EarVAE) -> None:
    folder = bundled_checkpoints()["ear-vae-tiny"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    assert (vae.name, vae.sample_rate, vae.downsampling_ratio, vae.latent_dim) == (
        "ear-vae-tiny",
        44_100,
        256,
        64,
    )
    # What the file says of its weights is what they are, and in every dtype.
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["ear_vae"])["weights_sha256"]
    assert vae.weights_sha256 == said
    for dtype in ("bfloat16", "float64"):
        assert EarVAE.from_pretrained("ear-vae-tiny", dtype=dtype).weights_sha256 == said


def test_it_rebuilds_the_example(vae: EarVAE) -> None:
    audio, sample_rate = read_audio(PIECE)
    rebuilt = vae.reconstruct(audio, sample_rate=sample_rate)
    assert scale_invariant_sdr_db(rebuilt, audio) > 12


def test_latents_have_a_usable_scale_and_survive_a_draw(vae: EarVAE) -> None:
    audio, sample_rate = read_audio(PIECE)
    posterior = vae.encode(audio, sample_rate=sample_rate)
    assert 0.3 < float(posterior.mean.std()) < 5
    drawn = vae.decode(posterior.sample(torch.Generator().manual_seed(0)), num_samples=audio.shape[1])
    kept = vae.decode(posterior.mode(), num_samples=audio.shape[1])
    assert scale_invariant_sdr_db(drawn, kept) > 10


def test_it_loads_without_a_network(tmp_path: Path) -> None:
    code = """
import socket
def refuse(*_): raise OSError("the network was asked")
socket.socket.connect = refuse
from ear_vae import EarVAE
print(EarVAE.from_pretrained("ear-vae-tiny").name)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert found.stdout.strip() == "ear-vae-tiny"
    assert not list(tmp_path.iterdir())


def test_bfloat16_keeps_30_db(vae: EarVAE) -> None:
    """Of what float32 gives, on music, through both directions and through the decoder alone."""
    audio, sample_rate = read_audio(PIECE)
    audio = audio[:, : 8 * sample_rate]
    half = EarVAE.from_pretrained("ear-vae-tiny", dtype=torch.bfloat16)
    latents = vae.encode(audio, sample_rate=sample_rate).mode()
    expected = vae.decode(latents)
    assert scale_invariant_sdr_db(half.decode(latents), expected) > 36
    assert (
        scale_invariant_sdr_db(half.decode(half.encode(audio, sample_rate=sample_rate).mode()), expected) > 36
    )
