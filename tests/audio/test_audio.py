"""Files to tensors and back, against soundfile, ffmpeg and closed forms."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.audio import PeakPolicy, PeakWarning, audio_info, find_audio_files, read_audio, write_audio

RATE = 44_100
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


def music(seconds: float = 1.0, channels: int = 2, rate: int = RATE) -> torch.Tensor:
    """A chord that differs between the channels, [C, T]."""
    time = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    tones = [
        sum(torch.sin(2 * torch.pi * f * (c + 1) * time) for f in (220, 277, 331)) for c in range(channels)
    ]
    return (0.2 * torch.stack(tones)).float()


@pytest.mark.parametrize(
    ("extension", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1 / 127),
        ("wav", "PCM_16", 1 / 32_767),
        ("wav", "PCM_24", 2.0**-23),
        ("wav", "PCM_32", 2.0**-24),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("flac", "PCM_16", 1 / 32_767),
        ("flac", "PCM_24", 2.0**-23),
        ("aiff", "PCM_24", 2.0**-23),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossless_round_trip(
    tmp_path: Path, extension: str, subtype: str, tolerance: float, channels: int
) -> None:
    audio, path = music(channels=channels), tmp_path / f"a.{extension}"
    write_audio(path, audio, RATE, subtype=subtype)
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, channels, RATE, subtype)
    found, rate = read_audio(path)
    assert (rate, found.dtype, found.shape) == (RATE, torch.float32, audio.shape)
    assert (found - audio).abs().max() <= tolerance


@pytest.mark.parametrize("extension", ["mp3", "ogg"])
def test_lossy_round_trip(tmp_path: Path, extension: str) -> None:
    audio, path = music(2), tmp_path / f"a.{extension}"
    write_audio(path, audio, RATE)
    found, rate = read_audio(path)
    assert rate == RATE
    length = min(found.shape[1], audio.shape[1])
    assert length >= 2 * RATE - 1
    inner = slice(4096, length - 4096)
    error = (found - audio[:, :length])[:, inner] if extension == "ogg" else found[:, :length][:, inner]
    if extension == "ogg":
        assert error.square().mean() < 1e-3 * audio.square().mean()
    else:
        assert error.square().mean() == pytest.approx(float(audio.square().mean()), rel=0.02)


def test_defaults_by_extension(tmp_path: Path) -> None:
    expected = {"wav": "FLOAT", "flac": "PCM_24", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III", "aiff": "PCM_24"}
    for extension, subtype in expected.items():
        write_audio(tmp_path / f"a.{extension}", music(), RATE)
        assert soundfile.info(tmp_path / f"a.{extension}").subtype == subtype


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_a_part_is_a_slice_of_the_whole(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    write_audio(path, music(5) + 0.05 * torch.randn(2, 5 * RATE), RATE, peak="clip")
    whole, _ = read_audio(path)
    for start, length in ((0, 1), (1, 1000), (77_777, 44_100), (123_456, 20_000)):
        part, _ = read_audio(path, start=start, num_samples=length)
        assert torch.equal(part, whole[:, start : start + length])
    tail, _ = read_audio(path, start=5 * RATE - 100, num_samples=500)
    assert tail.shape == (2, whole.shape[1] - (5 * RATE - 100))
    with pytest.raises(EarVAEError, match="past the end"):
        read_audio(path, start=10 * RATE)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.m4a", ["-c:a", "aac"]),
        ("a.aac", ["-c:a", "aac"]),
        ("a.opus", ["-c:a", "libopus"]),
        ("a.wma", ["-c:a", "wmav2"]),
        (
            "a.mkv",
            [
                "-f",
                "lavfi",
                "-i",
                "color=c=black:s=64x64:d=1",
                "-c:a",
                "pcm_s24le",
                "-map",
                "0:a",
                "-map",
                "1:v",
            ],
        ),
    ],
)
def test_formats_that_need_ffmpeg(tmp_path: Path, name: str, options: list[str]) -> None:
    source, path = tmp_path / "source.wav", tmp_path / f"-odd {name}"
    write_audio(source, music(1, rate=48_000), 48_000)
    subprocess.run(["ffmpeg", "-v", "error", "-i", source, *options, f"file:{path}"], check=True)
    found, rate = read_audio(path)
    info = audio_info(path)
    assert (rate, info.sample_rate, info.channels) == (48_000, 48_000, 2)
    assert found.shape[1] == pytest.approx(48_000, abs=4096)
    expected = music(1, rate=48_000)
    assert found.square().mean() == pytest.approx(float(expected.square().mean()), rel=0.1)
    with path.open("rb") as stream:
        again, _ = read_audio(io.BytesIO(stream.read()))
    assert again.shape == found.shape


def test_without_ffmpeg_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "song.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(EarVAEError, match=r"song\.m4a: not audio that libsndfile reads.*install ffmpeg"):
        read_audio(path)
    # By this name libsndfile tries its mp3 decoder, which says that there is no such file.
    with pytest.raises(
        EarVAEError, match=r"song\.mp3: not audio that libsndfile reads \(Format not recogni[sz]ed"
    ):
        read_audio(path.rename(tmp_path / "song.mp3"))


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 96_000, 192_000])
def test_rates_are_kept(tmp_path: Path, rate: int) -> None:
    write_audio(tmp_path / "a.wav", music(0.1, rate=rate), rate)
    assert read_audio(tmp_path / "a.wav")[1] == rate


@pytest.mark.parametrize("rate", [1_000, 768_000])
def test_rates_out_of_range(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((1000, 2)), rate)
    with pytest.raises(EarVAEError, match=rf"a\.wav: sample rate {rate} Hz, expected 8000 to 192000"):
        read_audio(tmp_path / "a.wav")


def test_silence_one_sample_and_streams(tmp_path: Path) -> None:
    write_audio(tmp_path / "silence.wav", torch.zeros(2, 1000), RATE)
    assert not read_audio(tmp_path / "silence.wav")[0].any()
    write_audio(tmp_path / "one.wav", torch.full((1, 1), 0.25), RATE)
    assert read_audio(tmp_path / "one.wav")[0].tolist() == [[0.25]]
    stream = io.BytesIO()
    write_audio(stream, music(), RATE, format="flac")
    stream.seek(0)
    assert read_audio(stream)[0].shape == (2, RATE)


def test_bad_files(tmp_path: Path) -> None:
    audio = music(3).T.numpy()
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio\n" * 100)
    soundfile.write(tmp_path / "empty.wav", audio[:0], RATE)
    soundfile.write(tmp_path / "six.wav", np.zeros((1000, 6)), RATE)
    soundfile.write(
        tmp_path / "nan.wav", np.where(np.arange(len(audio))[:, None] == 5, np.nan, audio), RATE, "FLOAT"
    )
    soundfile.write(
        tmp_path / "inf.wav", np.where(np.arange(len(audio))[:, None] == 5, np.inf, audio), RATE, "FLOAT"
    )
    for extension in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"whole.{extension}", audio, RATE)
        data = (tmp_path / f"whole.{extension}").read_bytes()
        (tmp_path / f"cut.{extension}").write_bytes(data[: len(data) // 2])
    expected = {
        "missing.wav": "no such file",
        "": "is a folder",
        "zero.wav": r"empty \(0 bytes\)",
        "text.wav": "not audio",
        "empty.wav": "no audio samples",
        "six.wav": "6 channels, expected 1 or 2; downmix",
        "nan.wav": "NaN or infinite",
        "inf.wav": "NaN or infinite",
        **{f"cut.{extension}": "truncated" for extension in ("wav", "flac", "ogg", "mp3")},
    }
    for name, message in expected.items():
        with pytest.raises(EarVAEError, match=message) as caught:
            read_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", music(), RATE)
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(EarVAEError, match="cannot be read"):
        read_audio(tmp_path / "a.wav")


def test_peaks_above_full_scale(tmp_path: Path) -> None:
    loud = 4 * music()
    peak = float(loud.abs().max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_audio(tmp_path / "float.wav", loud, RATE)
        write_audio(tmp_path / "clip.flac", loud, RATE, peak="clip")
        write_audio(tmp_path / "scale.flac", loud, RATE, peak="scale")
    assert torch.equal(read_audio(tmp_path / "float.wav")[0], loud)
    assert (read_audio(tmp_path / "clip.flac")[0] - loud.clamp(-1, 1)).abs().max() < 1e-6
    assert (read_audio(tmp_path / "scale.flac")[0] - loud / peak).abs().max() < 1e-6
    db = f"{20 * np.log10(peak):+.2f} dBFS"
    with pytest.warns(PeakWarning, match=rf"keep\.flac: peaks reach \{db}"):
        write_audio(tmp_path / "keep.flac", loud, RATE)
    assert (read_audio(tmp_path / "keep.flac")[0] - loud.clamp(-1, 1)).abs().max() < 1e-6
    with pytest.raises(EarVAEError, match="keep, scale or clip"):
        write_audio(tmp_path / "b.flac", loud, RATE, peak="limit")  # type: ignore[arg-type]


def test_refused_writes(tmp_path: Path) -> None:
    audio = music()
    with pytest.raises(EarVAEError, match=r"cannot write format 'xyz'; choose one of wav, flac"):
        write_audio(tmp_path / "a.xyz", audio, RATE)
    with pytest.raises(EarVAEError, match=r"flac cannot hold subtype 'FLOAT'; choose one of .*PCM_24"):
        write_audio(tmp_path / "a.flac", audio, RATE, subtype="FLOAT")
    with pytest.raises(EarVAEError, match=r"\[C, T\] with 1 or 2 channels"):
        write_audio(tmp_path / "a.wav", audio.T, RATE)
    with pytest.raises(EarVAEError, match=r"folder .*nowhere does not exist"):
        write_audio(tmp_path / "nowhere" / "a.wav", audio, RATE)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(EarVAEError, match="is a folder"):
        write_audio(tmp_path / "folder.wav", audio, RATE)
    write_audio(tmp_path / "a.wav", audio, RATE)
    with pytest.raises(EarVAEError, match=r"a\.wav: exists already"):
        write_audio(tmp_path / "a.wav", 0 * audio, RATE)
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], audio)
    write_audio(tmp_path / "a.wav", 0.5 * audio, RATE, overwrite=True)
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], 0.5 * audio)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    write_audio(tmp_path / "old.wav", music(), RATE)
    before = (tmp_path / "old.wav").read_bytes()

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)
    with pytest.raises((EarVAEError, KeyboardInterrupt)) as caught:
        write_audio(tmp_path / "old.wav", 0.5 * music(), RATE, overwrite=True)
    if isinstance(failure, OSError):
        assert str(caught.value).endswith("old.wav: could not be written: No space left on device")
    assert (tmp_path / "old.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.wav"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(EarVAEError, match="No space left"):
        write_audio(full, music(), RATE, format="wav")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("peak", ["keep", "scale", "clip"])
@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_what_cannot_be_read_back_is_not_written(
    tmp_path: Path, bad: float, peak: PeakPolicy, extension: str
) -> None:
    audio = music(10)
    audio[1, -5] = bad
    with pytest.raises(EarVAEError, match="NaN or infinite samples; nothing was written"):
        write_audio(tmp_path / f"a.{extension}", audio, RATE, peak=peak)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "rate", "message"),
    [
        ("a.mp3", 96_000, "cannot write mp3 at 96000 Hz: .*Choose another format or resample"),
        ("a.wav", 0, "positive integer in Hz, got 0"),
        ("a.wav", 44_100.0, "positive integer in Hz, got 44100.0"),
    ],
)
def test_refused_rates(tmp_path: Path, name: str, rate: int, message: str) -> None:
    with pytest.raises(EarVAEError, match=message) as caught:
        write_audio(tmp_path / name, music(), rate)
    assert "disk" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_that_are_too_long(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 300}.wav"
    with pytest.raises(EarVAEError, match="too long"):
        write_audio(path, music(), RATE)
    with pytest.raises(EarVAEError, match="too long"):
        read_audio(path)


def test_audio_with_gradients_is_written(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", music().requires_grad_(), RATE)
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], music())


def test_find_audio_files(tmp_path: Path) -> None:
    for name in ("b/x.WAV", "a/ü.mp3", "a/-dash.flac", "c.txt", ".hidden.wav", ".git/y.wav", "a/video.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_audio_files(tmp_path)]
    assert found == ["a/-dash.flac", "a/video.mkv", "a/ü.mp3", "b/x.WAV"]
    with pytest.raises(EarVAEError, match="not a folder"):
        find_audio_files(tmp_path / "nowhere")
