"""The figures that the authors' own evaluation code gives for published reconstructions."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from ear_vae.audio import read_audio
from ear_vae.evaluation import measure

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published"
TOLERANCES = {"si_sdr_db": 0.01, "mel_distance": 1e-3, "stft_distance": 1e-3, "icpc": 1e-3, "ccpc": 1e-3}
LOUDNESS = {
    "lufs": ("lufs_integrated", 0.1),
    "loudness_range_lu": ("lra", 0.5),
    "true_peak_dbtp": ("true_peak_dbtp", 0.15),
}

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs ../shared/published")


def reference() -> dict[str, dict[str, float]]:
    file = PUBLISHED / "reference.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@lru_cache(maxsize=1)
def original(case: str) -> tuple[torch.Tensor, int]:
    return read_audio(PUBLISHED / case / "gt.mp3")


@pytest.mark.parametrize("pair", reference())
def test_published_pairs(pair: str) -> None:
    expected = reference()[pair]
    target, sample_rate = original(pair.split("/")[0])
    estimate, estimate_rate = read_audio(PUBLISHED / f"{pair}.mp3")
    found = measure(estimate, target, sample_rate=sample_rate, estimate_sample_rate=estimate_rate)
    for name, tolerance in TOLERANCES.items():
        assert float(found[name]) == pytest.approx(expected[name], abs=tolerance), name
    for name, (reference_name, tolerance) in LOUDNESS.items():
        for side in ("estimate", "target"):
            value = expected[f"{side}_loudness"][reference_name]  # type: ignore[index]
            assert float(found[f"{name}_{side}"]) == pytest.approx(value, abs=tolerance), (name, side)
