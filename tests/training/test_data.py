"""Which files are trained on, which segments of them, and in which order."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.audio import read_audio, resample
from ear_vae.dsp.bandwidth import bandwidth_hz
from ear_vae.training import AudioDataModule
from ear_vae.training.data.dataset import Augmentation, SegmentDataset
from ear_vae.training.data.loader import SegmentLoader
from ear_vae.training.data.sources import AudioFile, Policy, find_usable_files

SAMPLES = 8192
AS_IS = Augmentation(gain_db=0, swap_channels=0, invert_polarity=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Low noise in two readable files at two rates, one mono, and two that are of no use."""
    music = tmp_path / "music"
    write(music / "a.wav", rumble(176_400, 2))
    write(music / "b.flac", rumble(144_000, 1), 48_000)
    write(music / "short.wav", rumble(4_410, 2))
    (music / "broken.mp3").write_bytes(b"not audio")
    return music


def rumble(num_samples: int, channels: int) -> np.ndarray:
    """Noise below a tenth of the Nyquist frequency, so smooth that half a sample hardly matters."""
    spectrum = np.fft.rfft(np.random.default_rng(num_samples).standard_normal((channels, num_samples)))
    spectrum[:, num_samples // 20 :] = 0
    return 0.3 * np.fft.irfft(spectrum, num_samples).T


def write(path: Path, samples: np.ndarray, rate: int = 44_100) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def found(*sources: Path, **policy: Any) -> list[AudioFile]:
    return find_usable_files(sources, Policy(**policy))


def dataset(files: list[AudioFile], **settings: Any) -> SegmentDataset:
    defaults = {"sample_rate": 44_100, "segment_samples": SAMPLES, "seed": 3}
    return SegmentDataset(files, **(defaults | settings))


def test_what_is_left_out_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [
        (f.path.name, f.sample_rate, f.num_samples, f.channels) for f in found(folder, min_seconds=1)
    ] == [
        ("a.wav", 44_100, 176_400, 2),
        ("b.flac", 48_000, 144_000, 1),
    ]
    assert "unreadable" in caplog.text
    assert "broken.mp3" in caplog.text
    assert "shorter than 1.00 s" in caplog.text
    assert "short.wav" in caplog.text
    assert [f.path.name for f in found(folder, min_seconds=1, mono="skip")] == ["a.wav"]
    assert "left out, mono" in caplog.text
    with pytest.raises(
        EarVAEError,
        match=r"no usable audio: 4 audio files, 3 of them readable, 3 shorter than 60.00 s; give longer",
    ):
        found(folder, min_seconds=60)


def test_manifests(folder: Path, tmp_path: Path) -> None:
    """Of both kinds, with paths relative to them, other columns, and weights that say what is drawn."""
    table = tmp_path / "some.csv"
    table.write_text("title,path,weight\nA,music/a.wav,0.25\nB,music/b.flac,\nC,music/short.wav,0\n")
    lines = tmp_path / "some.jsonl"
    lines.write_text('{"path": "music/a.wav", "weight": 0.25}\n\n{"path": "music/b.flac", "title": "B"}\n')
    for manifest in (table, lines):
        files = found(manifest)
        assert [(f.path.name, f.weight) for f in files] == [("a.wav", 0.25), ("b.flac", 1.0)]
    assert [f.path.name for f in found(lines, folder)] == ["a.wav", "b.flac", "short.wav"]
    # 4 s at a quarter and 3 s: the first file in 1 of 4 segments.
    loud = dataset([files[0]])
    names = [float(segment.abs().sum()) for segment in (loud[0], loud[0])]
    assert names[0] == names[1]
    share = np.mean([drawn_from(dataset(files), index) == "a.wav" for index in range(400)])
    assert share == pytest.approx(0.25, abs=0.07)


def drawn_from(segments: SegmentDataset, index: int) -> str:
    """A mono file has become two equal channels."""
    segment = segments[index]
    return "b.flac" if torch.equal(segment[0], segment[1]) else "a.wav"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "file\na.wav\n", r"m\.csv, line 2: has no 'path'"),
        ("m.csv", "path,weight\na.wav,much\n", r"m\.csv, line 2: weight .* got 'much'"),
        ("m.jsonl", '{"path": "a.wav", "weight": -1}', r"m\.jsonl, line 1: weight .* got -1"),
        ("m.jsonl", '["a.wav"]', r"m\.jsonl, line 1: has no 'path'"),
        ("m.jsonl", "a.wav", r"m\.jsonl: cannot be read as a manifest"),
        ("m.txt", "a.wav", r"m\.txt: not a folder, and a manifest ends in"),
        (None, "", r"m\.csv: does not exist"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    manifest = tmp_path / (name or "m.csv")
    if name:
        manifest.write_text(content)
    with pytest.raises(EarVAEError, match=message):
        found(manifest)


def test_headers_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch, user_cache: Path) -> None:
    looked_at: list[str] = []

    def counting(path: Path) -> Any:
        looked_at.append(path.name)
        return audio_info(path)

    from ear_vae.training.data import sources

    audio_info = sources.audio_info
    monkeypatch.setattr(sources, "audio_info", counting)
    first = found(folder)
    assert sorted(looked_at) == ["a.wav", "b.flac", "broken.mp3", "short.wav"]
    looked_at.clear()
    assert found(folder) == first
    assert looked_at == ["broken.mp3"]
    write(folder / "a.wav", np.zeros((50_000, 2)))
    assert next(f.num_samples for f in found(folder) if f.path.name == "a.wav") == 50_000
    monkeypatch.setattr(sources, "_CACHE_VERSION", 0)
    looked_at.clear()
    assert len(found(folder)) == 3
    assert len(looked_at) == 4
    monkeypatch.undo()
    caches = [p for p in (user_cache / "ear-vae").iterdir() if str(folder) in p.read_text()]
    for damage in ("{", "[1]", json.dumps({str((folder / "a.wav").resolve()): {"stamp": None}})):
        for cache in caches:
            cache.write_text(damage)
        assert len(found(folder)) == 3


def test_band_limited_files_are_found(tmp_path: Path) -> None:
    """Noise cut by the spectrum, so that the right answer is known, and what fades without a cut."""
    random = np.random.default_rng(1)
    spectrum = np.fft.rfft(random.standard_normal((2, 2**17)))
    frequencies = np.fft.rfftfreq(2**17, 1 / 44_100)
    fading = 10 ** (-60 / 20 * frequencies / 22_050)
    for cut in (8_000, 16_000, 19_000):
        samples = np.fft.irfft(spectrum * fading * (frequencies < cut))
        measured = bandwidth_hz(torch.from_numpy(samples), 44_100)
        assert cut - 260 <= measured <= cut + 2 * 260
    assert bandwidth_hz(torch.from_numpy(np.fft.irfft(spectrum * fading)), 44_100) == 22_050
    assert bandwidth_hz(torch.zeros(2, 44_100), 44_100) == 22_050
    write(tmp_path / "cut" / "a.wav", np.fft.irfft(0.1 * spectrum * (frequencies < 16_000)).T)
    write(tmp_path / "cut" / "b.wav", np.fft.irfft(0.1 * spectrum).T)
    names = [f.path.name for f in found(tmp_path / "cut", min_bandwidth_hz=17_000)]
    assert names == ["b.wav"]
    assert len(found(tmp_path / "cut", min_bandwidth_hz=15_500)) == 2


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_an_mp3_of_low_rate_is_band_limited(tmp_path: Path) -> None:
    samples = 0.1 * np.random.default_rng(1).standard_normal((220_500, 2))
    source = write(tmp_path / "noise.wav", samples)
    command = ["ffmpeg", "-loglevel", "error", "-i", source, "-b:a", "128k", tmp_path / "noise.mp3"]
    subprocess.run(command, check=True)
    (mp3,) = (f for f in found(tmp_path, min_bandwidth_hz=1.0) if f.path.suffix == ".mp3")
    assert mp3.bandwidth_hz == pytest.approx(16_500, abs=800)
    assert [f.path.suffix for f in found(tmp_path, min_bandwidth_hz=18_000)] == [".wav"]


def test_segments_are_the_files_audio(folder: Path) -> None:
    """A segment is found, sample for sample, in one of the files."""
    segments = dataset(found(folder, min_seconds=1))
    whole = {}
    for name in ("a.wav", "b.flac"):
        samples, rate = soundfile.read(folder / name, dtype="float32", always_2d=True)
        whole[name] = resample(torch.from_numpy(samples.T.copy()), rate, 44_100).expand(2, -1)
    names = set()
    for index in range(12):
        segment = segments[index]
        assert segment.shape == (2, SAMPLES)
        assert torch.equal(segment, segments[index])
        errors = {
            name: (audio.unfold(1, SAMPLES, 1)[:, :, ::64] - segment[:, None, ::64])
            .square()
            .mean((0, 2))
            .min()
            for name, audio in whole.items()
        }
        name, error = min(errors.items(), key=lambda item: float(item[1]))
        # A resampled segment starts between two samples of the resampled file.
        assert error < (1e-12 if name == "a.wav" else 1e-4)
        names.add(name)
    assert names == {"a.wav", "b.flac"}


def test_resampled_segments_have_no_edges(tmp_path: Path) -> None:
    """A constant stays one to both ends, as it does not where the filter sees nothing beyond them."""
    write(tmp_path / "constant.wav", np.full((480_000, 2), 0.25), 48_000)
    segments = dataset(found(tmp_path))
    for index in range(8):
        torch.testing.assert_close(segments[index], torch.full((2, SAMPLES), 0.25), rtol=0, atol=1e-4)


def test_augmentation_keeps_the_relation_of_the_channels(folder: Path) -> None:
    files = found(folder, min_seconds=1)
    plain, augmented = dataset(files), dataset(files, augmentation=Augmentation())
    gains, swapped = [], []
    for index in range(24):
        before, after = plain[index], augmented[index]
        fits = []
        for source in (before, before.flip(0)):
            gain = float((after * source).sum() / source.square().sum())
            fits.append((float((after - gain * source).abs().max()), gain))
        error, gain = min(fits)
        assert error < 1e-6
        assert 10 ** (-6 / 20) <= abs(gain) <= 1
        gains.append(gain)
        if not torch.equal(before[0], before[1]):
            swapped.append(fits[1] < fits[0])
    assert min(gains) < 0 < max(gains)
    assert set(swapped) == {False, True}


def test_speed_plays_like_a_tape(tmp_path: Path) -> None:
    """A tone at 1 kHz comes out at whole per cents of it, slower and faster, and full length."""
    time = np.arange(88_200) / 44_100
    write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time)[:, None].repeat(2, 1))
    segments = dataset(
        found(tmp_path), augmentation=Augmentation(0, 0, 0, speed=0.05), segment_samples=22_050
    )
    heard = set()
    for index in range(30):
        spectrum = torch.fft.rfft(segments[index][0] * torch.hann_window(22_050), 220_500).abs()
        hz = float(spectrum.argmax()) * 44_100 / 220_500
        assert hz == pytest.approx(10 * round(hz / 10), abs=0.5)
        heard.add(round(hz / 10))
    assert heard <= set(range(95, 106))
    assert len(heard) >= 7


def test_treble_is_lowered_above_where_it_begins_and_by_no_more_than_was_asked_for(tmp_path: Path) -> None:
    """Told by the spectrum of an impulse."""
    samples = np.zeros((22_050, 2))
    samples[1000] = 1.0, -0.5
    write(tmp_path / "impulse.wav", samples)
    segments = dataset(
        found(tmp_path), augmentation=Augmentation(0, 0, 0, treble_db=24.0), segment_samples=22_050
    )
    hz = torch.fft.rfftfreq(22_050, 1 / 44_100)
    depths, begins = [], []
    for index in range(30):
        left, right = segments[index]
        assert torch.allclose(right, -0.5 * left, atol=1e-4)
        assert float(left[:900].abs().max()) < 1e-5
        level = 20 * torch.fft.rfft(left).abs().log10()
        assert float(level[1:20].abs().max()) < 0.1
        depths.append(-float(level[-1]))
        begins.append(float(hz[(level < level[-1] / 2).nonzero()[0]]))
        assert float(level.diff().max()) < 1e-2
        octaves = level[200::2] - level[100 : 100 + len(level[200::2])]
        assert float(octaves.min()) > -12
    assert max(depths) <= 24 < 1.5 * max(depths)
    assert min(depths) < 6
    assert min(begins) > 500
    plain = dataset(found(tmp_path), augmentation=AS_IS, segment_samples=22_050)[0]
    assert torch.allclose(plain, torch.from_numpy(samples.T).float(), atol=1e-4)


def test_silence_and_mono_are_drawn_again(tmp_path: Path) -> None:
    samples = np.zeros((240_000, 2))
    samples[:80_000] = 0.1 * np.random.default_rng(0).standard_normal((80_000, 2))
    samples[80_000:160_000] = samples[:80_000, :1]
    write(tmp_path / "a.wav", samples)
    files = found(tmp_path)

    def levels(**settings: Any) -> list[float]:
        return [float(dataset(files, **settings)[index].std()) for index in range(40)]

    assert sum(level == 0 for level in levels()) > 8
    assert all(level > 0 for level in levels(min_level_db=-60))
    assert all(level > 0 for level in levels(mono="skip"))
    plain, skipping = dataset(files, min_level_db=-60), dataset(files, min_level_db=-60, mono="skip")
    assert any(torch.equal(*plain[index]) for index in range(40))
    assert not any(torch.equal(*skipping[index]) for index in range(40))
    write(tmp_path / "b" / "silence.wav", np.zeros((44_100, 2)))
    assert float(dataset(found(tmp_path / "b"), min_level_db=-60)[0].abs().max()) == 0


def test_a_file_that_fails_is_replaced_and_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same segments take its place whether it has failed before or not."""
    files = found(folder, min_seconds=1)
    (folder / "a.wav").write_bytes(b"gone bad")
    caplog.clear()
    segments = dataset(files)
    taken = [segments[index] for index in range(12)]
    assert caplog.text.count("a.wav") == 1
    for index in (7, 3):
        assert torch.equal(dataset(files)[index], taken[index])
    (folder / "b.flac").unlink()
    with pytest.raises(EarVAEError, match="none of 200 segments drawn from 2 training files"):
        segments[0]


def test_a_bad_place_does_not_cost_the_file(tmp_path: Path) -> None:
    """Else what is drawn later would depend on which process has met it."""
    path = write(tmp_path / "music" / "a.flac", rumble(441_000, 2))
    write(tmp_path / "music" / "b.flac", rumble(220_500, 1))
    files = found(tmp_path / "music")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    segments = dataset(files)
    taken = [segments[index] for index in range(30)]
    for index, segment in enumerate(taken):
        assert torch.equal(segment, dataset(files)[index])
    stereo = [not torch.equal(*segment) for segment in taken]
    # Two thirds of the draws go to the first file, and half of those come to something.
    assert 5 <= sum(stereo) <= 25


def loader(
    segments: SegmentDataset, batch_size: int, rank: int = 0, processes: int = 1, workers: int = 0
) -> Any:
    return SegmentLoader(
        segments,
        batch_size=batch_size,
        segments_per_epoch=17,
        rank=rank,
        processes=processes,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def test_the_sequence_depends_on_neither_workers_nor_processes(folder: Path) -> None:
    segments = dataset(found(folder, min_seconds=1), segment_samples=1024)
    expected = [torch.stack([segments[step * 4 + item] for item in range(4)]) for step in range(8)]
    for workers in (0, 2):
        alone = loader(segments, 4, workers=workers)
        assert len(alone) == 4
        batches = [batch for _ in range(2) for batch in alone]
        assert len(batches) == 8
        assert all(map(torch.equal, batches, expected))
    both = [loader(segments, 2, rank, 2) for rank in (0, 1)]
    parts = zip(*([batch for _ in range(2) for batch in one] for one in both), strict=True)
    for whole, (even, odd) in zip(expected, parts, strict=True):
        assert torch.equal(whole[0::2], even)
        assert torch.equal(whole[1::2], odd)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_taken_is_not_taken_again(folder: Path, workers: int) -> None:
    segments = dataset(found(folder, min_seconds=1), segment_samples=1024)
    whole = loader(segments, 4)
    expected = [batch for _ in range(2) for batch in whole]
    stopped = loader(segments, 4, workers=workers)
    for _ in zip(range(3), stopped, strict=False):
        state = stopped.state_dict()
    assert state == {"segments": 12}
    resumed = loader(segments, 4, workers=workers)
    resumed.load_state_dict(state)
    batches = [batch for _ in range(2) for batch in resumed]
    assert len(batches) == 5
    assert all(map(torch.equal, batches, expected[3:]))
    at_two = loader(segments, 2, 1, 2)
    at_two.load_state_dict(state)
    assert torch.equal(next(iter(at_two)), expected[3][1::2])


def test_validation_excerpts_are_the_middle(folder: Path) -> None:
    data = AudioDataModule(folder, [str(folder / "a.wav").replace("a.wav", "")], validation_seconds=1)
    data.setup("fit")
    excerpts = list(data.val_dataloader())
    assert [tuple(e.shape) for e in excerpts] == [(1, 2, 44_100)] * 2
    whole, _ = read_audio(folder / "a.wav")
    assert torch.equal(excerpts[0][0], whole[:, 66_150:110_250])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"segment_seconds": 0.0}, "segment_seconds"),
        ({"mono": "both"}, "mono must be"),
        ({"min_bandwidth_hz": 0}, "min_bandwidth_hz must be positive"),
        ({"folder": []}, "an empty list"),
    ],
)
def test_values_that_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        AudioDataModule(**({"folder": folder} | settings))
    for wrong in (
        {"gain_db": -1},
        {"gain_db": math.inf},
        {"swap_channels": 2},
        {"speed": 1},
        {"treble_db": -1},
    ):
        with pytest.raises(EarVAEError, match=next(iter(wrong))):
            Augmentation(**wrong)


def test_an_epoch_shorter_than_a_step(folder: Path) -> None:
    data = AudioDataModule(folder, batch_size=8, segments_per_epoch=4)
    data.setup("fit")
    with pytest.raises(EarVAEError, match=r"4 segments, but one step takes 8; .*segments_per_epoch"):
        data.train_dataloader()


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(find_usable_files([folder], Policy(), cache_dir=tmp_path / "file" / "cache")) == 3
    assert "could not be cached" in caplog.text
    assert math.isclose(os.path.getsize(tmp_path / "file"), 10)


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_samples": -5},
    {"num_samples": 0},
    {"num_samples": 10**400},
    {"num_samples": 10**12},
    {"num_samples": 1000.5},
    {"num_samples": "176400"},
    {"num_samples": True},
    {"sample_rate": 0},
    {"sample_rate": 10**9},
    {"sample_rate": None},
    {"channels": 7},
    {"channels": [2]},
    {"bandwidth_hz": math.nan},
    {"bandwidth_hz": -1.0},
    {"bandwidth_hz": "high"},
]


@pytest.mark.parametrize("changed", IMPOSSIBLE, ids=str)
def test_what_cannot_be_true_is_looked_up_again(
    changed: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    before = find_usable_files([folder], Policy(), cache_dir=tmp_path / "cache")
    (cache,) = (tmp_path / "cache").iterdir()
    entries = json.loads(cache.read_text())
    cache.write_text(json.dumps({path: entry | changed for path, entry in entries.items()}))
    assert find_usable_files([folder], Policy(), cache_dir=tmp_path / "cache") == before
    assert json.loads(cache.read_text()) == entries


@pytest.mark.parametrize("content", ["[" * 100_000, "[1, 2]", '{"a": 1}', "null", "\x00", "9" * 5000])
def test_a_cache_of_another_kind_is_made_anew(content: str, folder: Path, tmp_path: Path) -> None:
    before = find_usable_files([folder], Policy(), cache_dir=tmp_path / "cache")
    (cache,) = (tmp_path / "cache").iterdir()
    good = cache.read_text()
    cache.write_text(content)
    assert find_usable_files([folder], Policy(), cache_dir=tmp_path / "cache") == before
    assert cache.read_text() == good


def test_weights_near_the_largest_number_still_are_shares(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,weight\nmusic/a.wav,1e308\nmusic/b.flac,1e308\n")
    segments = dataset(found(manifest))
    assert {drawn_from(segments, index) for index in range(20)} == {"a.wav", "b.flac"}


def test_a_line_ends_where_json_says(folder: Path, tmp_path: Path) -> None:
    """Not at a line separator within a text."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "music/a.wav", "title": "one\u2028two"}\n', encoding="utf-8")
    assert [file.path.name for file in found(manifest)] == ["a.wav"]
