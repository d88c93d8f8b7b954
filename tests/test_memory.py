"""Memory of the real command on a long file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 44_100
SECONDS = 3600


@pytest.mark.slow
def test_an_hour_goes_through_in_bounded_memory(tmp_path: Path) -> None:
    """At most three times the audio as float32 plus 1.5 GB, with the bundled model."""
    source, rebuilt = tmp_path / "hour.flac", tmp_path / "hour.wav"
    minute = 0.1 * np.random.default_rng(0).standard_normal((60 * RATE, 2))
    with soundfile.SoundFile(source, "w", RATE, 2, subtype="PCM_16") as file:
        for _ in range(SECONDS // 60):
            file.write(minute)
    process = subprocess.Popen([sys.executable, "-m", "ear_vae", "reconstruct", str(source), str(rebuilt)])
    _, status, usage = os.wait4(process.pid, 0)
    # It does not know that it was waited for.
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert soundfile.info(rebuilt).frames == SECONDS * RATE
    audio_bytes = SECONDS * RATE * 2 * 4
    # Linux counts the peak in kilobytes.
    assert usage.ru_maxrss * 1024 < 3 * audio_bytes + 1.5e9
