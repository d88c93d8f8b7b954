"""`ear-vae report`: which excerpts, their audio and figures, and what the page is made of."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAEError
from ear_vae.cli import main
from ear_vae.dsp.resampling import resample
from ear_vae.dsp.stereo import side_to_mid_db, stereo_correlation
from ear_vae.evaluation import measure
from ear_vae.evaluation.listening.excerpts import (
    Excerpt,
    ExcerptSpan,
    Signal,
    choose_spans,
    cut,
    evenly_spaced,
    loudest,
    measured,
)
from ear_vae.evaluation.listening.page import Means, fitting, means_of, page_text
from ear_vae.evaluation.pairs import Pair
from ear_vae.evaluation.runner import Task
from ear_vae.evaluation.systems import loading

RATE = 44_100


def music(seconds: float = 4.0, seed: int = 0, channels: int = 2) -> torch.Tensor:
    """Noise below 8 kHz, which survives resampling, with peaks far below full scale."""
    samples = int(seconds * RATE)
    spectrum = torch.fft.rfft(torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)))
    spectrum[:, int(8000 * seconds) :] = 0
    return 0.1 * torch.fft.irfft(spectrum, samples)


def write(path: Path, audio: torch.Tensor, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T.numpy(), rate, "FLOAT")
    return path


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def audio_of(text: str, row: int, column: int) -> tuple[np.ndarray, int]:
    found = re.search(rf'id="audio-{row}-{column}">([A-Za-z0-9+/=]*)</script>', text)
    assert found is not None
    return soundfile.read(io.BytesIO(base64.b64decode(found[1])), dtype="int16", always_2d=True)


def excerpt(*audio: torch.Tensor, name: str = "song") -> Excerpt:
    signals = [Signal(f"s{index}", samples) for index, samples in enumerate(audio)]
    return Excerpt(ExcerptSpan(name, Path("song.wav"), 0.0, 10.0), RATE, tuple(signals))


def page(*excerpts: Excerpt, title: str = "t") -> str:
    return page_text(excerpts, title=title, means=means_of(excerpts))


def test_the_loudest_stretch_of_each_part() -> None:
    audio = 0.01 * torch.ones(1, 20 * RATE) * music(20)[:1]
    for start in (3.5, 12.2):
        audio[:, int(start * RATE) : int((start + 1) * RATE)] *= 50
    assert loudest(audio, RATE, 1.0, parts=2) == pytest.approx([3.5, 12.2], abs=0.1)
    assert loudest(audio[:, : 10 * RATE], RATE, 1.0) == pytest.approx([3.5], abs=0.1)
    # A stretch of another length contains it; audio shorter than that begins at its beginning.
    (start,) = loudest(audio[:, : 10 * RATE], RATE, 4.0)
    assert 0.5 <= start <= 3.5
    assert loudest(audio, RATE, 30.0) == [0.0]
    assert loudest(audio[:, :100], RATE, 1.0) == [0.0]


def test_files_are_evenly_spaced_and_few_files_give_several_excerpts(tmp_path: Path) -> None:
    assert evenly_spaced(4, 10) == [0, 3, 6, 9]
    assert evenly_spaced(5, 3) == [0, 1, 2]
    assert evenly_spaced(1, 3) == [0]
    files = [(name, write(tmp_path / f"{name}.wav", music(3, seed))) for seed, name in enumerate("abcd")]
    assert [place.name for place in choose_spans(files, count=2, seconds=1)] == ["a", "d"]
    places = choose_spans(files[:2], count=5, seconds=1)
    assert [place.name for place in places] == ["a", "a", "a", "b", "b"]
    starts = [place.start_seconds for place in places]
    assert starts[0] + 1 <= starts[1] + 1e-9
    assert starts[1] + 1 <= starts[2] + 1e-9
    # Only whole excerpts, and a file that is shorter than one is taken whole.
    assert len(choose_spans(files[:1], count=5, seconds=1.4)) == 2
    assert [place.start_seconds for place in choose_spans(files[:1], count=5, seconds=9)] == [0.0]


def test_an_excerpt_holds_the_same_samples_of_every_file(tmp_path: Path) -> None:
    audio = music(4)
    target = write(tmp_path / "target.wav", audio)
    same = write(tmp_path / "same.wav", -0.5 * audio)
    other = write(tmp_path / "other.wav", resample(audio, RATE, 48_000), 48_000)
    late = write(tmp_path / "late.wav", torch.cat((torch.zeros(2, 441), audio), dim=1))
    mono = write(tmp_path / "mono.wav", audio[:1, : int(2.5 * RATE)])
    place = ExcerptSpan("target", target, 1.5, 2.0)
    tasks = [Task(Pair("target", target, path), path.stem) for path in (same, other, late, mono)]
    tasks.append(Task(Pair("target", target, late), "aligned", align=True))
    found = cut(place, tasks)
    by_name = {signal.name: signal for signal in found.signals}
    expected = audio[:, int(1.5 * RATE) : int(3.5 * RATE)]
    assert found.sample_rate == RATE
    assert torch.equal(by_name["Original"].audio, expected)
    assert torch.equal(by_name["same"].audio, -0.5 * expected)
    torch.testing.assert_close(by_name["other"].audio, expected, atol=1e-3, rtol=0)
    assert by_name["other"].notes == ("it is at 48000 Hz and was resampled to 44100 Hz",)
    assert torch.equal(by_name["late"].audio[:, 441:], expected[:, :-441])
    assert by_name["late"].notes == ("it seems 10.00 ms late; alignment takes that out",)
    assert torch.equal(by_name["aligned"].audio, expected)
    assert torch.equal(by_name["mono"].audio[:, :RATE], expected[:1, :RATE].expand(2, -1))
    assert not by_name["mono"].audio[:, RATE:].any()
    assert by_name["mono"].notes == (
        "it ends 1.00 s before the excerpt does",
        "it is mono and was duplicated",
    )
    with pytest.raises(EarVAEError, match=r"mono.wav: ends before the excerpt at 3.0 s"):
        cut(ExcerptSpan("target", target, 3.0, 1.0), [tasks[3]])
    # At the end of the original there is less; high rates are more than a page needs.
    assert cut(ExcerptSpan("target", target, 3.0, 2.0), []).seconds == 1.0
    write(target, resample(audio, RATE, 88_200), 88_200)
    high = cut(place, [])
    assert high.sample_rate == 48_000
    expected = resample(audio, RATE, 48_000)[:, 72_000:168_000]
    torch.testing.assert_close(high.signals[0].audio, expected, atol=1e-3, rtol=0)


class Gain:
    """A system that lowers what it is given, and remembers how much that was."""

    name, identity, sample_rate, channels = "gain", "1", RATE, 2

    def __init__(self) -> None:
        self.given: list[int] = []

    def reconstruct(self, audio: torch.Tensor) -> torch.Tensor:
        self.given.append(audio.shape[1])
        return 0.25 * audio


def test_a_model_rebuilds_the_excerpt_and_a_second_around_it(tmp_path: Path) -> None:
    audio = music(8)
    target = write(tmp_path / "target.wav", audio)
    system = Gain()
    found = cut(ExcerptSpan("target", target, 3.0, 2.0), [Task(Pair("target", target), "gain", system)])
    assert system.given == [4 * RATE]
    assert torch.equal(found.signals[1].audio, 0.25 * audio[:, 3 * RATE : 5 * RATE])


def test_gains_match_loudness_and_figures_are_those_of_the_metrics() -> None:
    target = music(2)
    noisy = 0.5 * (target + 0.1 * music(2, seed=9))
    found = measured(excerpt(target, 0.5 * target, noisy, 0.02 * target, torch.zeros_like(target)))
    original, half, _, faint, silent = found.signals
    assert original.gain_db == 0
    assert half.gain_db == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert half.figures["si_sdr_db"] > 80  # type: ignore[operator]
    assert faint.gain_db == 20
    assert any("would need +34.0 dB" in note for note in faint.notes)
    assert silent.gain_db == 0
    assert any("level was not matched" in note for note in silent.notes)
    expected = measure(noisy, target, sample_rate=RATE)
    for metric in ("si_sdr_db", "mel_distance", "icpc", "ccpc"):
        assert found.signals[2].figures[metric] == pytest.approx(float(expected[metric]), abs=1e-6)


def test_stereo_figures() -> None:
    left = music(1, channels=1)
    opposite = torch.cat((left, -0.5 * left))
    assert float(stereo_correlation(opposite)) == pytest.approx(-1, abs=1e-6)
    # S = 0.75 L and M = 0.25 L.
    assert float(side_to_mid_db(opposite)) == pytest.approx(20 * math.log10(3), abs=1e-4)
    found = measured(excerpt(left.expand(2, -1), opposite))
    assert found.signals[0].correlation == pytest.approx(1, abs=1e-6)
    assert found.signals[0].side_db is None
    independent = music(1, seed=3)
    assert float(stereo_correlation(independent)) == pytest.approx(
        np.corrcoef(independent.numpy())[0, 1], abs=1e-3
    )
    assert measured(excerpt(left, left)).signals[1].correlation is None


def test_the_page_holds_every_sample_and_nothing_clips() -> None:
    target = music(1)
    loud = 8 * music(1, seed=1)
    assert loud.abs().max() > 2
    text = page(measured(excerpt(target, loud, 0.5 * target)))
    data = data_of(text)["excerpts"][0]
    stored, rate = audio_of(text, 0, 0)
    assert rate == RATE
    np.testing.assert_array_equal(stored.T, np.round(target.numpy() * 32768))
    played = []
    for column, original in enumerate((target, loud, 0.5 * target)):
        samples, _ = audio_of(text, 0, column)
        assert samples.shape == (RATE, 2)
        signal = data["signals"][column]
        gain = 10 ** (signal["gainDb"] / 20)
        for name, expected in (("matched", gain * data["headroom"]), ("plain", 1 / float(loud.abs().max()))):
            heard = samples.T / 32768 * signal[name]
            np.testing.assert_allclose(heard, expected * original.numpy(), atol=2 * signal[name] / 32768)
        played.append(samples.T / 32768 * signal["matched"])
    powers = [float(measure_loudness(torch.from_numpy(audio).float())) for audio in played]
    assert powers[1] == pytest.approx(powers[0], abs=0.02)
    assert powers[2] == pytest.approx(powers[0], abs=0.02)
    assert max(np.abs(audio).max() for audio in played) <= 1
    # The same holds where matching raises peaks above full scale: all are lowered.
    spike = 0.2 * target
    spike[:, 1000] = 0.9
    high = data_of(page(measured(excerpt(target, spike))))["excerpts"][0]
    assert high["headroom"] < 0.5
    assert 0.9 * high["signals"][1]["matched"] == pytest.approx(1)
    assert high["signals"][0]["matched"] == high["headroom"]


def measure_loudness(audio: torch.Tensor) -> torch.Tensor:
    return measure(audio, audio, sample_rate=RATE, names=("loudness_distance_lu",))["lufs_target"]


def test_names_are_data_and_only_the_script_may_run() -> None:
    name = '</script><script>alert(1)</script><!-- {{audio}} & "\u2028'
    one = measured(excerpt(music(0.5), music(0.5, seed=1), name=name))
    text = page(one, title=name)
    data = data_of(text)
    assert data["title"] == name
    assert data["excerpts"][0]["name"] == name
    assert text.count("<script") == 4  # data, two signals, the script
    assert html.escape(name) in text.split("</title>")[0]
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r'(src|href)="', text)


def test_only_what_is_really_better_is_marked() -> None:
    figures = (
        {"si_sdr_db": 9.10, "mel_distance": 0.50, "icpc": 0.900, "ccpc": None, "loudness_distance_lu": 0.31},
        {"si_sdr_db": 8.90, "mel_distance": 0.60, "icpc": 0.902, "ccpc": None, "loudness_distance_lu": 0.25},
        {"si_sdr_db": -0.001, "mel_distance": None, "icpc": 0.899, "ccpc": 0.9, "loudness_distance_lu": 0.36},
    )
    means = Means("caption", dict(zip("abc", figures, strict=True)))
    one = measured(excerpt(*[music(0.5, seed) for seed in range(4)]))
    rows = {row["metric"]: row for row in data_of(page_text([one], title="t", means=means))["means"]["rows"]}

    def shown(metric: str) -> list[tuple[str, bool]]:
        return [(cell["text"], cell["best"]) for cell in rows[metric]["cells"]]

    # Two that differ by less than another seed of the same training does are equally good.
    assert shown("si_sdr_db") == [("9.10", True), ("8.90", True), ("0.00", False)]
    assert shown("mel_distance") == [("0.500", True), ("0.600", False), ("–", False)]
    # Where nobody is really better, and where there is nobody to be better than, nobody is marked.
    assert shown("icpc") == [("90.00", False), ("90.20", False), ("89.90", False)]
    assert shown("ccpc") == [("–", False), ("–", False), ("90.00", False)]
    assert shown("loudness_distance_lu") == [("0.31", True), ("0.25", True), ("0.36", False)]
    # One system is not the best of anything.
    alone = data_of(page(measured(excerpt(music(0.5), music(0.5, 1)))))
    assert not any(cell["best"] for row in alone["means"]["rows"] for cell in row["cells"])


def test_three_systems_and_six_excerpts_of_white_noise_stay_under_40_megabytes() -> None:
    """Nothing compresses worse; the excerpts get shorter, all alike."""
    noise = 0.3 * torch.randn(2, 10 * 48_000, generator=torch.Generator().manual_seed(0))
    signals = tuple(Signal(str(index), noise.roll(index, dims=-1)) for index in range(4))
    excerpts = [Excerpt(ExcerptSpan("x", Path("x"), 0.0, 10.0), 48_000, signals)] * 6
    fitted = fitting(excerpts, 40)
    assert {one.seconds for one in fitted} == {fitted[0].seconds}
    assert 5 < fitted[0].seconds < 10
    means = Means("", {})
    size = len(page_text(fitted, title="t", means=means).encode())
    assert 36e6 < size < 40e6
    short = fitting([one.shortened(1) for one in excerpts], 40)
    assert [one.seconds for one in short] == [1.0] * 6
    with pytest.raises(EarVAEError, match=r"2 MB cannot hold 6 excerpts with 4 signals each"):
        fitting(excerpts, 2)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three originals, and two systems that are worse and worse for later files."""
    for index, name in enumerate(("a", "b", "c")):
        audio = music(2, seed=index)
        write(tmp_path / "original" / f"{name}.wav", audio)
        for system, level in (("good", 0.05), ("bad", 0.2)):
            rebuilt = audio + level * 3**index * music(2, seed=50 + index)
            write(tmp_path / system / f"{name}.wav", rebuilt)
    return tmp_path


def test_report_of_folders_and_models(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "load_codec", lambda name, device: Gain() if name == "gain" else None)
    write(folders / "original" / "lonely.wav", music())
    out = folders / "out.html"
    original, good = folders / "original", folders / "good"
    systems = ("--system", good, "--system", f"Ü={folders / 'bad'}", "--model", "gain")
    options = ("--excerpts", 2, "--seconds", 1)
    assert report(out, original, *systems, *options) == 0
    said = capsys.readouterr().err
    assert "1 file that not every system has is left out" in said
    assert f"{out}: 2 excerpts of up to 1.0 s" in said
    text = out.read_text(encoding="utf-8")
    data = data_of(text)
    assert data["title"] == "good, Ü and gain beside the originals of original"
    assert data["systems"] == ["Original", "good", "Ü", "gain"]
    assert [one["name"] for one in data["excerpts"]] == ["a", "c"]
    start = round(data["excerpts"][1]["start"] * RATE)
    expected, _ = soundfile.read(folders / "bad" / "c.wav")
    stored, _ = audio_of(text, 1, 2)
    peak = max(1.0, np.abs(expected[start : start + RATE]).max())
    np.testing.assert_allclose(stored / 32768 * peak, expected[start : start + RATE], atol=1e-4)
    assert data["excerpts"][0]["signals"][3]["gainDb"] == pytest.approx(12.04, abs=0.02)
    assert data["means"]["caption"] == "Means over the 2 excerpts below"
    mean, *each = (
        float(row["cells"][1]["text"].replace("−", "-"))
        for rows in (data["means"]["rows"], *(one["rows"] for one in data["excerpts"]))
        for row in rows
        if row["metric"] == "si_sdr_db"
    )
    assert mean == pytest.approx(sum(each) / 2, abs=0.02)
    single = folders / "single.html"
    assert report(single, original / "a.wav", "--system", f"mine={good / 'a.wav'}", "--excerpts", 1) == 0
    alone = data_of(single.read_text(encoding="utf-8"))
    assert alone["title"] == "mine beside a.wav"
    assert alone["means"]["caption"] == "Figures of the excerpt below"
    capsys.readouterr()
    before = out.read_bytes()
    assert report(out, original, "--system", good) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before
    # The same files give the same page.
    assert report(out, original, *systems, *options, "--force") == 0
    assert out.read_bytes() == before


def test_report_of_evaluations(folders: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = folders / "original"
    # Worst first by name, so that it is not the order of names that decides.
    (original / "c.wav").rename(original / "0.wav")
    (folders / "good" / "c.wav").rename(folders / "good" / "0_x.wav")
    for name in ("a", "b"):
        (folders / "good" / f"{name}.wav").rename(folders / "good" / f"{name}_x.wav")
    first, second = folders / "first.json", folders / "second.json"
    good = ("--pattern", "{name}_x")
    assert main(["evaluate", str(original), str(folders / "good"), *good, "--json", str(first)]) == 0
    assert main(["evaluate", str(original), "--model", str(small_model), "--json", str(second)]) == 0
    out = folders / "out.html"
    assert report(out, "--from", first, "--from", second, "--excerpts", 2, "--seconds", 1) == 0
    data = data_of(out.read_text(encoding="utf-8"))
    assert data["systems"] == ["Original", "good", small_model.name]
    assert [one["name"] for one in data["excerpts"]] == ["a", "0"]
    assert data["means"]["caption"] == "Means over the whole of 3 files"
    summaries = [json.loads(path.read_text())["summary"] for path in (first, second)]
    (row,) = (row for row in data["means"]["rows"] if row["metric"] == "stft_distance")
    expected = [f"{summary['stft_distance']['mean']:.3f}" for summary in summaries]
    assert [cell["text"] for cell in row["cells"]] == expected
    capsys.readouterr()
    assert report(out, original, "--from", first, "--force") == 1
    assert "leave out TARGET" in capsys.readouterr().err
    for content in ("{}", "[", '{"files": [], "inputs": {"x": 1}}'):
        (folders / "wrong.json").write_text(content)
        assert report(out, "--from", folders / "wrong.json", "--force") == 1
        assert "is no evaluation" in capsys.readouterr().err
    elsewhere = json.loads(second.read_text())
    elsewhere["inputs"]["target"] = str(folders / "bad")
    second.write_text(json.dumps(elsewhere))
    assert report(out, "--from", first, "--from", second, "--force") == 1
    assert "of different originals" in capsys.readouterr().err


def test_what_cannot_be_shown(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, good, bad = folders / "original", folders / "good", folders / "bad"
    out = folders / "out.html"
    for arguments, message in (
        ((out,), "give the folder of the originals"),
        ((out, original), "rebuilt audio with --system NAME=FOLDER"),
        ((out, original, "--system", good, "--system", f"good={bad}"), "two systems are called good"),
        ((out, original, "--system", f"={bad}"), "a system has no name"),
        ((folders / "no" / "out.html", original, "--system", good), "does not exist"),
        ((out, original, "--system", folders / "absent"), "no such file or folder"),
    ):
        assert report(*arguments) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()
    (bad / "a.wav").unlink()
    (good / "b.wav").unlink()
    (good / "c.wav").unlink()
    assert report(out, original, "--system", good, "--system", bad) == 1
    assert "no file that all systems have" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report(out, original, "--system", good, "--seconds", "0")


def test_a_failing_file_is_left_out_and_said(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "good" / "b.wav").write_text("not audio")
    out = folders / "out.html"
    arguments = (out, folders / "original", "--system", folders / "good", "--seconds", 1, "--excerpts", 3)
    assert report(*arguments) == 1
    assert "ear-vae: b: left out: " in capsys.readouterr().err
    assert [one["name"] for one in data_of(out.read_text(encoding="utf-8"))["excerpts"]] == ["a", "c"]
