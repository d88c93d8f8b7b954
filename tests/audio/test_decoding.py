"""Headers that lie, lack the length, or promise more than there is, against ffmpeg and known lengths."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.audio import audio_info, read_audio

RATE = 44_100
SECONDS = 8
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


def loud_then_quiet() -> np.ndarray:
    """Noise and then a faint tone, [T, 2]: an encoder of varying bit rate spends most on the start."""
    time = np.arange(SECONDS * RATE) / RATE
    noise = 0.2 * np.random.default_rng(0).standard_normal(len(time)) * (time < 2)
    tone = 0.01 * np.sin(2 * np.pi * 440 * time)
    return np.stack([noise + tone, 0.5 * noise - tone], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoding") / "source.wav"
    soundfile.write(path, loud_then_quiet(), RATE, "FLOAT")
    return path


def encoded(source: Path, *options: str) -> bytes:
    """What ffmpeg writes to a pipe."""
    command = ["ffmpeg", "-v", "error", "-i", source, *options, "-"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def decoded_length(path: Path) -> int:
    raw = encoded(path, "-f", "f32le")
    return len(raw) // 8


@needs_ffmpeg
@pytest.mark.parametrize("container", ["wav", "flac", "au", "aiff"])
def test_lossless_audio_from_a_pipe(source: Path, tmp_path: Path, container: str) -> None:
    data = encoded(source, "-f", container)
    expected = torch.from_numpy(loud_then_quiet().T.copy())
    (tmp_path / "piped").write_bytes(data)
    for piped in (tmp_path / "piped", io.BytesIO(data)):
        assert audio_info(piped).num_samples == SECONDS * RATE
        if isinstance(piped, io.BytesIO):
            piped.seek(0)
        found, _ = read_audio(piped)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2**-14
    part, _ = read_audio(tmp_path / "piped", start=100_001, num_samples=5_000)
    assert torch.equal(part, found[:, 100_001:105_001])


@pytest.mark.parametrize("piped_length", [0xFFFF_FFFF, 0x7FFF_F000])
def test_wav_without_its_length(tmp_path: Path, piped_length: int) -> None:
    audio = (np.arange(2000).reshape(1000, 2) / 4000).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, audio, RATE, "FLOAT", format="WAV")
    data = bytearray(stream.getvalue())
    at = data.index(b"data") + 4
    data[at : at + 4] = piped_length.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0].numpy(), audio.T)


@needs_ffmpeg
@pytest.mark.parametrize("options", [["-q:a", "2"], ["-b:a", "128k"]], ids=["varying", "constant"])
@pytest.mark.parametrize("stated", ["0", "1"])
def test_mp3_keeps_its_end(source: Path, tmp_path: Path, options: list[str], stated: str) -> None:
    """Without a length in its header, libsndfile stops where the first frame's bit rate would put the end."""
    path = tmp_path / "a.mp3"
    command = ["ffmpeg", "-v", "error", "-i", source, *options, "-write_xing", stated]
    # A tag before the first frame, as most files have.
    subprocess.run([*command, "-metadata", "title=Xing Info", "-id3v2_version", "3", path], check=True)
    expected = decoded_length(path)
    found, _ = read_audio(path)
    assert found.shape[1] == expected
    assert audio_info(path).num_samples == expected
    # The tag of old, after the last frame.
    path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    assert audio_info(path).num_samples == expected
    tail, _ = read_audio(path, start=expected - 1000, num_samples=1000)
    assert torch.equal(tail, found[:, -1000:])
    assert read_audio(io.BytesIO(path.read_bytes()))[0].shape == found.shape


@needs_ffmpeg
@pytest.mark.parametrize("block", [2**20, 2**16], ids=["one", "many"])
def test_parts_of_an_mp3_with_tiny_frames(
    source: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a quiet passage takes few bits, a frame's data begin many frames before it."""
    path = tmp_path / "a.mp3"
    subprocess.run(["ffmpeg", "-v", "error", "-i", source, "-q:a", "2", path], check=True)
    # From its start and in one go, no decoder has to seek.
    whole = torch.from_numpy(soundfile.read(path, dtype="float32")[0].T.copy())
    monkeypatch.setattr("ear_vae.audio.reading.BLOCK_FRAMES", block)
    assert torch.equal(read_audio(path)[0], whole)
    for start in range(1, whole.shape[1] - 500, 17_003):
        part, _ = read_audio(path, start=start, num_samples=500)
        assert torch.equal(part, whole[:, start : start + 500])


@needs_ffmpeg
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_cut_mp3(source: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.mp3"
    subprocess.run(["ffmpeg", "-v", "error", "-i", source, "-b:a", "128k", path], check=True)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(EarVAEError, match=r"a\.mp3: truncated: \d+ of 352800 samples"):
        read_audio(path)
    # What is there can be read.
    assert read_audio(path, start=1000, num_samples=50_000)[0].shape == (2, 50_000)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_U8"),
        ("WAVEX", "PCM_16"),
        ("RF64", "FLOAT"),
        ("W64", "FLOAT"),
        ("AIFF", "PCM_24"),
        ("AU", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
    ],
)
def test_cut_files_and_streams(tmp_path: Path, container: str, subtype: str) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, loud_then_quiet()[: RATE + 1], RATE, subtype, format=container)
    data = stream.getvalue()
    assert read_audio(io.BytesIO(data))[0].shape == (2, RATE + 1)
    cut = data[: len(data) // 2]
    (tmp_path / "cut").write_bytes(cut)
    for source in (tmp_path / "cut", io.BytesIO(cut)):
        with pytest.raises(EarVAEError, match="truncated"):
            read_audio(source)


@needs_ffmpeg
def test_info_names_the_format_of_the_source(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", source, "-c:a", "aac", path], check=True)
    info = audio_info(path)
    assert (info.format, info.subtype) == ("M4A", "FFMPEG")
    assert audio_info(io.BytesIO(path.read_bytes())).format == "FFMPEG"
