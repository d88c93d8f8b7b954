"""What hours of audio cost in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 44_100
LATENT_BYTES_PER_SECOND = 64 * 4 * RATE / 256


def peak_bytes(*arguments: str | Path) -> int:
    """The most memory that a command of ear-vae held."""
    process = subprocess.Popen([sys.executable, "-m", "ear_vae", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    # It does not know that it was waited for.
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    # Linux counts in kilobytes.
    return usage.ru_maxrss * 1024


def write_noise(path: Path, seconds: int) -> None:
    minute = 0.1 * np.random.default_rng(0).standard_normal((60 * RATE, 2))
    with soundfile.SoundFile(path, "w", RATE, 2, subtype="PCM_16") as file:
        for _ in range(seconds // 60):
            file.write(minute)


@pytest.mark.long
def test_three_hours_need_the_memory_of_ten_minutes(tmp_path: Path) -> None:
    """But for the latents, which are held in some copies; the bundled model has no transformer."""
    peaks = {}
    for seconds in (600, 3 * 3600):
        source, latents, rebuilt = (tmp_path / f"{seconds}.{kind}" for kind in ("flac", "safetensors", "wav"))
        write_noise(source, seconds)
        peaks[seconds] = peak_bytes("encode", source, latents), peak_bytes("decode", latents, rebuilt)
        assert soundfile.info(rebuilt).frames == seconds * RATE
        source.unlink()
        rebuilt.unlink()
    latents_bytes = 3 * 3600 * LATENT_BYTES_PER_SECOND
    for command, short, long in zip(("encode", "decode"), peaks[600], peaks[3 * 3600], strict=True):
        assert long < 1.1 * short + 4 * latents_bytes, command
