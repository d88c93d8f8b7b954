"""`ear-vae evaluate` and `report` as processes, and the Python functions that do the same."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEError
from ear_vae.cli import main
from ear_vae.evaluation import Progress, evaluate, measure, write_listening_report

RATE = 44_100


def write(path: Path, seconds: float = 1.0, seed: int = 0, level: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    audio = level * torch.randn(2, int(seconds * RATE), generator=generator)
    soundfile.write(path, audio.T.numpy(), RATE, "PCM_16")
    return path


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ear_vae", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Run:
    """`command` in this process, without the seconds that one of its own takes to start."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as left:  # after --help
            code = int(left.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three originals and unrelated noise of the same names."""
    for index in range(3):
        write(tmp_path / "music" / f"{index}.wav", seed=index)
        write(tmp_path / "rebuilt" / f"{index}.wav", seed=10 + index)
    return tmp_path / "music", tmp_path / "rebuilt"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_one_pair_has_values_and_three_no_worst_among_them(folders: tuple[Path, Path], here: Run) -> None:
    one = here("evaluate", folders[0] / "1.wav", folders[1] / "1.wav").stdout
    three = here("evaluate", "--jobs", 1, *folders).stdout
    for folder in folders:
        (folder / "3.wav").write_bytes((folders[0] / "1.wav").read_bytes())
    four = here("evaluate", "--jobs", 1, *folders).stdout
    for word in ("std", "mean ", "median"):
        assert word not in one
        assert word in three
        assert word in four
    assert "worst" not in one + three
    assert "worst 3" in four.splitlines()[1]
    # Equal to its original, it is not among the worst three.
    (line,) = (line for line in four.splitlines() if line.startswith("si_sdr_db"))
    assert sorted(name.strip(",") for name in line.split()[-3:]) == ["0", "1", "2"]
    pair = [torch.from_numpy(soundfile.read(f / "1.wav", dtype="float32")[0].T.copy()) for f in folders[::-1]]
    expected = float(measure(*pair, sample_rate=RATE)["si_sdr_db"])
    (line,) = (line for line in one.splitlines() if line.startswith("si_sdr_db"))
    assert line.split() == ["si_sdr_db", f"{expected:.2f}"]


def test_the_function_gives_what_the_command_writes_and_prints_nothing(
    folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "1.wav").write_text("not audio")
    write(folders[0] / "lonely.wav")
    stray = write(folders[1] / "stray.wav")
    by_command, by_function = tmp_path / "command.json", tmp_path / "function.json"
    finished = command(
        "evaluate", *folders, "--json", by_command, "--csv", tmp_path / "command.csv", "--align"
    )
    assert finished.returncode == 1
    states: list[Progress] = []
    capfd.readouterr()
    found = evaluate(
        folders[0],
        str(folders[1]),
        align=True,
        json=by_function,
        csv=tmp_path / "function.csv",
        jobs=1,
        progress=states.append,
    )
    assert capfd.readouterr() == ("", "")
    assert by_function.read_bytes() == by_command.read_bytes()
    assert (tmp_path / "function.csv").read_bytes() == (tmp_path / "command.csv").read_bytes()
    assert found.as_dict() == read(by_function)
    assert found.summaries["rebuilt"] == read(by_function)["summary"]
    assert [row["name"] for row in found.rows] == ["0", "2"]
    assert {failure["name"] for failure in found.failures} == {"1", "lonely"}
    assert found.without_target == (stray,)
    assert [(state.done, state.total) for state in states] == [(done, 4) for done in range(5)]
    assert sorted(state.name for state in states[1:]) == ["0", "1", "2", "lonely"]
    assert {state.name for state in states[1:] if state.error} == {"1", "lonely"}
    assert {state.name for state in states[1:] if state.row} == {"0", "2"}
    with pytest.raises(EarVAEError, match=r"1\.wav"):
        evaluate(*folders, jobs=1, raise_failures=True)


def test_the_example_in_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(document), "exec"), {})
    assert read(tmp_path / "noisy.json")["files"][0]["si_sdr_db"] == pytest.approx(20, abs=0.1)
    assert "si_sdr_db" in capsys.readouterr().out
    assert data_of(tmp_path / "noisy.html")["systems"] == ["Original", "noisy"]


def test_the_function_goes_on_where_the_command_was_interrupted(
    folders: tuple[Path, Path], tmp_path: Path, here: Run
) -> None:
    out = tmp_path / "out.json"
    good = (folders[1] / "1.wav").read_bytes()
    (folders[1] / "1.wav").write_text("not audio")
    failed = here("evaluate", "--jobs", 1, *folders, "--json", out)
    assert failed.returncode == 1
    (kept,) = tmp_path.glob("*.partial*")
    assert f"finished comparisons are kept in {kept}, from which the same command goes on" in failed.stderr
    assert "OUT.json.partial.jsonl" in here("evaluate", "--help").stdout
    (folders[1] / "1.wav").write_bytes(good)
    assert evaluate(*folders, jobs=1).reused == 0
    found = evaluate(*folders, json=out, jobs=1)
    assert found.reused == 2
    assert found.failures == []
    assert [row["name"] for row in read(out)["files"]] == ["0", "1", "2"]
    assert not list(tmp_path.glob("*.partial*"))


class Half:
    """A system that halves what it is given."""

    name, identity, sample_rate, channels = "half", "1", RATE, 2

    def reconstruct(self, audio: torch.Tensor) -> torch.Tensor:
        return audio / 2


def test_models_may_be_objects(folders: tuple[Path, Path], tmp_path: Path, small_model: Path) -> None:
    vae = EarVAE.from_pretrained(small_model)
    target = folders[0] / "0.wav"
    found = evaluate(target, models=[vae, Half()])
    assert [row["system"] for row in found.rows] == [vae.name, "half"]
    by_name = evaluate(target, models=[str(small_model)])
    assert found.rows[0]["mel_distance"] == pytest.approx(by_name.rows[0]["mel_distance"])
    assert found.rows[1]["loudness_distance_lu"] == pytest.approx(6.02, abs=0.01)
    report = write_listening_report(tmp_path / "page.html", target, models=[Half()], seconds=0.5, excerpts=1)
    assert data_of(report.path)["excerpts"][0]["signals"][1]["gainDb"] == pytest.approx(6.02, abs=0.02)
    for models, message in (([vae, vae], "same name"), (["x", "x"], "given twice"), ([], "give either")):
        with pytest.raises(EarVAEError, match=message):
            evaluate(target, models=models)
    with pytest.raises(EarVAEError, match="device"):
        evaluate(target, models=[str(small_model)], device="toaster")


def test_the_function_writes_the_page_of_the_command(
    folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out.html", tmp_path / "other.html"
    (folders[1] / "0.wav").unlink()
    options = ("--system", f"Ours={folders[1]}", "--excerpts", 3, "--seconds", 0.6)
    finished = command("report", out, folders[0], *options)
    assert finished.returncode == 0, finished.stderr
    assert "the originals hold 2 excerpts of 0.6 s, not 3" in finished.stderr
    capfd.readouterr()
    report = write_listening_report(other, folders[0], systems={"Ours": folders[1]}, excerpts=3, seconds=0.6)
    assert capfd.readouterr() == ("", "")
    assert other.read_bytes() == out.read_bytes()
    assert (report.path, report.excerpts, report.failures) == (other, 2, [])
    assert report.seconds == pytest.approx(0.6)
    assert report.num_bytes == len(other.read_bytes())
    assert report.notes == ["the originals hold 2 excerpts of 0.6 s, not 3"]
    assert data_of(other)["title"] == "Ours beside the originals of music"
    with pytest.raises(EarVAEError, match=r"other.html: exists already.*overwrite=True"):
        write_listening_report(other, folders[0], systems={"Ours": folders[1]})
    for arguments, message in (
        ({}, "give the originals"),
        ({"targets": folders[0]}, "at least one system"),
        ({"targets": folders[0], "evaluations": ["x.json"]}, "give no originals"),
    ):
        with pytest.raises(EarVAEError, match=message):
            write_listening_report(tmp_path / "new.html", **arguments)


@pytest.mark.slow
def test_a_page_is_small_unless_asked_otherwise_and_counts_one_excerpt(tmp_path: Path) -> None:
    """Noise compresses worst: three signals of 50 s are some 30 MB."""
    for name, seed in (("music", 0), ("one", 1), ("two", 2)):
        write(tmp_path / name / "song.wav", 50, seed)
    out = tmp_path / "out.html"
    systems = ("--system", tmp_path / "one", "--system", tmp_path / "two")
    finished = command("report", out, tmp_path / "music", *systems)
    assert finished.returncode == 0, finished.stderr
    assert 8e6 < out.stat().st_size < 10e6
    assert re.search(r"excerpts were shortened to \d\.\d s to keep the page below 10 MB", finished.stderr)
    # Nobody asked for that many.
    assert "the originals hold" not in finished.stderr
    more = ("--seconds", 30, "--megabytes", 3, "--force", "--excerpts", 4)
    finished = command("report", out, tmp_path / "music", *systems, *more)
    assert "the originals hold 1 excerpt of 30 s, not 4" in finished.stderr
    assert f"{out}: 1 excerpt of up to " in finished.stderr


def test_the_obvious_is_understood(folders: tuple[Path, Path], tmp_path: Path, here: Run) -> None:
    """A page without an extension; systems without names: a folder with an equals sign, and a file."""
    pair = [folder / "0.wav" for folder in folders]
    named = folders[1].with_name("a=b")
    folders[1].rename(named)
    for original, system, name in (
        (folders[0], named, "a=b"),
        (pair[0], named / "0.wav", "0"),
        (pair[0], f"x={named / '0.wav'}", "x"),
    ):
        page = tmp_path / f"page {name}"
        options = ("--system", system, "--seconds", 0.5)
        finished = here("report", page, original, *options)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.startswith(f"{page}.html: ")
        assert data_of(Path(f"{page}.html"))["systems"] == ["Original", name]
        assert not page.exists()


def test_no_name_gets_out_of_the_page(tmp_path: Path, here: Run) -> None:
    hostile = "a\"b'c\n<script>alert(1)<"
    music = tmp_path / hostile
    # With the slash a name ends a script, as far as HTML is concerned.
    song = music / "x</script><script>alert(2)</script>&quot;\n{{audio}}.wav"
    write(song)
    write(tmp_path / "rebuilt" / song.relative_to(music), seed=1)
    out = tmp_path / "out.html"
    system = "</script><img src onerror>\n\"--'\u2028"
    options = ("--system", f"{system}={tmp_path / 'rebuilt'}", "--seconds", 0.5, "--excerpts", 1)
    finished = here("report", out, music, *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("\n") == 1
    text = out.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 4  # data, two signals, the script
    assert "<img" not in text
    data = data_of(out)
    assert data["systems"] == ["Original", system]
    assert data["excerpts"][0]["name"] == song.relative_to(music).with_suffix("").as_posix()
    assert data["title"] == f"{system} beside the originals of {hostile}"
    assert f"<title>{html.escape(data['title'])}" in text
    assert f'<h1 id="title">{html.escape(data["title"])}' in text


@pytest.mark.slow
def test_a_command_never_names_an_argument_of_python(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = [tmp_path / f"there.{extension}" for extension in ("html", "safetensors", "pyt")]
    for file in files:
        file.write_text("precious")
    page, latents, official = files
    music, rebuilt = folders
    for arguments in (
        ("evaluate", *folders, "--json", page),
        ("report", page, music, "--system", rebuilt),
        ("encode", music / "0.wav", latents),
        ("convert", "ear-vae-tiny", official),
    ):
        finished = command(*arguments)
        assert finished.returncode == 1
        assert "exists" in finished.stderr, arguments
        assert finished.stderr.rstrip().endswith(("overwrite it (--force)", "replace it with --force")), (
            arguments
        )
        assert "overwrite=" not in finished.stderr, arguments
        assert "=True" not in finished.stderr
    assert {file.read_text() for file in files} == {"precious"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 looks in the current folder first")
def test_what_lies_beside_the_music_does_not_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Not even in the processes that are started for several files at once."""
    (tmp_path / "pickle.py").write_text("open('has_run', 'w')\n")
    (tmp_path / "bin").mkdir()
    # As pip writes it; with `python -m` the current folder is looked in by request.
    script = tmp_path / "bin" / "ear-vae"
    script.write_text(
        "import sys\nfrom ear_vae.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    result = subprocess.run(
        [sys.executable, script, "evaluate", *folders, "--jobs", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "has_run").exists()
