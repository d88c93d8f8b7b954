"""What a user gets for something that is no good audio: one clear line each, or the audio all the same."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.audio import (
    AudioFileWarning,
    audio_info,
    find_audio_files,
    read_audio,
    resample,
    stream_audio,
    write_audio,
    write_audio_stream,
)

RATE = 44_100
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def noise(num_samples: int = RATE, channels: int = 2) -> np.ndarray:
    """[T, C]"""
    return 0.1 * np.random.default_rng(0).standard_normal((num_samples, channels))


def encoded(
    container: str, samples: np.ndarray | None = None, rate: int = RATE, subtype: str | None = None
) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, noise() if samples is None else samples, rate, subtype, format=container)
    return stream.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_number(data: bytes, at: int, size: int, value: int, order: str = "big") -> bytes:
    return data[:at] + value.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def uncompleted(container: str) -> bytes:
    """With a header as a recorder leaves it that was interrupted: of no audio at all."""
    data = encoded(container)
    if container == "AU":
        return with_number(data, 8, 4, 0)
    return with_number(with_number(data, 4, 4, 0), data.find(b"data") + 4, 4, 0)


def flac_frames() -> bytes:
    """A megabyte of headers of flac frames (RFC 9639, section 9.1), each of which may be the last frame."""
    info = bytearray(encoded("FLAC")[:42])
    info[4] |= 0x80
    info[15:18] = b"\xff\xff\xff"
    checksum = 0
    for byte in (head := b"\xff\xf8\xc9\xa8\x00"):
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum << 1 ^ (7 if checksum >> 7 else 0)) & 0xFF
    return bytes(info) + (head + bytes([checksum])) * 170_000


def of_exabytes() -> bytes:
    """RF64 whose size is the highest of 64 bits, with more behind it than is read at once."""
    data = encoded("RF64", noise(100_000))
    return with_number(data, 20, 8, 2**64 - 1, "little")


EMPTY_APE_TAG = b"APETAGEX" + (2000).to_bytes(4, "little") + bytes(20)


def of_terabytes(container: str) -> bytes:
    """A header that states as many samples as it can, before a second of audio."""
    data = encoded(container)
    if container == "FLAC":
        info = int.from_bytes(data[18:26], "big")
        return with_number(data, 18, 8, info | (2**36 - 1))
    if container == "MP3":
        return with_number(data, max(data.find(b"Xing"), data.find(b"Info")) + 8, 4, 2**31 - 1)
    # The last page of the ogg stream, whose checksum (RFC 3533, section 6) is made to be right.
    page = data.rfind(b"OggS")
    last = with_number(data[page:], 6, 8, 2**40, "little")
    value = 0
    for byte in with_number(last, 22, 4, 0):
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return data[:page] + with_number(last, 22, 4, value, "little")


BROKEN = noise()
BROKEN[5] = np.nan
INFINITE = noise()
INFINITE[-5] = np.inf

CASES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "nothing": ("a.wav", bytes, r"is empty \(0 bytes\)"),
    "text": ("a.wav", lambda: b"this is not audio\n" * 100, "not audio"),
    "text named mp3": ("a.mp3", lambda: b"not audio", "not audio"),
    "more text named mp3": ("a.mp3", lambda: b"Some text with an end\n", r"not audio(?!.*argument)"),
    "zeros": ("a.flac", lambda: bytes(10_000), "not audio"),
    "a header alone": ("a.wav", lambda: encoded("WAV")[:40], "not audio|truncated|no audio samples"),
    "no samples": ("a.wav", lambda: encoded("WAV", noise(0)), "holds no audio samples"),
    "six channels": ("a.wav", lambda: encoded("WAV", noise(100, 6)), "6 channels, expected 1 or 2; downmix"),
    "a low rate": (
        "a.wav",
        lambda: encoded("WAV", rate=1000),
        "sample rate 1000 Hz, expected 8000 to 192000",
    ),
    "NaN": ("a.wav", lambda: encoded("WAV", BROKEN, subtype="FLOAT"), "holds NaN or infinite samples"),
    "infinity": ("a.wav", lambda: encoded("WAV", INFINITE, subtype="FLOAT"), "holds NaN or infinite samples"),
    **{
        f"half a {kind}": (f"a.{kind.lower()}", lambda kind=kind: half(encoded(kind)), "truncated")  # type: ignore[misc]
        for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "RF64")
    },
    **{
        f"a {kind} of terabytes": (f"a.{kind.lower()}", lambda kind=kind: of_terabytes(kind), "truncated")  # type: ignore[misc]
        for kind in ("FLAC", "OGG", "MP3")
    },
    "an ape tag of no size": ("a.mp3", lambda: EMPTY_APE_TAG + bytes(1000), "not audio"),
    "a frame of mp3 before what is none": (
        "a.mp3",
        lambda: b"\xff\xfb\x90\0" + 2_000_000 * b"\xff\0",
        "not audio",
    ),
    "flac frames": ("a.flac", flac_frames, "truncated"),
    **{
        f"an uncompleted {kind}": (
            f"a.{kind.lower()}",
            lambda kind=kind: uncompleted(kind),
            "never completed",
        )  # type: ignore[misc]
        for kind in ("WAV", "AU")
    },
    "parts of two rates": (
        "a.flac",
        lambda: encoded("FLAC") + encoded("FLAC", rate=48_000),
        "2 channels at 44100 Hz, then 2 channels at 48000 Hz",
    ),
    "a list of files": ("a.m4a", lambda: b"ffconcat version 1.0\nfile other.wav\n", "not audio"),
    "a playlist": (
        "a.m4a",
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp3\n#EXT-X-ENDLIST\n",
        "not audio",
    ),
}


def read_open(path: Path) -> None:
    with path.open("rb") as stream:
        read_audio(stream)


def read_blocks(path: Path) -> None:
    with stream_audio(path) as (_, blocks):
        list(blocks)


READERS: dict[str, Callable[[Path], object]] = {"path": read_audio, "open": read_open, "blocks": read_blocks}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("case", CASES)
def test_one_line_each(tmp_path: Path, case: str, read: str) -> None:
    name, content, expected = CASES[case]
    path = tmp_path / name
    path.write_bytes(content())
    soundfile.write(tmp_path / "other.wav", noise(), RATE)
    soundfile.write(tmp_path / "other.mp3", noise(), RATE)
    with pytest.raises(EarVAEError, match=expected) as caught:
        READERS[read](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_ffmpeg
@pytest.mark.parametrize("case", ["a list of files", "a playlist"])
def test_ffmpeg_is_kept_from_other_files(tmp_path: Path, case: str) -> None:
    name, content, _ = CASES[case]
    (tmp_path / name).write_bytes(content())
    for other in ("other.wav", "other.mp3"):
        soundfile.write(tmp_path / other, noise(), RATE)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / name, "-f", "null", "-"]
    assert subprocess.run(command, check=False).returncode == 0, "ffmpeg by itself follows it"
    with pytest.raises(
        EarVAEError, match=r"a\.m4a: not audio, or damaged: (concat|hls) is no format that is read"
    ):
        read_audio(tmp_path / name)


def test_what_is_no_file(tmp_path: Path) -> None:
    places = {"missing.wav": "no such file", "": "is a folder"}
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's name may not be long
        server.bind("a.wav")
        places["a.wav"] = "is a device or a socket"
        for name, message in places.items():
            with pytest.raises(EarVAEError, match=message):
                read_audio(tmp_path / name)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(EarVAEError, match=f"{device}: is a device or a socket, expected an audio file"):
            read_audio(device)
    with pytest.raises(EarVAEError, match="is open as text; open it in binary mode"):
        read_audio(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(EarVAEError, match="expected a path or an open binary file, got int"):
        read_audio(7)  # type: ignore[arg-type]
    with pytest.raises(EarVAEError, match="cannot be read: embedded null byte"):
        read_audio("a\0.wav")
    for start, length in ((-1, None), (0, 0), (1.5, None), (0, "9")):
        with pytest.raises(EarVAEError, match="both integers"):
            read_audio(io.BytesIO(encoded("WAV")), start=start, num_samples=length)  # type: ignore[arg-type]


@needs_pipes
@pytest.mark.parametrize("container", ["WAV", "MP3", "FLAC", "M4A"])
def test_pipes_are_read_like_files(tmp_path: Path, container: str) -> None:
    """By name, and open; also what takes ffmpeg."""
    whole = tmp_path / f"whole.{container.lower()}"
    if container == "M4A":
        if shutil.which("ffmpeg") is None:
            pytest.skip("needs ffmpeg")
        (tmp_path / "source.wav").write_bytes(encoded("WAV"))
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "source.wav", "-c:a", "aac", whole]
        subprocess.run(command, check=True)
    else:
        whole.write_bytes(encoded(container))
    expected, _ = read_audio(whole)
    os.mkfifo(tmp_path / "pipe")

    def fed() -> threading.Thread:
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(whole.read_bytes(),))
        writer.start()
        return writer

    writers = [fed()]
    assert torch.equal(read_audio(tmp_path / "pipe")[0], expected)
    writers.append(fed())
    with (tmp_path / "pipe").open("rb") as stream:
        assert torch.equal(read_audio(stream, start=100, num_samples=50)[0], expected[:, 100:150])
    for writer in writers:
        writer.join()


@needs_pipes
def test_what_is_passed_over_in_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV"))
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nothing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert find_audio_files(tmp_path) == [tmp_path / "a.wav"]
    said = sorted(str(warning.message) for warning in caught)
    assert said == [
        f"left out: {tmp_path / 'gone.wav'}: No such file or directory",
        f"left out: {tmp_path / 'pipe.wav'}: is a pipe, a device or a socket",
    ]
    assert {warning.category for warning in caught} == {AudioFileWarning}


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, small_model: Path) -> None:
    """By the command too, which does the rest."""
    closed = tmp_path / "in" / "closed"
    closed.mkdir(parents=True)
    (tmp_path / "in" / "a.wav").write_bytes(encoded("WAV", noise(2048)))
    command = [sys.executable, "-m", "ear_vae", "encode", tmp_path / "in", tmp_path / "out"]
    if os.geteuid() == 0:
        # Root lists everything, unless it gives up the right to.
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or another user than root")
        command[:0] = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]
    closed.chmod(0)
    try:
        result = subprocess.run(
            [*command, "--model", small_model], capture_output=True, text=True, check=False
        )
    finally:
        closed.chmod(0o755)
    assert f"{closed}: Permission denied" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
@pytest.mark.parametrize("extension", ["wav", "mp3", "flac", "m4a"])
def test_names_that_are_not_unicode(tmp_path: Path, extension: str) -> None:
    folder = tmp_path / os.fsdecode(b"folder \xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"song \xe9." + extension.encode())
    audio = torch.from_numpy(noise().T.copy()).float()
    if extension == "m4a":
        if shutil.which("ffmpeg") is None:
            pytest.skip("needs ffmpeg")
        write_audio(tmp_path / "a.wav", audio, RATE)
        subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", path], check=True)
    else:
        write_audio(path, audio, RATE)
        write_audio_stream(
            path, [audio], RATE, channels=2, num_samples=audio.shape[1], peak="scale", overwrite=True
        )
    assert find_audio_files(tmp_path)[-1] == path
    assert audio_info(path).channels == 2
    found, _ = read_audio(path)
    assert found.shape[1] >= RATE
    with stream_audio(path) as (_, blocks):
        assert torch.equal(torch.cat(list(blocks), dim=1), found)


@needs_ffmpeg
def test_no_room_for_what_ffmpeg_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not said to be damaged. A file that may not grow stands for a full disk."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    (tmp_path / "a.wav").write_bytes(encoded("WAV"))
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / "a.m4a"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            EarVAEError, match=rf"a\.m4a: no temporary copy could be written to {tmp_path}: .*TMPDIR"
        ):
            read_audio(tmp_path / "a.m4a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(
        EarVAEError, match="nowhere: No such file or directory; make room there, or name another"
    ):
        read_audio(tmp_path / "a.m4a")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_integers_of_numpy(tmp_path: Path, kind: type) -> None:
    audio = torch.from_numpy(noise().T.copy()).float()
    write_audio(tmp_path / "a.wav", audio, kind(RATE))
    found, rate = read_audio(tmp_path / "a.wav", start=kind(5), num_samples=kind(7))
    assert (rate, found.shape) == (RATE, (2, 7))
    assert torch.equal(resample(audio, kind(RATE), kind(48_000)), resample(audio, RATE, 48_000))
    for wrong in (np.float64(RATE), True, np.bool_(True), "44100"):
        with pytest.raises(EarVAEError, match="positive integer"):
            write_audio(tmp_path / "b.wav", audio, wrong)  # type: ignore[arg-type]


def test_every_format_that_is_written_is_taken_by_the_command(tmp_path: Path, small_model: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV", noise(2048)))
    command = [sys.executable, "-m", "ear_vae", "reconstruct", tmp_path / "a.wav", tmp_path / "out"]
    subprocess.run([*command, "--format", "aiff", "--model", small_model], check=True, capture_output=True)
    assert soundfile.info(tmp_path / "out").format == "AIFF"


@pytest.mark.parametrize(
    "content",
    [
        lambda: encoded("MP3") + EMPTY_APE_TAG,
        lambda: encoded("AU") + b".snd" + bytes(60),
        lambda: encoded("MP3") + 2_000_000 * b"\xff\0" + encoded("MP3"),
        lambda: encoded("OGG") + 200_000 * (b"OggS" + bytes(23) + b"xyz") + encoded("OGG"),
        of_exabytes,
    ],
    ids=["ape", "au", "mp3", "ogg", "rf64"],
)
def test_the_command_reads_what_was_made_to_have_no_end(tmp_path: Path, content: Callable[[], bytes]) -> None:
    """Once without an end, or hours from it; the time given is for slow machines, not a measure."""
    (tmp_path / "a").write_bytes(content())
    command = [sys.executable, "-m", "ear_vae", "info", tmp_path / "a", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_samples"] > RATE - 5000


@pytest.mark.parametrize(("container", "at"), [("WAV", "data"), ("AU", ""), ("AIFF", "SSND")])
def test_audio_behind_what_a_header_states_is_not_left_out_in_silence(
    tmp_path: Path, container: str, at: str
) -> None:
    data = encoded(container, subtype="PCM_16")
    size, order = 2 * RATE, "little" if container == "WAV" else "big"
    place = data.find(at.encode()) + 4 if at else 8
    (tmp_path / "a").write_bytes(with_number(data, place, 4, size + 8 * (container == "AIFF"), order))
    command = [sys.executable, "-m", "ear_vae", "info", tmp_path / "a", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(result.stdout)["num_samples"] == RATE // 2
    assert "88200 bytes follow the audio that its header states" in result.stderr


@needs_ffmpeg
@pytest.mark.parametrize("extension", ["mka", "webm", "wma"])
def test_what_ffmpeg_reads_of_a_cut_file_is_not_taken_for_all(tmp_path: Path, extension: str) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV"))
    whole = tmp_path / f"a.{extension}"
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", whole], check=True)
    assert abs(audio_info(whole).duration_seconds - 1) < 0.1
    cut = tmp_path / f"cut.{extension}"
    cut.write_bytes(whole.read_bytes()[: -whole.stat().st_size // 3])
    command = [sys.executable, "-m", "ear_vae", "info", cut]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{cut}: truncated: its header states {whole.stat().st_size} bytes" in result.stderr


def test_a_peak_is_found_at_rates_that_are_not_read(tmp_path: Path) -> None:
    """Such as a model's of 4 kHz, whose latents the command decodes."""
    audio = 2 * torch.from_numpy(noise(400).T.copy()).float() / noise(400).max()
    write_audio_stream(tmp_path / "a.wav", [audio], 4000, channels=2, num_samples=400, peak="scale")
    found, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 4000
    assert np.abs(found).max() == 1
