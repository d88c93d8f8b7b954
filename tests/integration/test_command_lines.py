"""The command line under bad conditions, as a real process: streams, signals, names, leftovers."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from ear_vae._atomic import atomic_path
from ear_vae.cli import main
from ear_vae.cli.env import facts
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import QUANTITIES
from ear_vae.evaluation.metrics import METRICS
from ear_vae.limits import pack_facts

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

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
    facts = {"format": "ear-vae-latents", "format_version": 1, "weights_sha256": "0" * 64, **numbers}
    metadata = pack_facts({**facts, "model_name": model_name, "sampled": False})
    save_file(tensors or {"mean": torch.zeros(64, 1)}, path, metadata)
    return path


# Forks for every line that it is sent, so that each runs `python -m ear_vae` as a process of its own without
# the seconds that torch takes to load.
SERVER = """
import gc, json, os, runpy, sys
import ear_vae.cli.reconstruct, ear_vae.cli.info, ear_vae.cli.encode, ear_vae.cli.decode, ear_vae.cli.convert
for name in [name for name in sys.modules if name == "ear_vae.__main__"]:
    del sys.modules[name]
# Of what is here before the fork the garbage collector of a child would copy every page.
gc.collect()
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(order["folder"])
        for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(order[name], flags, 0o600), descriptor)
        sys.argv = ["ear-vae", *order["arguments"]]
        runpy.run_module("ear_vae", run_name="__main__")
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Commands:
    """Runs command lines one after the other, each as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[object], folder: Path, stdin: str = os.devnull) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `ear-vae ARGUMENTS` in a folder."""
        out, err = self._folder / "out", self._folder / "err"
        order = {"arguments": list(map(str, arguments)), "folder": str(folder)}
        order |= {"stdin": stdin, "stdout": str(out), "stderr": str(err)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return code, out.read_text(errors="surrogateescape"), err.read_text(errors="surrogateescape")

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    server = Commands(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


# What each gets: the exit code, and a part of its last line.
BAD_LINES = [
    ("", 2, "give a command; ear-vae --help lists them"),
    ("nonsense", 2, "there is no command 'nonsense'; choose one of reconstruct, encode"),
    ("recontruct wav", 2, "there is no command 'recontruct'; did you mean reconstruct?"),
    ("Decode wav", 2, "did you mean decode?"),
    ("song.mp3", 2, "to rebuild it: ear-vae reconstruct song.mp3"),
    ("song.safetensors", 2, "to decode it: ear-vae decode song.safetensors OUTPUT.wav"),
    ("folder", 2, "to rebuild it: ear-vae reconstruct folder"),
    ("model", 2, "to describe it: ear-vae info model"),
    ("--nonsense", 2, "give a command first, and --nonsense after it"),
    ("info", 2, "required: MODEL_OR_FILE"),
    ("info wav --variant v", 2, "--variant is for models"),
    ("info wav --revision main", 2, "--revision is for models"),
    ("info wav --force-download", 2, "--force-download is for models"),
    ("info ear-vae-tiny --force-download", 2, "--force-download is for models on the Hub"),
    ("info missing.wav", 1, "missing.wav: no such file"),
    ("info junk.safetensors", 1, "not a readable latent file"),
    ("info float8", 1, "float8_e4m3fn"),
    ("info tensors.safetensors", 1, "has shape [4]; expected latents [D, N] or [1, D, N]"),
    ("info loop", 1, "loop"),
    ("info empty", 1, "is empty"),
    ("reconstruct -", 1, "standard input has no name for the output to take"),
    ("encode wav", 2, "required: OUTPUT"),
    ("encode wav out.npy", 1, "out.npy: latent files are in the safetensors format; call it out.safetensors"),
    ("encode wav out", 1, "call it out.safetensors"),
    ("reconstruct wav out", 1, "out: has no extension that tells the format; call it out.wav"),
    ("decode latents out", 1, "call it out.wav"),
    ("reconstruct wav out.flac --format mp3", 1, "is named .flac, but --format asks for mp3"),
    ("decode song.wav out.wav", 1, "song.wav: has the extension of audio, and decode takes latent files"),
    ("encode latents out.safetensors", 1, "latents: is a latent file; ear-vae decode turns it into audio"),
    ("reconstruct latents out.wav", 1, "latents: is a latent file; ear-vae decode turns it into audio"),
    ("reconstruct tensors.safetensors out.wav", 1, "is a .safetensors file, expected audio"),
    ("reconstruct album out.wav", 1, "album is a folder, and so its output must be one, such as out"),
    ("decode album out", 1, "album: holds no latent files (.safetensors, .npy, .npz, .pt)"),
    ("convert model old", 1, "old: exists already; remove it, or overwrite it (--force)"),
    ("convert model o --variant x", 1, "holds one model and no variants; leave it out (--variant x)"),
    ("convert model o.pyt --dtype float16", 1, "--dtype is for --to folder"),
    ("info ear_vae_44k --variant x", 1, "names a variant already; choose no other (--variant x)"),
    ("info several", 1, "several/config.json: holds several models; choose one of 'a', 'b' (--variant)"),
    (
        "reconstruct wav out.wav extra",
        2,
        "too many arguments, from 'extra' on; for several files give their folder",
    ),
    ("reconstruct wav out.wav --quiet extra", 2, "too many arguments, from 'extra' on"),
    ("reconstruct wav --quiet out.wav extra", 2, "too many arguments, from 'out.wav' on"),
    ("report o.html wav other", 2, "from 'other' on; rebuilt audio goes after --system"),
    ("info wav other", 2, "from 'other' on; give one at a time"),
    ("convert model o other", 2, "too many arguments, from 'other' on"),
    ("reconstruct wav out.wav --dev cpu", 2, "there is no option --dev; did you mean --device?"),
    ("reconstruct wav out.wav --zzz=1", 2, "there is no option --zzz; ear-vae reconstruct --help lists"),
    ("reconstruct wav out.wav --device gpu", 1, "write cuda"),
    ("reconstruct wav out.wav --device cuda:99", 1, "is not available here"),
    ("reconstruct wav out.wav --device cuda:x", 1, "choose cpu, cuda, cuda:N or mps"),
    ("reconstruct wav out.wav --dtype float16", 2, "invalid choice: 'float16'"),
    ("reconstruct wav out.wav --peak loud", 2, "invalid choice: 'loud'"),
    ("reconstruct wav out.wav --model ear-vae-tiny --revision main", 1, "leave it out (--revision main)"),
    ("reconstruct wav out.wav --variant x", 1, "holds one model and no variants"),
    ("reconstruct wav out.wav --force-download", 2, "--force-download is for models on the Hub"),
    ("reconstruct wav out.xyz", 1, "cannot write format 'xyz'"),
    ("reconstruct wav folder", 1, "is a folder; for one file name the file to write, such as folder/wav.wav"),
    ("reconstruct wav no/out.wav", 1, "does not exist"),
    ("reconstruct wav other --format wav", 1, "choose another name, or replace it with --force"),
    ("reconstruct wav loop.wav", 1, "is a link that leads nowhere"),
    ("reconstruct wav loop.wav --force", 1, "is a link that leads nowhere"),
    ("reconstruct wav loop/out.wav", 1, "loop"),
    ("reconstruct wav /dev/full", 1, "is not an ordinary file"),
    ("reconstruct wav to_song.wav --force", 1, "song.wav; name that file itself, or remove the link"),
    ("reconstruct wav out.aiff --subtype IMA_ADPCM", 1, "aiff cannot hold subtype 'IMA_ADPCM'"),
    ("reconstruct folder out", 1, "folder: holds no audio files"),
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
    ("evaluate wav wav --model ear-vae-tiny", 1, "at least one --model that makes them, not both"),
    ("evaluate wav other --device cpu", 2, "--device is for a --model"),
    ("evaluate wav other --variant x", 2, "--variant is for a --model"),
    ("evaluate wav other --force-download", 2, "--force-download is for a --model"),
    ("evaluate wav other --pattern {name}_x", 2, "--pattern is for folders"),
    ("evaluate wav other --force", 2, "--force is for --json and --csv"),
    ("evaluate wav --model dac --variant x", 2, "--variant is for a --model of εar-VAE"),
    ("evaluate wav --model ear-vae-tiny --jobs 2", 2, "--jobs is for a folder of estimates"),
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
    ("report o.html --from deep.json", 1, "is no evaluation"),
    ("report o.html --from forged.json", 1, "or hold something else; evaluate again"),
    ("report o.html --from target.json", 1, "is no evaluation"),
    ("report o.html --from pipe.json", 1, "is no ordinary file"),
    ("report pipe.json wav --system other --force", 1, "is a pipe or a device"),
    ("report wav o.html --system other --force", 1, "wav: the page comes first, then the originals"),
    ("report album --system other", 1, "the page comes first, then the originals"),
    ("report new.mp3 wav --system other", 1, "the page comes first, then the originals"),
    ("report song.html wav --system song.html --force", 1, "is shown or read by the page itself"),
    ("report o.html wav", 1, "rebuilt audio with --system NAME=FOLDER, or a model with --model NAME"),
    ("evaluate wav other --json pipe.json", 1, "is a pipe or a device"),
    ("evaluate wav other --csv pipe.json --force", 1, "is a pipe or a device"),
    ("convert model pipe.pyt --force", 1, "is a pipe or a device"),
    ("release odd.ckpt out", 1, "odd.ckpt: is not a checkpoint"),
    ("convert ear-vae-tiny", 2, "required: FOLDER_OR_FILE"),
    ("convert model model --force --dtype float16", 1, "would replace the model"),
    ("convert model model/model.safetensors --to official --force", 1, "would replace the model"),
    ("release junk.safetensors out", 1, "not a checkpoint"),
    ("fit --config nothing", 1, "no config 'nothing'"),
    (
        "fit --config warmup",
        1,
        "give the music to train on: --data.folder MUSIC; ear-vae fit --help lists the options",
    ),
    ("fit --data.seed 3", 1, "give the music to train on: --data.folder MUSIC; ear-vae"),
    ("fit --config smoke --data.foldr MUSIC", 1, "--data.folder MUSIC (you wrote --data.foldr); ear-vae"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write(folder / "wav.wav").rename(folder / "wav")
    write(folder / "other.wav").rename(folder / "other")
    write(folder / "other.wav").rename(folder / "song.html")
    write(folder / "song.wav")
    write(folder / "album" / "song.wav")
    (folder / "folder").mkdir()
    (folder / "old").mkdir()
    (folder / "old" / "notes.txt").touch()
    (folder / "empty").touch()
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "several").mkdir()
    (folder / "several" / "config.json").write_text('{"variants": {"a": {}, "b": {}}}')
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
    (folder / "to_song.wav").symlink_to("song.wav")
    for name in ("pipe.json", "pipe.pyt"):
        os.mkfifo(folder / name)
    (folder / "odd.ckpt").write_bytes(pickle.dumps({"weights": 1}, protocol=4))
    (folder / "deep.json").write_text("[" * 100_000)
    row = {"name": "wav", "system": "other", "notes": [], **dict.fromkeys((*METRICS, *QUANTITIES), 0.0)}
    rows = {"forged": {**row, "mel_distance": "loud"}, "target": row}
    for name, content in rows.items():
        inputs = {"target": 5 if name == "target" else str(folder / "wav"), "estimate": str(folder / "other")}
        (folder / f"{name}.json").write_text(json.dumps({"files": [content], "inputs": inputs}))
    return folder


@POSIX
@pytest.mark.parametrize(("line", "code", "message"), BAD_LINES, ids=[line for line, _, _ in BAD_LINES])
def test_bad_lines(
    workplace: Path,
    line: str,
    code: int,
    message: str,
    commands: Commands,
) -> None:
    before = {path: path.read_bytes() for path in workplace.iterdir() if path.is_file()}
    found, out, err = commands.run(line.split(), workplace)
    assert found == code, err
    lines = err.splitlines()
    assert message in lines[-1]
    # Before the line itself usage errors show how it is done.
    assert [text.startswith("ear-vae") for text in lines if not text.startswith(("usage:", " "))] == [True]
    assert "=True" not in err  # what Python says
    assert out == ""
    assert before == {path: path.read_bytes() for path in workplace.iterdir() if path.is_file()}


@POSIX
@pytest.mark.parametrize(
    ("options", "last"),
    [
        ("--config smoke --trainer.max_step 3", "did you mean --trainer.max_steps?"),
        ("--model.optimiser.warmup_steps=3", "did you mean --model.optimizer.warmup_steps?"),
        ("--config smoke --nothing.like 3", "error: unrecognized arguments: --nothing.like 3"),
    ],
)
def test_an_option_of_fit_that_there_is_not(
    commands: Commands, workplace: Path, options: str, last: str
) -> None:
    code, _, err = commands.run(["fit", "--data.folder", "folder", *options.split()], workplace)
    assert code == 2
    assert err.splitlines()[-1] == last


@POSIX
def test_one_argument_is_enough_to_rebuild(commands: Commands, tmp_path: Path, small_model: Path) -> None:
    source = write(tmp_path / "in" / "song.flac")
    write(tmp_path / "in" / "more" / "b.wav")
    here, model = tmp_path / "in", ("--model", small_model)
    code, out, err = commands.run(["reconstruct", "song.flac", *model], here)
    assert (code, out) == (0, ""), err
    assert err.startswith("song.rebuilt.wav: 0.2 s in ")
    before = (here / "song.rebuilt.wav").read_bytes()
    assert len(before) > 4 * 2 * 0.2 * RATE
    code, _, err = commands.run(["reconstruct", "song.flac", *model], here)
    assert code == 1
    assert "song.rebuilt.wav: exists already" in err
    assert (here / "song.rebuilt.wav").read_bytes() == before
    assert commands.run(["reconstruct", source, "--format", "ogg", *model], tmp_path)[0] == 0
    assert soundfile.info(here / "song.rebuilt.ogg").format == "OGG"
    assert commands.run(["reconstruct", ".", "--quiet", *model], here / "more")[0] == 0
    assert os.listdir(here / "more.rebuilt") == ["b.wav"]


@POSIX
def test_the_last_argument_may_stand_behind_options(
    commands: Commands, tmp_path: Path, small_model: Path
) -> None:
    write(tmp_path / "a.wav")
    model = ["--model", small_model]
    assert commands.run(["reconstruct", "a.wav", *model, "--quiet", "b.wav"], tmp_path)[0] == 0
    assert (tmp_path / "b.wav").exists()
    code, out, _ = commands.run(["evaluate", "a.wav", "--align", "b.wav"], tmp_path)
    assert code == 0
    assert out.startswith("b.wav: a\n")
    code, _, err = commands.run(["report", "page", "--system", "b=b.wav", "a.wav"], tmp_path)
    assert code == 0, err
    assert (tmp_path / "page.html").exists()
    # Standard output.
    code, _, err = commands.run(["reconstruct", "a.wav", *model, "--quiet", "-"], tmp_path)
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "b.wav", "page.html"]


@POSIX
def test_convert_says_what_it_wrote_and_how_to_use_it(
    commands: Commands, tmp_path: Path, small_model: Path
) -> None:
    code, out, err = commands.run(["convert", small_model, "my model", "--dtype", "float16"], tmp_path)
    assert (code, out) == (0, "")
    size = sum(path.stat().st_size for path in (tmp_path / "my model").iterdir()) / 1e6
    assert err == (
        f"my model: {small_model} in the folder layout, {size:.1f} MB; use it with --model 'my model'\n"
    )


@POSIX
def test_pipes_are_described_and_decoded(commands: Commands, tmp_path: Path, small_model: Path) -> None:
    """Named pipes, as the shell's <(…) makes them, and standard input; a pipe can be read only once."""
    model = ("--model", small_model)
    song, latents = write(tmp_path / "a.wav"), tmp_path / "a.safetensors"
    assert commands.run(["encode", song, latents, *model], tmp_path)[0] == 0
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, arguments in (
        (song, ["info", "pipe", "--json"]),
        (latents, ["info", "pipe", "--json"]),
        (latents, ["decode", "pipe", "b.wav", *model]),
        (song, ["reconstruct", "pipe", "c.wav", *model]),
    ):
        sender = subprocess.Popen(["sh", "-c", 'cat "$1" >"$2"', "sh", path, pipe])
        code, out, err = commands.run(arguments, tmp_path)
        assert (code, sender.wait(timeout=60)) == (0, 0), err
        if arguments[0] == "info":
            named = commands.run(["info", path, "--json"], tmp_path)[1]
            assert json.loads(out) == json.loads(named)
            assert commands.run(["info", "-", "--json"], tmp_path, stdin=str(path))[1] == out
    for name in ("b.wav", "c.wav"):
        assert soundfile.info(tmp_path / name).frames == soundfile.info(song).frames


@POSIX
def test_remarks_of_the_mp3_decoder_are_kept_out_unless_debugging(
    commands: Commands, tmp_path: Path, small_model: Path
) -> None:
    """It writes them to the descriptor itself, past Python."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.mp3", 0.1 * generator.standard_normal((RATE, 2)), RATE)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    content[3000::97] = bytes(len(content[3000::97]))
    (tmp_path / "a.mp3").write_bytes(content)
    arguments = ["encode", "a.mp3", "a.safetensors", "--model", small_model, "--force"]
    assert "libmpg123" in commands.run([*arguments, "--debug"], tmp_path)[2]
    err = commands.run(arguments, tmp_path)[2]
    assert all(line.startswith(("ear-vae: ", "a.safetensors: ")) for line in err.splitlines()), err


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch for Linux has")
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    """OpenMP itself says what it was told when torch loads it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    for chosen, policy, spins in (
        ({}, "PASSIVE", "0"),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000"),
        ({"GOMP_SPINCOUNT": "77"}, "PASSIVE", "77"),
    ):
        result = process("env", "--debug", env={**environment, **chosen})
        lines = result.stderr.decode().split("\n")
        said = dict(line.strip().split(" = ") for line in lines if " = " in line)
        found = {name.split()[-1]: value.strip("'") for name, value in said.items()}
        assert found["GOMP_SPINCOUNT"] == spins, result.stderr
        assert found["OMP_WAIT_POLICY"] == policy or "GOMP_SPINCOUNT" in chosen


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
        ('"$@" | true', ("info", "wav"), 0, ""),
        ('PYTHONUNBUFFERED=1 "$@" | true', ("evaluate", "--quiet", "wav", "wav"), 0, ""),
        ('"$@" | true', ("--help",), 0, ""),
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
    os.rename(write(music / "z.wav"), strange)
    write(music / "ü.wav")
    (music / "junk.wav").write_text("not audio")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONIOENCODING": "ascii"}
    arguments = ["encode", music, tmp_path / "out", "--model", small_model]
    result = process(*arguments, "--progress", env=environment)
    assert result.returncode == 1
    names = [b"a.safetensors", b"caf\xe9\n\x1b[31m.safetensors", "ü.safetensors".encode()]
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == names
    errors = result.stderr.decode("ascii")
    assert "\x1b[31m" not in errors
    assert r"caf\xe9\n\x1b[31m.safetensors: 0.2 s in " in errors
    assert "junk.wav: " in errors
    assert "1 of 4 files failed" in errors
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
        "import os, sys\n"
        "from ear_vae.cli.jobs import Kind, make_plan, run_jobs\n"
        "os.setuid(65534)\n"
        "what = make_plan(sys.argv[1], sys.argv[2], reads=Kind('', {'.wav'}), extension='.x',"
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
    assert "\x1b" not in line
    assert "…" in line
    assert len(line) < 200
    assert json.loads(process("info", path, "--json").stdout)["model_name"].startswith("x\\x1b[31m\\nyzzz")
    refused = process("decode", path, tmp_path / "b.wav").stderr.decode()
    assert len(refused.splitlines()) == 1
    assert "made by 'x\\x1b[31m\\nyzzz" in refused
    assert len(refused) < 600


def encoded(folder: Path) -> int:
    """Latent files under a folder; unlike `rglob`, `os.walk` does not mind folders that vanish meanwhile."""
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(folder) for name in names)


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
    # Whoever runs the tests may have been started by nohup.
    heed, ignore = (
        functools.partial(signal.signal, signal.SIGHUP, to) for to in (signal.SIG_DFL, signal.SIG_IGN)
    )
    running = at_work(source, tmp_path / "b.wav", small_model, preexec_fn=heed)
    running.send_signal(signal.SIGHUP)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert errors.decode().strip() == "ear-vae: interrupted"
    assert sorted(os.listdir(tmp_path)) == ["in"]

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
        done = encoded(tmp_path / "two")
        wanted = done + moments.randrange(5, 60)
        with subprocess.Popen(
            command("encode", music, tmp_path / "two", *options), stderr=subprocess.DEVNULL
        ) as running:
            try:
                while encoded(tmp_path / "two") < wanted:
                    assert running.poll() is None
                    time.sleep(moments.uniform(0, 0.01))
            finally:
                running.kill()
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
    # Only with libraries that import torchaudio themselves is there anything to do.
    beside = importlib.util.find_spec("transformers") or importlib.util.find_spec("diffusers")
    told = found["problems"] if beside else found["notes"]
    assert any("torchaudio" in line for line in told) == (fits.returncode != 0)
    assert all("nothing to do" in note for note in found["notes"])
    shown = process("env").stdout.decode()
    assert all(name in shown for name in found)


def test_every_extra_that_is_named_installs_what_it_is_named_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    monkeypatch.setattr(importlib.metadata, "version", missing)
    named = {
        package: found[1]
        for package, said in facts().items()
        if (found := re.fullmatch(r'not installed; pip install "ear-vae\[(\w+)\]"', str(said)))
    }
    assert {"diffusers", "transformers", "tensorboard"} <= set(named)
    for package, extra in named.items():
        assert package in {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]}, package
    # And of a library that two extras have, the one of its own name.
    assert all(named[name] == name for name in named.keys() & extras.keys())
    for path in (repository / "src").rglob("*.py"):
        for names in re.findall(r"ear-vae\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras), path


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
    result = process("evaluate", tmp_path / "a.wav", "--model", f"dac={tmp_path}", env=environment)
    assert result.stderr.decode().strip().endswith("as far as the weights")


@POSIX
@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_a_disk_that_is_full_at_the_last_byte_is_an_error(
    tmp_path: Path, small_model: Path, format: str
) -> None:
    """A file that may not grow further stands for the disk; libsndfile is silent about its last bytes."""
    resource = pytest.importorskip("resource")
    source, output = write(tmp_path / "a.wav"), tmp_path / f"b.{format}"
    arguments = ["reconstruct", source, output, "--model", small_model, "--quiet", "--peak", "clip"]
    assert main(list(map(str, arguments))) == 0
    size = output.stat().st_size
    output.unlink()
    # Measuring coverage writes files of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = process(
        *arguments,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1,) * 2),
    )
    assert result.returncode == 1
    assert result.stderr.decode() == f"ear-vae: {output}: could not be written: File too large\n"
    assert os.listdir(tmp_path) == ["a.wav"]


@POSIX
def test_a_name_that_is_too_long_for_its_output_stops_only_its_own_file(
    commands: Commands, tmp_path: Path, small_model: Path
) -> None:
    write(tmp_path / "in" / f"{'n' * 251}.wav")
    write(tmp_path / "in" / "short.wav")
    (tmp_path / "out").mkdir()
    code, _, err = commands.run(["encode", "in", "out", "--model", small_model], tmp_path)
    assert code == 1
    assert "File name too long" in err
    assert os.listdir(tmp_path / "out") == ["short.safetensors"]


@POSIX
def test_the_rate_of_the_file_decides_what_can_be_written(
    commands: Commands, tmp_path: Path, small_model: Path
) -> None:
    soundfile.write(tmp_path / "48.wav", np.zeros((4800, 2)), 48_000)
    soundfile.write(tmp_path / "96.wav", np.zeros((9600, 2)), 96_000)
    model = ["--model", small_model]
    code, _, err = commands.run(["reconstruct", "48.wav", "48.ogg", "--subtype", "OPUS", *model], tmp_path)
    assert code == 0, err
    assert soundfile.info(tmp_path / "48.ogg").subtype == "OPUS"
    code, _, err = commands.run(["reconstruct", "96.wav", "96.mp3", *model], tmp_path)
    assert code == 1
    assert "96.mp3: cannot write mp3 at 96000 Hz: MPEG-1/2/2.5 only" in err


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def written_at_once() -> None:
        with atomic_path(tmp_path / "a.txt", overwrite=False) as temporary:
            temporary.write_text("ours")
            (tmp_path / "a.txt").write_text("theirs")

    with pytest.raises(EarVAEError, match="exists already"):
        written_at_once()
    assert (tmp_path / "a.txt").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["a.txt"]


@POSIX
def test_a_name_is_one_line_of_the_table(commands: Commands, tmp_path: Path) -> None:
    for folder in ("originals", "rebuilt"):
        for name in ("x\nall fine", "y"):
            write(tmp_path / folder / f"{name}.wav")
    code, out, err = commands.run(["evaluate", "originals", "rebuilt"], tmp_path)
    assert code == 0, err
    assert "\nall fine" not in out
    assert r"x\nall fine" in out


@POSIX
def test_what_is_damaged_of_an_interrupted_evaluation_is_measured_again(
    commands: Commands, tmp_path: Path
) -> None:
    write(tmp_path / "a.wav")
    write(tmp_path / "long_name.wav")
    lines = [{"key": [1], "row": {}}, {"key": "x", "row": 5}, {"key": "x", "row": {"name": "a"}}]
    text = "\n".join([*map(json.dumps, lines), "[" * 100_000])
    (tmp_path / "o.json.partial.jsonl").write_text(text)
    code, _, err = commands.run(["evaluate", "a.wav", "long_name.wav", "--json", "o.json"], tmp_path)
    assert code == 0, err
    assert len(json.loads((tmp_path / "o.json").read_text())["files"]) == 1
