"""The command line under bad conditions, as a real process: streams, signals, names, leftovers."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from ear_vae.cli import main

RATE = 44_100
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, links and file descriptors of POSIX")


def write(path: Path, seconds: float = 0.2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(path.name))
    soundfile.write(path, 0.1 * generator.standard_normal((int(seconds * RATE), 2)), RATE)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ear_vae", *map(str, arguments)]


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, **options}
    return subprocess.run(command(*arguments), check=False, **options)  # type: ignore[call-overload,no-any-return]


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`line` with "$@" as the command with these arguments."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *command(*arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def latent_file(path: Path, model_name: str, **tensors: torch.Tensor) -> Path:
    numbers = {"sample_rate": RATE, "downsampling_ratio": 1024, "num_samples": 10, "audio_channels": 2}
    numbers |= {"source_sample_rate": RATE, "source_num_samples": 10}
    metadata = {"format": "ear-vae-latents", "format_version": "1", "weights_sha256": "0" * 64}
    metadata |= {"model_name": model_name, "sampled": "false", **{k: str(v) for k, v in numbers.items()}}
    save_file(tensors or {"mean": torch.zeros(64, 1)}, path, metadata)
    return path


# What each gets: the exit code, and a part of its last line.
BAD_LINES = [
    ("", 2, "required: COMMAND"),
    ("nonsense", 2, "invalid choice: 'nonsense'"),
    ("--nonsense", 2, "required: COMMAND"),
    ("info", 2, "required: THING"),
    ("info wav --variant v", 2, "--variant is for models"),
    ("info wav --revision main", 2, "--revision is for models"),
    ("info wav --force-download", 2, "--force-download is for models"),
    ("info ear-vae-tiny --force-download", 2, "--force-download is for models on the Hub"),
    ("info missing.wav", 1, "missing.wav: no such file"),
    ("info junk.safetensors", 1, "not a readable latent file"),
    ("info float8", 1, "float8_e4m3fn"),
    ("info tensors.safetensors", 1, "not a latent file of ear-vae"),
    ("info loop", 1, "loop"),
    ("info empty", 1, "is empty"),
    ("reconstruct wav", 2, "required: OUT"),
    ("reconstruct wav out.wav extra", 2, "unrecognized arguments: extra"),
    ("reconstruct wav out.wav --dev cpu", 2, "unrecognized arguments: --dev"),
    ("reconstruct wav out.wav --device gpu", 1, "write cuda"),
    ("reconstruct wav out.wav --device cuda:99", 1, "is not available here"),
    ("reconstruct wav out.wav --device cuda:x", 1, "choose cpu, cuda, cuda:N or mps"),
    ("reconstruct wav out.wav --dtype float16", 2, "invalid choice: 'float16'"),
    ("reconstruct wav out.wav --peak loud", 2, "invalid choice: 'loud'"),
    ("reconstruct wav out.wav --model ear-vae-tiny --revision main", 1, "Hub repositories only"),
    ("reconstruct wav out.wav --variant x", 1, "holds one model and no variants"),
    ("reconstruct wav out.wav --force-download", 2, "--force-download is for models on the Hub"),
    ("reconstruct wav out.xyz", 1, "cannot write format 'xyz'"),
    ("reconstruct wav folder", 1, "is a folder; give a file"),
    ("reconstruct wav no/out.wav", 1, "does not exist"),
    ("reconstruct wav other --format wav", 1, "exists already"),
    ("reconstruct wav loop.wav", 1, "is a link that leads nowhere"),
    ("reconstruct wav loop.wav --force", 1, "is a link that leads nowhere"),
    ("reconstruct wav loop/out.wav", 1, "loop"),
    ("reconstruct wav /dev/full", 1, "is not an ordinary file"),
    ("reconstruct folder out", 1, "holds no files of a kind"),
    ("reconstruct folder -", 1, "is no folder"),
    ("reconstruct missing out.wav", 1, "no such file or folder"),
    ("reconstruct wav wav --force", 1, "is the input itself"),
    ("reconstruct wav link.wav --force", 1, "is the input itself"),
    ("reconstruct wav hard.wav --force", 1, "is the input itself"),
    ("reconstruct link.wav wav --force", 1, "is the input itself"),
    ("encode wav wav --force", 1, "is the input itself"),
    ("decode latents latents --force --format wav", 1, "is the input itself"),
    ("decode latents out.wav", 1, "choose its model with --model"),
    ("encode wav out.safetensors --seed 1", 2, "--seed is for --sample"),
    ("encode wav out.safetensors --sample --seed -1", 2, "is not an integer"),
    ("evaluate wav", 1, "give either the folder of the estimates or at least one --model"),
    ("evaluate wav other --device cpu", 2, "--device is for a --model"),
    ("evaluate wav other --variant x", 2, "--variant is for a --model"),
    ("evaluate wav other --force-download", 2, "--force-download is for a --model"),
    ("evaluate wav other --pattern {name}_x", 2, "--pattern is for folders"),
    ("evaluate wav other --force", 2, "--force is for --json and --csv"),
    ("evaluate wav --model dac --variant x", 2, "--variant is for a --model of εar-VAE"),
    ("evaluate wav --model ear-vae-tiny --jobs 2", 2, "--jobs is for files that are there"),
    ("evaluate wav --model ear-vae-tiny --pattern {name}", 2, "--pattern is for a folder of estimates"),
    ("evaluate wav --model ear-vae-tiny --force-download", 2, "for models on the Hub"),
    ("evaluate wav other --json wav --force", 1, "is a file to be measured"),
    ("evaluate wav other --csv link.wav --force", 1, "is a file to be measured"),
    ("evaluate wav other --json o.json --csv o.json", 1, "would write the same file"),
    ("report o.html", 1, "give the folder of the originals"),
    ("report o.html wav --system other --device cpu", 2, "--device is for a --model"),
    ("report o.html wav --model ear-vae-tiny --align", 2, "--align is for --system"),
    ("report o.html --from e.json --variant x", 2, "--variant is not for --from"),
    ("report o.html --from e.json --align", 2, "--align is not for --from"),
    ("report o.html --from e.json", 1, "cannot be read"),
    ("convert ear-vae-tiny", 2, "required: DESTINATION"),
    ("convert model model --force --dtype float16", 1, "would replace the model"),
    ("convert model model/model.safetensors --to official --force", 1, "would replace the model"),
    ("release junk.safetensors out", 1, "not a checkpoint"),
    ("fit --config nothing", 1, "no config 'nothing'"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write(folder / "wav.wav").rename(folder / "wav")
    write(folder / "other.wav").rename(folder / "other")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "junk.safetensors").write_bytes(b"x")
    latent_file(folder / "latents.safetensors", "somebody's")
    latent_file(folder / "float8.safetensors", "x", mean=torch.zeros(64, 1).to(torch.float8_e4m3fn))
    save_file({"x": torch.zeros(4)}, folder / "tensors.safetensors")
    for name in ("latents", "float8"):
        (folder / f"{name}.safetensors").rename(folder / name)
    (folder / "model").symlink_to(small_model)
    (folder / "link.wav").symlink_to("wav")
    (folder / "hard.wav").hardlink_to(folder / "wav")
    for name in ("loop", "loop.wav"):
        (folder / name).symlink_to(name)
    return folder


@POSIX
@pytest.mark.parametrize(("line", "code", "message"), BAD_LINES, ids=[line for line, _, _ in BAD_LINES])
def test_bad_lines(
    workplace: Path,
    line: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    before = {path: path.read_bytes() for path in workplace.iterdir() if path.is_file()}
    try:
        found: object = main(line.split())
    except SystemExit as left:
        found = left.code
    printed = capfd.readouterr()
    assert found == code, printed.err
    lines = printed.err.splitlines()
    assert message in lines[-1]
    # Before the line itself usage errors show how it is done.
    assert [text.startswith("ear-vae") for text in lines if not text.startswith(("usage:", " "))] == [True]
    assert printed.out == ""
    assert before == {path: path.read_bytes() for path in workplace.iterdir() if path.is_file()}


@POSIX
def test_all_of_the_output_goes_through_a_pipe_without_a_buffer(tmp_path: Path, small_model: Path) -> None:
    """The writer's end is made small and non-blocking, so that a single call can take a part only."""
    source = write(tmp_path / "a.wav", seconds=2)
    model = ["--model", small_model, "--quiet"]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    assert process("reconstruct", source, tmp_path / "b.wav", *model).returncode == 0
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    running = subprocess.Popen(command("reconstruct", source, "-", *model), stdout=writer, env=unbuffered)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    assert running.wait(timeout=100) == 0
    # The header has the time in it.
    assert len(received) == (tmp_path / "b.wav").stat().st_size
    assert np.array_equal(soundfile.read(io.BytesIO(received))[0], soundfile.read(tmp_path / "b.wav")[0])


@POSIX
@pytest.mark.parametrize(
    ("line", "arguments", "code", "message"),
    [
        ('"$@" >/dev/full', ("reconstruct", "wav", "-"), 1, "standard output: could not be written"),
        ('PYTHONUNBUFFERED=1 "$@" >/dev/full', ("encode", "wav", "-"), 1, "No space left on device"),
        ('"$@" >/dev/full', ("info", "wav"), 1, "No space left on device"),
        ('"$@" >/dev/full', ("info", "--help"), 1, "No space left on device"),
        ('"$@" >&-', ("info", "wav"), 1, "Bad file descriptor"),
        ('"$@" >&-', ("encode", "wav", "-"), 1, "standard output: could not be written: Bad file"),
        ('"$@" <&-', ("encode", "-", "x.safetensors"), 1, "standard input: Bad file descriptor"),
        ('"$@" >&- 2>&-; test $? = 1', ("info", "missing.wav"), 0, ""),
        ('"$@" 2>&-', ("info", "missing.wav"), 1, ""),
        ('"$@" >&- 2>&- <&-; cat y.safetensors >/dev/null', ("encode", "wav", "y.safetensors"), 0, ""),
        ('"$@" 2>/dev/full', ("encode", "wav", "z.safetensors"), 0, ""),
        ('PYTHONIOENCODING=ascii "$@" >/dev/null', ("--help",), 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(workplace)
    result = shell(line, *arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == bool(message), result.stderr


@POSIX
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_names_that_are_not_utf8_stop_nothing(tmp_path: Path, small_model: Path, locale: str) -> None:
    music = tmp_path / "in"
    write(music / "a.wav")
    strange = os.fsencode(music) + b"/caf\xe9\n\x1b[31m.wav"
    (music / "z.wav").write_text("not audio")
    os.rename(music / "z.wav", strange)
    write(music / "ü.wav")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONIOENCODING": "ascii"}
    arguments = ["encode", music, tmp_path / "out", "--model", small_model]
    result = process(*arguments, "--progress", env=environment)
    assert result.returncode == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "ü.safetensors"]
    errors = result.stderr.decode("ascii")
    assert "\x1b[31m" not in errors
    assert r"caf\xe9\n\x1b[31m.wav: " in errors
    assert "1 of 3 files failed" in errors
    assert "Unicode" not in errors.replace("UnicodeEncodeError", "")


@POSIX
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become another user"
)
def test_a_folder_that_cannot_be_entered_is_reported(workplace: Path) -> None:
    """In a place that the other user may reach."""
    import shutil
    import tempfile

    script = (
        "import os, sys\nfrom ear_vae.audio.folders import find_files\n"
        "from ear_vae.cli.jobs import make_plan, run_jobs\n"
        "os.setuid(65534)\n"
        "what = make_plan(sys.argv[1], sys.argv[2], find=lambda f: find_files(f, {'.wav'}), extension='x',"
        " overwrite=False)\n"
        "print([job.relative for job in what.jobs])\n"
        "sys.exit(run_jobs(what, lambda: None, lambda shared, job: 1.0, quiet=True, debug=False))"
    )
    place = Path(tempfile.mkdtemp(prefix="ear-vae-test-"))
    try:
        place.chmod(0o777)
        for name in ("in/a.wav", "in/closed/b.wav", "in/open/c.wav"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"1")
        (place / "in" / "gone.wav").symlink_to("nowhere.wav")
        (place / "in" / "closed").chmod(0)
        result = subprocess.run(
            [sys.executable, "-c", script, place / "in", place / "out"],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(place)
    assert result.stdout.strip() == "['a.wav', 'open/c.wav']", result.stderr
    assert result.returncode == 1
    assert "closed: Permission denied" in result.stderr
    assert "gone.wav: No such file or directory" in result.stderr


def test_control_characters_in_names_are_shown_not_sent(tmp_path: Path) -> None:
    name = "x\x1b[31m\ny" + "z" * 5000
    path = latent_file(tmp_path / "a.safetensors", name)
    shown = process("info", path)
    assert shown.returncode == 0
    (line,) = (line for line in shown.stdout.decode().splitlines() if line.startswith("model_name"))
    assert r"x\x1b[31m\ny" in line
    assert "…" in line
    assert len(line) < 200
    assert json.loads(process("info", path, "--json").stdout)["model_name"] == name
    refused = process("decode", path, tmp_path / "b.wav").stderr.decode()
    assert len(refused.splitlines()) == 1
    assert r"made by x\x1b[31m\ny" in refused
    assert len(refused) < 600


def waiting(path: Path) -> list[Path]:
    return list(path.glob(".ear-vae-*"))


def at_work(source: Path, target: Path, model: Path, **options: object) -> subprocess.Popen[bytes]:
    """A process that has begun to write `target` and needs long for it."""
    line = command("reconstruct", source, target, "--model", model)
    running = subprocess.Popen(line, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
    deadline = time.monotonic() + 120
    while not any(list(folder.glob("new*")) for folder in waiting(target.parent)):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return running  # type: ignore[no-any-return]


@POSIX
def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_is_not(
    tmp_path: Path, small_model: Path
) -> None:
    source, short = write(tmp_path / "in.wav", seconds=120), write(tmp_path / "short.wav")
    out = tmp_path / "out"
    out.mkdir()
    running = at_work(source, out / "a.wav", small_model)
    try:
        running.send_signal(signal.SIGSTOP)
        (mine,) = waiting(out)
        assert process("reconstruct", short, out / "b.wav", "--model", small_model).returncode == 0
        assert waiting(out) == [mine]
    finally:
        running.kill()
        running.communicate()
    assert waiting(out) == [mine]
    (out / ".ear-vae-notes").mkdir()
    (out / ".ear-vae-notes" / "mine.txt").touch()
    assert process("reconstruct", short, out / "c.wav", "--model", small_model).returncode == 0
    assert sorted(os.listdir(out)) == [".ear-vae-notes", "b.wav", "c.wav"]


@POSIX
def test_a_closed_terminal_ends_a_run_cleanly_unless_nohup(tmp_path: Path, small_model: Path) -> None:
    source = write(tmp_path / "in" / "a.wav", seconds=120)
    running = at_work(source, tmp_path / "b.wav", small_model)
    running.send_signal(signal.SIGHUP)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert errors.decode().strip() == "ear-vae: interrupted"
    assert sorted(os.listdir(tmp_path)) == ["in"]

    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    running = at_work(source, tmp_path / "b.wav", small_model, preexec_fn=ignore)
    running.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert running.poll() in (None, 0)
    running.terminate()
    running.communicate()


@pytest.mark.slow
@POSIX
def test_a_folder_job_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    tmp_path: Path, small_model: Path
) -> None:
    music = tmp_path / "in"
    for index in range(300):
        path = write(music / f"{index % 7}" / f"{index:03}.wav")
        if index % 10 == 3:
            path.write_bytes(path.read_bytes()[: 20 + index])
    options = ("--model", small_model, "--quiet")
    undisturbed = process("encode", music, tmp_path / "one", *options)
    assert undisturbed.returncode == 1
    assert b"30 of 300 files failed" in undisturbed.stderr
    moments = random.Random(0)
    for _ in range(3):
        done = len(list((tmp_path / "two").rglob("*.safetensors")))
        running = subprocess.Popen(
            command("encode", music, tmp_path / "two", *options), stderr=subprocess.DEVNULL
        )
        wanted = done + moments.randrange(5, 60)
        while len(list((tmp_path / "two").rglob("*.safetensors"))) < wanted:
            assert running.poll() is None
            time.sleep(moments.uniform(0, 0.01))
        running.kill()
        running.wait()
    assert process("encode", music, tmp_path / "two", *options).returncode == 1
    results = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert len(results[0]) == 270
    assert results[0] == results[1]


def test_env_says_what_does_not_fit_and_the_cure(tmp_path: Path) -> None:
    """Torch's own answers, and a path on which there is no ffmpeg."""
    result = process("env", "--json", env={**os.environ, "PATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["torch"].startswith(torch.__version__)
    assert len(found["devices"]) >= 1 + torch.cuda.device_count()
    assert found["ffmpeg"] == "missing"
    assert any("ffmpeg is missing" in problem for problem in found["problems"])
    fits = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, check=False)
    assert ("does not fit" in found["torchaudio"]) == (fits.returncode != 0)
    assert any("torchaudio" in problem for problem in found["problems"]) == (fits.returncode != 0)
    shown = process("env").stdout.decode()
    assert all(name in shown for name in found)


def test_codecs_load_where_torchaudios_extension_does_not_fit(tmp_path: Path) -> None:
    """A stand-in for the library of DAC that imports torchaudio first, as the real one does."""
    (tmp_path / "transformers.py").write_text(
        "import torchaudio\nclass DacModel:\n"
        "    @classmethod\n    def from_pretrained(cls, *_, **__):\n"
        "        raise ValueError('as far as the weights')\n"
    )
    write(tmp_path / "a.wav")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    result = process("evaluate", tmp_path / "a.wav", "--model", "dac", env=environment)
    assert result.stderr.decode().strip().endswith("as far as the weights")
