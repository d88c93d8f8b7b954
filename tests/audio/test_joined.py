"""Files that hold several streams, and headers that state less than there is, against each of them."""

from __future__ import annotations

import io
import itertools
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.audio import AudioFileWarning, audio_info, read_audio, stream_audio

RATE = 44_100
FIRST, SECOND = 3 * RATE + 17, 2 * RATE + 5
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


@pytest.fixture(params=["with ffmpeg", "without"], autouse=True)
def with_and_without_ffmpeg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is read by libsndfile, whether there is an ffmpeg or not."""
    if request.param == "without":
        monkeypatch.setenv("PATH", "/nowhere")
    elif shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")


def noise(num_samples: int, seed: int) -> np.ndarray:
    """[T, 2]"""
    return 0.1 * np.random.default_rng(seed).standard_normal((num_samples, 2))


def encoded(
    num_samples: int, seed: int, container: str, subtype: str | None = None, rate: int = RATE
) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, noise(num_samples, seed), rate, subtype, format=container)
    return stream.getvalue()


def ogg_checksum(page: bytes) -> int:
    """RFC 3533, section 6, of a page whose own is 0."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


def decoded(data: bytes) -> torch.Tensor:
    """In one go, without a seek."""
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return torch.from_numpy(samples.T.copy())


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("MP3", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("FLAC", "PCM_16"),
        ("WAV", "PCM_16"),
        ("RF64", "FLOAT"),
        ("AIFF", "PCM_24"),
        ("AU", "FLOAT"),
    ],
)
def test_every_part_is_read(
    tmp_path: Path, container: str, subtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path and a stream, whole, in blocks, and in parts that lie anywhere."""
    rate = 48_000 if subtype == "OPUS" else RATE
    pieces = [encoded(length, length, container, subtype, rate) for length in (FIRST, SECOND, 999)]
    expected = torch.cat([decoded(piece) for piece in pieces], dim=1)
    path = tmp_path / "joined"
    path.write_bytes(b"".join(pieces))
    assert audio_info(path).num_samples == expected.shape[1]
    assert torch.equal(read_audio(path)[0], expected)
    assert torch.equal(read_audio(io.BytesIO(path.read_bytes()))[0], expected)
    monkeypatch.setattr("ear_vae.audio.reading.BLOCK_FRAMES", 30_001)
    with stream_audio(path) as (_, blocks):
        assert torch.equal(torch.cat(list(blocks), dim=1), expected)
    for start in (
        0,
        1000,
        FIRST - 2000,
        FIRST - 1,
        FIRST,
        FIRST + 1,
        FIRST + SECOND - 50,
        expected.shape[1] - 9,
    ):
        part, _ = read_audio(path, start=start, num_samples=5_000)
        assert torch.equal(part, expected[:, start : start + 5_000])


@pytest.mark.parametrize("container", ["MP3", "OGG", "FLAC", "WAV"])
def test_a_cut_last_part_is_truncated(tmp_path: Path, container: str) -> None:
    pieces = [encoded(length, length, container) for length in (FIRST, SECOND)]
    path = tmp_path / "joined"
    path.write_bytes(pieces[0] + pieces[1][: len(pieces[1]) // 2])
    with pytest.raises(EarVAEError, match="truncated"):
        read_audio(path)


@pytest.mark.filterwarnings("ignore::ear_vae.audio.AudioFileWarning")
@pytest.mark.parametrize("container", ["MP3", "OGG"])
def test_a_cut_first_part_is_truncated(tmp_path: Path, container: str) -> None:
    pieces = [encoded(length, length, container) for length in (FIRST, SECOND)]
    path = tmp_path / "joined"
    path.write_bytes(pieces[0][: len(pieces[0]) // 2] + pieces[1])
    with pytest.raises(EarVAEError, match="truncated"):
        read_audio(path)


@pytest.mark.parametrize("container", ["MP3", "OGG", "FLAC", "WAV"])
def test_parts_of_different_rates_are_refused(tmp_path: Path, container: str) -> None:
    path = tmp_path / "joined"
    path.write_bytes(encoded(FIRST, 1, container) + encoded(SECOND, 2, container, rate=48_000))
    with pytest.raises(
        EarVAEError, match="2 channels at 44100 Hz, then 2 channels at 48000 Hz; cut it"
    ) as caught:
        read_audio(path)
    assert str(path) in str(caught.value)


def with_tags(data: bytes) -> bytes:
    return b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data + b"TAG" + bytes(125)


def test_tags_between_the_parts(tmp_path: Path) -> None:
    pieces = [encoded(length, length, "MP3") for length in (FIRST, SECOND)]
    (tmp_path / "a.mp3").write_bytes(b"".join(map(with_tags, pieces)))
    assert torch.equal(read_audio(tmp_path / "a.mp3")[0], torch.cat([decoded(piece) for piece in pieces], 1))


def xing_count(data: bytes) -> tuple[int, int]:
    """Where an mp3 states its frames, and how many."""
    at = max(data.find(b"Xing"), data.find(b"Info")) + 8
    return at, int.from_bytes(data[at : at + 4], "big")


@pytest.mark.parametrize("missing", [None, 40, 1])
def test_an_mp3_whose_header_states_too_few_frames(tmp_path: Path, missing: int | None) -> None:
    """`None` states none at all. What the header has left out at the end may then be heard."""
    data = encoded(FIRST, 1, "MP3")
    at, count = xing_count(data)
    stated = 0 if missing is None else count - missing
    path = tmp_path / "a.mp3"
    path.write_bytes(data[:at] + stated.to_bytes(4, "big") + data[at + 4 :])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = read_audio(path)
    whole = decoded(data)
    assert torch.equal(found[:, : whole.shape[1]], whole)
    assert whole.shape[1] <= found.shape[1] <= whole.shape[1] + 1152
    said = [str(warning.message) for warning in caught if warning.category is AudioFileWarning]
    assert [f"states {stated} frames, {count} are there" in text for text in said] == [True] * (missing != 1)


@pytest.mark.parametrize("stated", [0, 1000, FIRST - 1])
def test_a_flac_whose_header_states_too_few_samples(tmp_path: Path, stated: int) -> None:
    data = encoded(FIRST, 1, "FLAC")
    info = int.from_bytes(data[18:26], "big")
    assert info % 2**36 == FIRST
    path = tmp_path / "a.flac"
    path.write_bytes(data[:18] + (info - FIRST + stated).to_bytes(8, "big") + data[26:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = read_audio(path)
        assert audio_info(path).num_samples == FIRST
        part, _ = read_audio(path, start=100_000, num_samples=300)
    assert torch.equal(found, decoded(data))
    assert torch.equal(part, found[:, 100_000:100_300])
    said = {str(warning.message) for warning in caught}
    assert len(said) == (stated > 0)
    assert all(f"states {stated} samples, {FIRST} are there" in text for text in said)


@needs_ffmpeg
@pytest.mark.parametrize("rate", [44_100, 32_000, 22_050, 8_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_without_its_length_is_what_ffmpeg_makes_of_it(
    tmp_path: Path, rate: int, channels: int, with_and_without_ffmpeg: None
) -> None:
    """Joined as well: no encoder's delay is known, so that nothing is left out."""
    ffmpeg = shutil.which("ffmpeg", path="/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if ffmpeg is None:
        pytest.skip("needs ffmpeg in a usual place")
    soundfile.write(tmp_path / "a.wav", noise(2 * rate, 0)[:, :channels], rate)
    path = tmp_path / "a.mp3"
    subprocess.run(
        [
            ffmpeg,
            "-v",
            "error",
            "-i",
            tmp_path / "a.wav",
            "-q:a",
            "4",
            "-write_xing",
            "0",
            "-id3v2_version",
            "0",
            path,
        ],
        check=True,
    )
    path.write_bytes(2 * path.read_bytes())
    raw = subprocess.run(
        [ffmpeg, "-v", "error", "-i", path, "-f", "f32le", "-"], check=True, capture_output=True
    )
    expected = torch.from_numpy(np.frombuffer(raw.stdout, np.float32).reshape(-1, channels).T.copy())
    found, _ = read_audio(path)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4


def with_positions(data: bytes, change: Callable[[int, int], int]) -> bytes:
    """An Ogg stream whose audio pages state other positions, by their number and what they state."""
    pages = [data[start:end] for start, end in itertools.pairwise([*page_starts(data), len(data)])]
    result = b""
    for number, page in enumerate(pages):
        position = int.from_bytes(page[6:14], "little")
        if position:
            position = change(number, position)
        other = page[:6] + position.to_bytes(8, "little") + page[14:22] + bytes(4) + page[26:]
        result += other[:22] + ogg_checksum(other).to_bytes(4, "little") + other[26:]
    return result


def page_starts(data: bytes) -> list[int]:
    starts, position = [], 0
    while position < len(data):
        starts.append(position)
        segments = data[position + 26]
        position += 27 + segments + sum(data[position + 27 : position + 27 + segments])
    return starts


@pytest.mark.parametrize("rate", [RATE, 16_000])
@pytest.mark.parametrize(
    "change",
    [
        lambda number, position: position,
        # As ffmpeg cuts it without encoding it again.
        lambda number, position: max(0, position - 5000),
        # As encoders miscount a block in some pages, or at the start.
        lambda number, position: position + 448 * (number % 2),
        lambda number, position: position + 63,
    ],
    ids=["right", "cut", "miscounted", "shifted"],
)
def test_vorbis_is_the_same_in_parts_whatever_positions_its_pages_state(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[int, int], int],
    rate: int,
) -> None:
    """libsndfile seeks by them. Clicks are encoded in short blocks."""
    samples = 0.02 * np.random.default_rng(0).standard_normal((8 * RATE, 2))
    samples[:: RATE // 5] += 0.9
    soundfile.write(tmp_path / "right.ogg", samples, rate, subtype="VORBIS")
    data = with_positions((tmp_path / "right.ogg").read_bytes(), change)
    path = tmp_path / "a.ogg"
    path.write_bytes(data)
    whole = decoded(data)
    for start in range(0, whole.shape[1] - 1000, 29_973):
        part, _ = read_audio(path, start=start, num_samples=1000)
        assert torch.equal(part, whole[:, start : start + 1000]), start
    monkeypatch.setattr("ear_vae.audio.reading.BLOCK_FRAMES", 50_000)
    assert torch.equal(read_audio(path)[0], whole)
    with stream_audio(path) as (_, blocks):
        assert torch.equal(torch.cat(list(blocks), dim=1), whole)


def test_vorbis_with_headers_that_were_cut_is_not_audio() -> None:
    packets = [kind + b"vorbis" + bytes(3) for kind in (b"\1", b"\3")]
    # One mode of a long block, its number before it, and a set bit behind it.
    packets += [b"\5vorbis" + (1 << 80 | 1 << 39).to_bytes(11, "little"), b"\0audio"]
    pages = b""
    for number, packet in enumerate(packets):
        head = b"OggS\0" + bytes([2 if number == 0 else 0]) + bytes(12) + number.to_bytes(4, "little")
        page = head + bytes(4) + bytes([1, len(packet)]) + packet
        pages += page[:22] + ogg_checksum(page).to_bytes(4, "little") + page[26:]
    with pytest.raises(EarVAEError, match="not audio"):
        read_audio(io.BytesIO(pages))


def test_vorbis_that_lacks_more_than_a_block_is_damaged() -> None:
    data = encoded(RATE, 0, "OGG", "VORBIS")
    # More than the last page holds: others are missing.
    last = len(page_starts(data)) - 1
    more = with_positions(data, lambda number, position: position + 20_000 * (number == last))
    with pytest.raises(EarVAEError, match="truncated"):
        read_audio(io.BytesIO(more))


def test_seeking_in_long_pages_of_ogg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last page holds most of it, and is cut to the length; libsndfile loses its place there."""
    samples = np.concatenate([noise(30_000, 0), 1e-3 * noise(150_001, 1)])
    soundfile.write(tmp_path / "a.ogg", samples, RATE)
    whole = decoded((tmp_path / "a.ogg").read_bytes())
    monkeypatch.setattr("ear_vae.audio.reading.BLOCK_FRAMES", 30_001)
    assert torch.equal(read_audio(tmp_path / "a.ogg")[0], whole)
    for start in range(1, len(samples) - 500, 7_003):
        part, _ = read_audio(tmp_path / "a.ogg", start=start, num_samples=500)
        assert torch.equal(part, whole[:, start : start + 500])


def test_audio_behind_damage_is_read_and_said(tmp_path: Path) -> None:
    data = encoded(FIRST, 1, "MP3")
    cut = data.rfind(b"\xff\xfb", 0, len(data) // 2)
    (tmp_path / "a.mp3").write_bytes(data[:cut] + bytes(3000) + data[cut:])
    with pytest.warns(AudioFileWarning, match=r"a\.mp3: 3000 bytes between its frames are not audio"):
        found, _ = read_audio(tmp_path / "a.mp3")
    assert torch.equal(found, decoded(data))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (first, second)
        for first in ("FLAC", "MP3", "OGG")
        for second in ("WAV", "AIFF", "FLAC", "OGG")
        if first != second
    ],
)
def test_a_file_of_another_format_behind_the_audio_is_said(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "both"
    parts = [encoded(RATE, seed, container) for seed, container in enumerate((first, second))]
    path.write_bytes(b"".join(parts))
    with pytest.warns(AudioFileWarning, match=f"both: {len(parts[1])} bytes of another format follow"):
        audio, _ = read_audio(path)
    torch.testing.assert_close(audio, decoded(parts[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ALAC_16"])
def test_caf_of_unknown_length_is_read_and_a_cut_one_refused(tmp_path: Path, subtype: str) -> None:
    whole = encoded(RATE, 0, "CAF", subtype)
    (tmp_path / "whole.caf").write_bytes(whole)
    expected, _ = read_audio(tmp_path / "whole.caf")
    torch.testing.assert_close(expected, decoded(whole))
    at = whole.index(b"data") + 4
    size = int.from_bytes(whole[at : at + 8], "big")
    if at + 8 + size == len(whole):
        (tmp_path / "piped.caf").write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        audio, _ = read_audio(tmp_path / "piped.caf")
        assert torch.equal(audio, expected)
    for missing in (4, 1000, size // 2):
        (tmp_path / "cut.caf").write_bytes(whole[: at + 8 + size - missing])
        with pytest.raises(EarVAEError, match=r"cut\.caf: truncated"):
            read_audio(tmp_path / "cut.caf")
