"""`ear-vae evaluate` on files made here, against the metrics' functions and numpy."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEError
from ear_vae.cli import main
from ear_vae.dsp.resampling import resample
from ear_vae.evaluation import METRICS, measure, runner
from ear_vae.evaluation.pairs import find_pairs
from ear_vae.evaluation.systems import loading
from ear_vae.evaluation.systems.base import rebuild

RATE = 44_100


def music(seconds: float = 1.0, channels: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise below 8 kHz, which survives resampling."""
    samples = int(seconds * RATE)
    spectrum = torch.fft.rfft(torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)))
    spectrum[:, int(8000 * seconds) :] = 0
    spectrum[:, : int(20 * seconds)] = 0
    return 0.1 * torch.fft.irfft(spectrum, samples)


def write(path: Path, audio: torch.Tensor, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T.numpy(), rate, "FLOAT")
    return path


def noisy(audio: torch.Tensor, level: float, seed: int = 99) -> torch.Tensor:
    return audio + level * music(audio.shape[1] / RATE, audio.shape[0], seed)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs, one in a subfolder, that differ by more and more noise."""
    for index, name in enumerate(("a", "b", "sub/c ü")):
        audio = music(seed=index)
        write(tmp_path / "original" / f"{name}.wav", audio)
        write(tmp_path / "rebuilt" / f"{name}.wav", noisy(audio, 0.05 * 4**index))
    return tmp_path / "original", tmp_path / "rebuilt"


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def one(tmp_path: Path, target: Path, estimate: Path, *more: str) -> dict[str, Any]:
    """The row of two files."""
    assert evaluate(target, estimate, "--json", tmp_path / "one.json", "--force", *more) == 0
    (row,) = read(tmp_path / "one.json")["files"]
    return row


def test_folders(tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    assert evaluate(*folders, "--json", out, "--csv", table) == 0
    report = read(out)
    assert [row["name"] for row in report["files"]] == ["a", "b", "sub/c ü"]
    assert report["failed"] == []
    for row in report["files"]:
        target, estimate = (
            torch.from_numpy(soundfile.read(folder / f"{row['name']}.wav", dtype="float32")[0].T.copy())
            for folder in folders
        )
        for name, value in measure(estimate, target, sample_rate=RATE).items():
            assert row[name] == pytest.approx(float(value), abs=1e-5), name
        assert row["notes"] == []
    for metric in (*METRICS, "lufs_estimate", "lufs_target"):
        values = [row[metric] for row in report["files"]]
        found = report["summary"][metric]
        expected = {"mean": np.mean(values), "median": np.median(values), "std": np.std(values), "count": 3}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9), metric
        assert found["undefined"] == []
    with table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["mel_distance"]) for line in lines] == [r["mel_distance"] for r in report["files"]]
    printed = capsys.readouterr().out.splitlines()
    (line,) = (line for line in printed if line.startswith("si_sdr_db"))
    # Of so few files the worst are not listed.
    assert line.split()[-1] == "3"
    assert f"{report['summary']['si_sdr_db']['median']:.2f}" in line.split()
    assert not list(tmp_path.glob("*.partial*"))


def test_two_files_are_like_two_folders(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders, "--json", tmp_path / "all.json") == 0
    row = one(tmp_path, folders[0] / "b.wav", folders[1] / "b.wav")
    expected = read(tmp_path / "all.json")["files"][1]
    assert {name: row[name] for name in METRICS} == pytest.approx({name: expected[name] for name in METRICS})
    assert row["name"] == "b"


def test_pairs_by_pattern_and_what_is_left(tmp_path: Path) -> None:
    for name in ("x.wav", "y.flac", "deep/x.wav", "deep/x_model.mp3", "x_model.ogg", "z_model.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = find_pairs(tmp_path, tmp_path, pattern="{name}_model")
    assert [(pair.name, pair.estimate.name) for pair in found.pairs if pair.estimate] == [
        ("deep/x", "x_model.mp3"),
        ("x", "x_model.ogg"),
    ]
    assert found.without_estimate == ("y", "z_model")
    for pattern, message in (("model", "no {name} in it"), ("{name}_other", "there should be deep/x_other")):
        with pytest.raises(EarVAEError, match=message):
            find_pairs(tmp_path, tmp_path, pattern=pattern)
    (tmp_path / "x.mp3").touch()
    with pytest.raises(EarVAEError, match=r"x.mp3 and .*x.wav have the same name"):
        find_pairs(tmp_path, tmp_path)


def test_paths_that_do_not_fit(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    file = folders[0] / "a.wav"
    (tmp_path / "empty").mkdir()
    for target, estimate, message in (
        (folders[0], file, "is a folder and .* a file"),
        (folders[0], tmp_path / "absent", "no such file or folder"),
        (tmp_path / "empty", folders[1], "holds no audio files"),
    ):
        with pytest.raises(EarVAEError, match=message):
            find_pairs(target, estimate)


def test_a_failing_file_does_not_stop_the_rest_and_is_done_again(
    tmp_path: Path,
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, rebuilt = folders
    good = (rebuilt / "b.wav").read_bytes()
    (rebuilt / "b.wav").write_text("not audio")
    write(original / "lonely.wav", music())
    write(rebuilt / "stray.wav", music())
    out = tmp_path / "out.json"
    assert evaluate(original, rebuilt, "--json", out, "--jobs", 1) == 1
    errors = capsys.readouterr().err
    assert "ear-vae: lonely (rebuilt): has no estimate" in errors
    assert "without target: " in errors
    assert "stray.wav" in errors
    assert sum(line.startswith("ear-vae: b (rebuilt): ") for line in errors.splitlines()) == 1
    assert "2 of 4 comparisons failed" in errors
    report = read(out)
    assert [row["name"] for row in report["files"]] == ["a", "sub/c ü"]
    assert [failure["name"] for failure in report["failed"]] == ["b", "lonely"]

    (rebuilt / "b.wav").write_bytes(good)
    (original / "lonely.wav").unlink()
    done = []
    compare = runner.compare_files
    monkeypatch.setattr(
        runner, "compare_files", lambda pair, **options: done.append(pair.name) or compare(pair, **options)
    )
    partial = tmp_path / "out.json.partial.jsonl"
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    assert evaluate(original, rebuilt, "--json", out, "--jobs", 1) == 0
    assert done == ["b"]
    assert "2 comparisons were there from an earlier run" in capsys.readouterr().err
    assert [row["name"] for row in read(out)["files"]] == ["a", "b", "sub/c ü"]
    assert not partial.exists()


def test_what_has_changed_is_not_reused(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [runner.Task(pair, "x") for pair in find_pairs(*folders).pairs]
    partial = tmp_path / "partial.jsonl"
    assert runner.run_tasks(tasks, partial=partial, jobs=1).reused == 0
    assert runner.run_tasks(tasks, partial=partial, jobs=1).reused == 3
    write(folders[1] / "a.wav", music(seed=5))
    again = runner.run_tasks(tasks, partial=partial, jobs=1)
    assert again.reused == 2
    assert again.rows[0]["si_sdr_db"] < 0
    aligned = [runner.Task(task.pair, "x", align=True) for task in tasks]
    assert runner.run_tasks(aligned, partial=partial, jobs=1).reused == 0


def test_processes_give_what_one_process_gives(folders: tuple[Path, Path]) -> None:
    (folders[1] / "b.wav").write_text("not audio")
    tasks = [runner.Task(pair, "x") for pair in find_pairs(*folders).pairs]
    alone, together = (runner.run_tasks(tasks, jobs=jobs) for jobs in (1, 2))
    assert together.failures == alone.failures
    assert len(together.rows) == 2
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        assert ours["name"] == theirs["name"]
        assert {n: ours[n] for n in METRICS} == pytest.approx({n: theirs[n] for n in METRICS}, abs=1e-6)


def test_lengths_rates_and_channels_are_said(tmp_path: Path) -> None:
    audio = music(2)
    target = write(tmp_path / "target.wav", audio)
    longer = write(tmp_path / "longer.wav", torch.cat((audio, music(0.5, seed=3)), dim=1))
    row = one(tmp_path, target, longer)
    assert row["notes"] == ["the estimate lasts 2.50 s, the target 2.00 s; cut to the shorter"]
    assert row["si_sdr_db"] > 100
    assert (row["seconds"], row["estimate_seconds"]) == (2.0, 2.5)
    other = write(tmp_path / "other.wav", resample(audio, RATE, 48_000), 48_000)
    row = one(tmp_path, target, other)
    assert row["notes"] == ["the estimate is at 48000 Hz, the target at 44100 Hz"]
    assert row["si_sdr_db"] > 40
    mono = write(tmp_path / "mono.wav", audio[:1])
    row = one(tmp_path, target, mono)
    assert row["notes"] == ["the estimate is mono and was duplicated"]
    # Left is perfect, right is something else.
    assert row["icpc"] == pytest.approx(0.5, abs=0.1)
    row = one(tmp_path, mono, mono)
    assert row["ccpc"] is None
    assert row["notes"] == ["ccpc: needs two channels"]
    assert row["channels"] == 1


@pytest.mark.parametrize("rate", [RATE, 48_000])
@pytest.mark.parametrize("late", [2205, -441])
def test_delays_are_found_said_and_taken_out(tmp_path: Path, late: int, rate: int) -> None:
    audio = music(2)
    target = write(tmp_path / "target.wav", audio[:, 4410:-4410])
    moved = audio[:, 4410 - late : audio.shape[1] - 4410 - late]
    estimate = write(tmp_path / "estimate.wav", -0.5 * resample(moved, RATE, rate), rate)
    found = one(tmp_path, target, estimate)
    assert found["si_sdr_db"] < 0
    assert found["delay_ms"] == pytest.approx(1000 * late / RATE, abs=0.03)
    word = "late" if late > 0 else "early"
    assert f"seems {1000 * abs(late) / RATE:.2f} ms {word}; alignment takes that out" in found["notes"][-1]
    aligned = one(tmp_path, target, estimate, "--align")
    assert f"a delay of {1000 * late / RATE:.2f} ms was taken out" in aligned["notes"]
    # At another rate the delay falls between two samples.
    assert aligned["si_sdr_db"] > (90 if rate == RATE else 12)
    assert one(tmp_path, target, target, "--align")["notes"] == []


def test_no_delay_is_said_of_other_music(tmp_path: Path) -> None:
    target = write(tmp_path / "target.wav", music(2))
    found = one(tmp_path, target, write(tmp_path / "estimate.wav", music(2, seed=1)))
    assert found["si_sdr_db"] < -20
    assert found["delay_ms"] == 0
    assert found["notes"] == []


def test_silence_and_short_files_have_no_figure_and_are_named(
    tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, rebuilt = folders
    write(original / "a.wav", torch.zeros(2, RATE))
    for folder in folders:
        write(folder / "b.wav", music(0.04))
    out = tmp_path / "out.json"
    assert evaluate(original, rebuilt, "--json", out) == 0
    report = read(out)
    silent, short, _ = report["files"]
    assert silent["si_sdr_db"] is None
    assert "si_sdr_db is undefined: the target is silent or constant" in silent["notes"]
    assert silent["lufs_target"] is None
    assert "mel_distance is undefined: the target is silent" in silent["notes"]
    assert short["mel_distance"] is None
    notes = [
        "mel_distance, stft_distance, icpc, ccpc: needs 46 ms of audio",
        "loudness_distance_lu, loudness_range_distance_lu: needs 0.4 s of audio",
    ]
    assert short["notes"] == notes
    assert short["si_sdr_db"] > 80
    summary = report["summary"]
    assert summary["si_sdr_db"]["undefined"] == ["a"]
    assert summary["mel_distance"]["undefined"] == ["a", "b"]
    assert summary["mel_distance"]["count"] == 1
    printed = capsys.readouterr()
    assert "without si_sdr_db: a" in printed.out
    assert f"b (rebuilt): {'; '.join(notes)}\n" in printed.err


def test_many_files_do_not_flood_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("original", "rebuilt"):
        for index in range(9):
            write(tmp_path / folder / f"{index}.wav", music(0.04))
    for index in range(7):
        write(tmp_path / "rebuilt" / f"more{index}.wav", music(0.04))
    assert evaluate(tmp_path / "original", tmp_path / "rebuilt", "--jobs", 1) == 0
    printed = capsys.readouterr()
    assert "without icpc: 0, 1, 2, 3, 4 and 4 more\n" in printed.out
    assert re.search(r"without target: (\S+more\d.wav, ){4}\S+ and 2 more\n", printed.err)
    assert len(printed.err.splitlines()) == 1 + 9


def test_nan_fails_its_file(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    write(folders[1] / "a.wav", torch.full((2, RATE), math.nan))
    assert evaluate(*folders, "--json", tmp_path / "out.json") == 1
    (failure,) = read(tmp_path / "out.json")["failed"]
    assert failure["name"] == "a"
    assert "NaN" in failure["error"]


def test_models_make_the_estimates(
    tmp_path: Path, folders: tuple[Path, Path], small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = folders[0]
    write(original / "b.wav", resample(music(channels=1), RATE, 48_000), 48_000)
    copy = tmp_path / "copy"
    shutil.copytree(small_model, copy)
    out = tmp_path / "out.json"
    assert evaluate(original, "--model", small_model, "--model", copy, "--json", out) == 0
    report = read(out)
    assert "summary" not in report
    assert list(report["summaries"]) == [str(small_model), str(copy)]
    assert len(report["files"]) == 6
    target = torch.from_numpy(soundfile.read(original / "b.wav", dtype="float32")[0][None].copy())
    estimate = EarVAE.from_pretrained(small_model).reconstruct(target, sample_rate=48_000)
    expected = measure(estimate, target, sample_rate=48_000, names=("mel_distance", "si_sdr_db"))
    row = report["files"][1]
    assert (row["name"], row["system"], row["channels"]) == ("b", str(small_model), 1)
    for name in ("mel_distance", "si_sdr_db"):
        assert row[name] == pytest.approx(float(expected[name]), abs=1e-3)
    assert str(copy) in capsys.readouterr().out.splitlines()


class HalfRate:
    """A mono system at 22.05 kHz that returns half of what it is given, and fails on loud audio."""

    name, identity, sample_rate, channels = "half", "1", 22_050, 1

    def reconstruct(self, audio: torch.Tensor) -> torch.Tensor:
        assert audio.shape[0] == 1
        if audio.abs().max() > 0.9:
            raise RuntimeError("too loud")
        return 0.5 * audio[:, :-7]


def test_other_systems(tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    audio = music()
    rebuilt = rebuild(HalfRate(), audio, RATE)
    assert rebuilt.shape == audio.shape
    torch.testing.assert_close(rebuilt[:, 1000:-1000], 0.5 * audio[:, 1000:-1000], atol=1e-4, rtol=0)
    monkeypatch.setattr(loading, "load_codec", lambda name, device: HalfRate() if name == "half" else None)
    write(folders[0] / "loud.wav", torch.ones(2, RATE))
    out = tmp_path / "out.json"
    assert evaluate(folders[0], "--model", "half", "--json", out) == 1
    report = read(out)
    assert [row["name"] for row in report["files"]] == ["a", "b", "sub/c ü"]
    assert all(row["si_sdr_db"] > 20 for row in report["files"])
    (failure,) = report["failed"]
    assert failure["name"] == "loud"
    assert "too loud" in failure["error"]


def test_systems_that_return_nonsense() -> None:
    for result, message in ((torch.full((1, 100), math.nan), "NaN"), (torch.zeros(100), "returned shape")):
        system = HalfRate()
        system.reconstruct = lambda audio, result=result: result  # type: ignore[method-assign]
        with pytest.raises(EarVAEError, match=message):
            rebuild(system, music(channels=1), RATE)


def test_outputs_that_are_no_evaluation_stay(
    tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    precious = write(tmp_path / "precious.wav", music())
    before = precious.read_bytes()
    assert evaluate(*folders, "--json", precious) == 1
    assert "exists and is no evaluation" in capsys.readouterr().err
    assert precious.read_bytes() == before
    for output in ("out.json", "out.csv"):
        option = f"--{output.split('.')[1]}"
        assert evaluate(*folders, option, tmp_path / output) == 0
        assert evaluate(*folders, option, tmp_path / output) == 0
    # An evaluation of other files, and one that another program has damaged, stay as well.
    for output in ("out.json", "out.csv"):
        option, path = f"--{output.split('.')[1]}", tmp_path / output
        before = path.read_bytes()
        write(folders[0] / "other.wav", music())
        pair = folders[0] / "other.wav", folders[0] / "b.wav"
        assert evaluate(*pair, option, path) == 1
        message = (
            "holds an evaluation of something else ('a' by 'rebuilt'); choose another name, or overwrite it"
        )
        assert message in capsys.readouterr().err
        assert path.read_bytes() == before
        assert evaluate(*pair, option, path, "--force") == 0
        assert path.read_bytes() != before
    (tmp_path / "out.json").write_bytes((tmp_path / "out.json").read_bytes()[:200])
    assert evaluate(*folders, "--json", tmp_path / "out.json") == 1
    assert "out.json: exists and is a damaged evaluation" in capsys.readouterr().err
    assert evaluate(*folders, "--json", tmp_path / "absent" / "out.json") == 1
    assert "absent does not exist" in capsys.readouterr().err


def test_usage(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folders[0]) == 1
    assert "give either the folder of the estimates or at least one --model" in capsys.readouterr().err
    other = write(folders[1].parent / "other" / "z.wav", music(0.1)).parent
    assert evaluate(folders[0], other) == 1
    assert "how they are named (--pattern)" in capsys.readouterr().err
    assert evaluate(folders[0], "--model", "x", "--model", "x") == 1
    assert "given twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(*folders, "--jobs", "0")


def test_quiet_and_the_bar(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*folders, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert evaluate(*folders, "--progress") == 0
    # Drawn at the start; when it is drawn again is up to the clock.
    assert "0/3" in capsys.readouterr().err


def test_importing_evaluation_is_light() -> None:
    code = "import sys, ear_vae.evaluation; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
