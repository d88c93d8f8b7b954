"""The command line, in-process where possible and as a real process where it matters."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

from ear_vae import EarVAE, __version__
from ear_vae.cli import main
from ear_vae.evaluation.pairs import find_pairs, find_targets
from ear_vae.latents import load_latents
from ear_vae.training.data.sources import Policy, find_usable_files

RATE = 44_100


def write(
    path: Path, seconds: float = 0.5, channels: int = 2, rate: int = RATE, subtype: str = "PCM_16"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time_axis = np.arange(int(seconds * rate)) / rate
    tones = [0.3 * np.sin(2 * np.pi * 200 * (c + 1) * time_axis) for c in range(channels)]
    soundfile.write(path, np.stack(tones, 1), rate, subtype if path.suffix == ".wav" else None)
    return path


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ear_vae", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 2), (22_050, 1)])
def test_reconstruct_keeps_rate_length_and_channels(
    tmp_path: Path, small_model: Path, rate: int, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a b ü.wav", channels=channels, rate=rate)
    assert main(["reconstruct", str(source), str(tmp_path / "out.wav"), "--model", str(small_model)]) == 0
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (rate, channels, rate // 2, "FLOAT")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "0.5 s in" in printed.err
    assert "x real time" in printed.err


def test_reconstruct_is_encode_then_decode_and_the_library(tmp_path: Path, small_model: Path) -> None:
    source = str(write(tmp_path / "a.wav", rate=48_000))
    model = ["--model", str(small_model)]
    assert main(["reconstruct", source, str(tmp_path / "one.wav"), *model]) == 0
    assert main(["encode", source, str(tmp_path / "a.safetensors"), *model]) == 0
    assert main(["decode", str(tmp_path / "a.safetensors"), str(tmp_path / "two.wav"), *model]) == 0
    one, two = (soundfile.read(tmp_path / name, dtype="float32")[0] for name in ("one.wav", "two.wav"))
    assert np.array_equal(one, two)
    audio = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
    expected = EarVAE.from_pretrained(small_model).reconstruct(audio, sample_rate=48_000)
    np.testing.assert_allclose(one.T, expected.numpy(), atol=1e-5)


def test_latent_files_hold_what_is_asked_for(tmp_path: Path, small_model: Path) -> None:
    source, model = str(write(tmp_path / "a.wav", channels=1)), ["--model", str(small_model)]
    assert main(["encode", source, str(tmp_path / "mean.safetensors"), *model, "--std"]) == 0
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        target = str(tmp_path / f"{name}.safetensors")
        assert main(["encode", source, target, *model, "--sample", "--seed", seed]) == 0
    mean, one, again, two = (
        load_latents(tmp_path / f"{n}.safetensors") for n in ("mean", "one", "again", "two")
    )
    assert (mean.audio_channels, mean.num_samples, mean.source_sample_rate) == (1, RATE // 2, RATE)
    assert (mean.model_name, mean.sampled, one.sampled) == ("small", False, True)
    assert torch.equal(one.mean, again.mean)
    assert not torch.equal(one.mean, two.mean)
    assert mean.std is not None
    # A standard normal in the draw: 64 by 22 numbers.
    noise = (one.mean - mean.mean) / mean.std
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)
    assert set(load_file(tmp_path / "one.safetensors")) == {"mean"}


@pytest.mark.filterwarnings("default::UserWarning")
def test_folders_are_mirrored_and_finished_work_is_kept(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    music = tmp_path / "in"
    write(music / "a.wav")
    write(music / "deep er" / "-b.flac")
    (music / "bad.mp3").write_text("not audio")
    (music / "note.txt").write_text("no audio either")
    out = tmp_path / "in" / "out"
    arguments = ["reconstruct", str(music), str(out), "--model", str(small_model)]
    assert main(arguments) == 1
    produced = sorted(
        str(path.relative_to(out)) for path in out.rglob("*.*") if path.name[0] != "." and path.is_file()
    )
    assert produced == ["a.wav", "deep er/-b.wav"]
    errors = capsys.readouterr().err
    assert errors.count("ear-vae: ") == 2
    assert f"ear-vae: {music / 'bad.mp3'}: not audio" in errors
    assert "1 of 3 files failed\n" in errors
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert (
        f"2 of 3 outputs exist, kept (--force to redo them): {out / 'a.wav'}, {out / 'deep er/-b.wav'}"
        in errors
    )
    assert "1 of 3 files failed; 2 outputs existed already and were kept" in errors
    (music / "bad.mp3").unlink()
    (out / "a.wav").write_bytes(b"mine")
    (out / "deep er" / "-b.wav").unlink()
    assert main(arguments) == 0
    assert "a.wav: exists, kept" in capsys.readouterr().err
    assert (out / "a.wav").read_bytes() == b"mine"
    assert main([*arguments, "--force", "--format", "flac"]) == 0
    assert soundfile.info(out / "a.flac").subtype == "PCM_24"
    assert main([*arguments, "--force"]) == 0
    assert soundfile.info(out / "a.wav").frames == RATE // 2


def test_what_was_rebuilt_is_no_input_unless_it_is_named(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a song, in a folder inside its own with whatever name, and beside its folder."""
    monkeypatch.chdir(tmp_path)
    write(Path("music/song.wav"), 0.05)
    write(Path("music/album/two.wav"), 0.05)
    write(Path("music/mine/three.wav"), 0.05)
    model = ["--model", str(small_model), "--quiet"]
    runs = (["music/song.wav"], ["music", "music/first"], ["music/album"], ["music", "music/second"])
    for arguments in (*runs, ["music", "music/mine"], ["music", "out"]):
        assert main(["reconstruct", *arguments, *model]) == 0

    def outputs(folder: str) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.wav"))

    originals = ["album/two.wav", "mine/three.wav", "song.wav"]
    assert outputs("music/first") == outputs("music/second") == originals
    assert outputs("music/album.rebuilt") == ["two.wav"]
    # A folder that holds music of its own stays one of music.
    assert outputs("out") == [
        "album/two.wav",
        "mine/album/two.wav",
        "mine/song.wav",
        "mine/three.wav",
        "song.wav",
    ]
    assert main(["encode", "music", "latents", *model[:2]]) == 0
    assert (
        "left out: 8 files that were rebuilt from others (music/album.rebuilt/two.wav, "
        in capsys.readouterr().err
    )
    assert len(list(Path("latents").rglob("*.safetensors"))) == 5
    # Nor are they originals to measure against, or to train on.
    assert [pair.name for pair in find_targets(Path("music")).pairs] == sorted(
        name.removesuffix(".wav") for name in outputs("out")
    )
    assert find_pairs(Path("music"), Path("music/first")).without_estimate == ("mine/album/two", "mine/song")
    assert len(find_usable_files([Path("music")], Policy(), cache_dir=tmp_path)) == 5
    for folder in ("music/first", "music/album.rebuilt"):
        assert main(["reconstruct", folder, f"again/{folder}", *model]) == 0
        assert outputs(f"again/{folder}") == outputs(folder)


def test_two_inputs_for_one_output_stop_before_any_work(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "a.wav")
    write(tmp_path / "in" / "a.flac")
    write(tmp_path / "in" / "b.wav")
    assert (
        main(["reconstruct", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(small_model)]) == 1
    )
    error = capsys.readouterr().err
    assert "a.flac and" in error
    assert "a.wav would both become" in error
    assert not (tmp_path / "out").exists()


def test_streams(tmp_path: Path, small_model: Path) -> None:
    source = write(tmp_path / "a.wav")
    model = ("--model", small_model)
    latents = process("encode", "-", "-", *model, input=source.read_bytes())
    assert latents.returncode == 0, latents.stderr
    rebuilt = process("decode", "-", "-", *model, "--format", "flac", input=latents.stdout)
    assert rebuilt.returncode == 0, rebuilt.stderr
    audio, rate = soundfile.read(io.BytesIO(rebuilt.stdout))
    assert (rate, audio.shape) == (RATE, (RATE // 2, 2))


def test_info(tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, latents = write(tmp_path / "a.wav"), tmp_path / "a.safetensors"
    assert main(["encode", str(source), str(latents), "--model", str(small_model), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    found = {}
    for thing in (source, latents, small_model):
        assert main(["info", str(thing), "--json"]) == 0
        found[thing] = json.loads(capsys.readouterr().out)
    assert found[source] == {
        "kind": "audio",
        "sample_rate": RATE,
        "channels": 2,
        "num_samples": RATE // 2,
        "format": "WAV",
        "subtype": "PCM_16",
        "duration_seconds": 0.5,
    }
    assert (found[latents]["kind"], found[latents]["shape"]) == ("latents", [64, 22])
    assert (found[small_model]["kind"], found[small_model]["channels"]) == ("model", 4)
    assert found[small_model]["weights_sha256"] == found[latents]["weights_sha256"]
    shown = ""
    for thing in (source, latents, small_model):
        assert main(["info", str(thing)]) == 0
        shown += re.sub(r" +", " ", capsys.readouterr().out)
    rate = f"{found[latents]['latent_rate']:.6g}"
    for line in (
        "sample_rate 44100 Hz",
        "duration_seconds 0.5 s",
        "num_samples 22050 samples per channel",
        f"latent_rate {rate} frames per second",
        "shape [64, 22] (channels, frames)",
        f"parameters {found[small_model]['parameters']} weights",
    ):
        assert f"\n{line}\n" in shown


def test_convert_to_half_the_size(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small_model), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small_model, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    one, two = EarVAE.from_pretrained(small_model), EarVAE.from_pretrained(tmp_path / "half")
    assert (two.name, two.dtype) == ("half", torch.float32)
    for before, after in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(before.half().float(), after)
    assert "# half" in (tmp_path / "half" / "README.md").read_text()
    assert (
        main(["convert", str(small_model), str(tmp_path / "o"), "--to", "official", "--dtype", "float16"])
        == 1
    )
    assert "in the official layout weights are always float32" in capsys.readouterr().err


def test_convert_there_and_back(tmp_path: Path, small_model: Path) -> None:
    assert main(["convert", str(small_model), str(tmp_path / "official"), "--to", "official"]) == 0
    assert main(["convert", str(tmp_path / "official"), str(tmp_path / "back"), "--variant", "small"]) == 0
    one, two = EarVAE.from_pretrained(small_model), EarVAE.from_pretrained(tmp_path / "back")
    audio = torch.randn(2, 4096)
    torch.testing.assert_close(one.reconstruct(audio), two.reconstruct(audio), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default::UserWarning")
def test_peaks(tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is made ten times too loud."""
    loud = EarVAE.from_pretrained(small_model)
    loud.decoder.conv_out.weight.mul_(1000)
    loud.save_pretrained(tmp_path / "loud")
    source = str(write(tmp_path / "a.wav"))
    arguments = [
        "reconstruct",
        source,
        str(tmp_path / "b.flac"),
        "--model",
        str(tmp_path / "loud"),
        "--force",
    ]
    assert main(arguments) == 0
    assert "warning" in (warned := capsys.readouterr().err)
    assert "dBFS" in warned
    assert main([*arguments, "--peak", "scale"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert np.abs(soundfile.read(tmp_path / "b.flac")[0]).max() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "not available"),
        (["--device", "tpu"], "choose cpu, cuda"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--subtype", "MP3"], "cannot hold subtype"),
    ],
)
def test_bad_options(
    tmp_path: Path, small_model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "a.wav"))
    model = [] if "--model" in arguments else ["--model", str(small_model)]
    assert main(["reconstruct", source, str(tmp_path / "b.wav"), *model, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.wav").exists()


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        (["reconstruct"], 2),
        (["nonsense"], 2),
        (["encode", "a", "b", "--seed", str(2**63)], 2),
        (["encode", "a", "b", "--quiet", "--progress"], 2),
        (["--version"], 0),
        (["fit", "--help"], 0),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == code, arguments
    assert f"ear-vae {__version__}" in capsys.readouterr().out


def test_help_is_there_before_torch_would_be() -> None:
    script = (
        "import sys; from ear_vae.cli import main\n"
        "try: main(['reconstruct', '--help'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "assert not {'torch', 'numpy', 'soundfile'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"--peak" in result.stdout


INTERRUPTED = """
import faulthandler, signal, sys
faulthandler.dump_traceback_later(100, exit=True)
from ear_vae.cli import main
from ear_vae.evaluation.pairs import find_pairs, find_targets
from ear_vae.vae import EarVAE
signal.signal(signal.SIGINT, signal.default_int_handler)
whole = EarVAE.decode_stream
def announced(*arguments, **options):
    for block in whole(*arguments, tile_frames=1000, **options):
        yield block
        print("at work", flush=True)
EarVAE.decode_stream = announced
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(
    tmp_path: Path, small_model: Path, sent: signal.Signals
) -> None:
    source = write(tmp_path / "in" / "a.wav", seconds=600)
    command = [sys.executable, "-c", INTERRUPTED, "reconstruct", source, tmp_path / "b.wav"]
    running = subprocess.Popen(
        [*command, "--model", small_model], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"at work\n"
    running.send_signal(sent)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert errors.decode().strip() == "ear-vae: interrupted"
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_an_interrupted_folder_says_how_to_go_on(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write(tmp_path / "in" / f"{name}.wav")
    whole = EarVAE.decode_stream
    left = 1

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Tensor]:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return whole(*arguments, **options)

    monkeypatch.setattr(EarVAE, "decode_stream", interrupted)
    command = ["reconstruct", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(small_model)]
    assert main(command) == 130
    assert "finished 1 of 2 files; the same command, without --force, goes on" in capsys.readouterr().err
    left = 1
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.wav", "b.wav"]


def test_an_interrupted_data_set_goes_on(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "a.wav")
    with monkeypatch.context() as patch:

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(EarVAE, "encode_stream", interrupted)
        patch.setattr(EarVAE, "encode", interrupted)
        command = ["encode-dataset", str(tmp_path / "in"), str(tmp_path / "set"), "--model", str(small_model)]
        assert main(command) == 130
        assert "the same command, without --force, goes on from there" in capsys.readouterr().err
    assert main(command) == 0
    assert "1 item of 1 file" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = process("info", tmp_path / "nothing.wav", "--debug")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr
    assert b"EarVAEError" in result.stderr


def test_debug_goes_on_after_the_traceback(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").touch()
    write(tmp_path / "in" / "b.wav")
    arguments = ["reconstruct", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(small_model)]
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.wav"]


@pytest.mark.parametrize("source", ["music/album", "music/album/.."])
def test_a_single_song_goes_to_a_new_folder_wherever_it_is(
    tmp_path: Path, small_model: Path, source: str
) -> None:
    """Also to the parent of the input, which holds the inputs but is no output of an earlier run."""
    write(tmp_path / "music" / "album" / "a.flac", seconds=0.1)
    options = ["--model", str(small_model), "--quiet"]
    assert main(["reconstruct", str(tmp_path / source), str(tmp_path / "new" / "er"), *options]) == 0
    name = "a.wav" if source.endswith("album") else "album/a.wav"
    assert soundfile.info(tmp_path / "new" / "er" / name).frames == RATE // 10
    assert main(["encode", str(tmp_path / source), str(tmp_path / "music"), *options]) == 0
    assert (tmp_path / "music" / name).with_suffix(".safetensors").is_file()


def test_no_output_replaces_another_input(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """in/a.wav goes to a.wav in the parent; in/in/a.wav would go to in/a.wav."""
    for folder in ("in", "in/in"):
        write(tmp_path / folder / "a.wav", seconds=0.1)
    before = (tmp_path / "in" / "a.wav").read_bytes()
    arguments = [str(tmp_path / "in"), str(tmp_path), "--force", "--model", str(small_model)]
    assert main(["reconstruct", *arguments]) == 1
    assert "would replace an input" in capsys.readouterr().err
    assert (tmp_path / "in" / "a.wav").read_bytes() == before
    assert not (tmp_path / "a.wav").exists()


def test_decode_of_a_folder_takes_latent_files_only(tmp_path: Path, small_model: Path) -> None:
    source, model = str(write(tmp_path / "a.wav", seconds=0.1)), ["--model", str(small_model), "--quiet"]
    latents = tmp_path / "latents"
    (latents / ".hidden").mkdir(parents=True)
    for name in ("one.safetensors", "TWO.SAFETENSORS", "._one.safetensors", ".hidden/b.safetensors"):
        assert main(["encode", source, str(latents / name), *model]) == 0
    (latents / "folder.safetensors").mkdir()
    arguments = [str(latents), str(tmp_path / "out"), *model, "--format", "flac", "--peak", "scale"]
    assert main(["decode", *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["TWO.flac", "one.flac"]


def test_the_model_is_loaded_once_and_only_for_work_that_can_succeed(
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []
    original = EarVAE.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(cls: type[EarVAE], name: str, **options: object) -> EarVAE:
        loaded.append(name)
        return original(cls, name, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(EarVAE, "from_pretrained", classmethod(counted))
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.wav", seconds=0.1)
    song, model = str(tmp_path / "in" / "a.wav"), ["--model", str(small_model), "--quiet"]
    assert main(["reconstruct", song, str(tmp_path / "a.xyz"), *model]) == 1
    assert main(["reconstruct", song, str(tmp_path / "a.flac"), *model, "--subtype", "FLOAT"]) == 1
    assert main(["reconstruct", song, song, *model]) == 1
    assert main(["reconstruct", song, str(tmp_path / "no" / "a.wav"), *model]) == 1
    assert loaded == []
    folders = ["reconstruct", str(tmp_path / "in"), str(tmp_path / "out"), *model]
    assert main(folders) == 0
    assert main(folders) == 0
    assert loaded == [str(small_model)]


def test_format_of_a_single_file(tmp_path: Path, small_model: Path) -> None:
    source = str(write(tmp_path / "a.wav", seconds=0.1))
    target = tmp_path / "no extension"
    options = ["--format", "flac", "--subtype", "PCM_16", "--peak", "clip", "--model", str(small_model)]
    assert main(["reconstruct", source, str(target), *options]) == 0
    info = soundfile.info(target)
    assert (info.format, info.subtype, info.frames) == ("FLAC", "PCM_16", RATE // 10)


def test_seeds(tmp_path: Path, small_model: Path) -> None:
    """A seed gives one file the library's draw, and every file of a folder another one, repeatably."""
    for name in ("a", "b"):
        source = write(tmp_path / "in" / f"{name}.wav")
    model = ["--model", str(small_model), "--quiet", "--sample"]

    def drawn(source: Path, target: str, *seed: str) -> torch.Tensor:
        assert main(["encode", str(source), str(tmp_path / target), *model, *seed]) == 0
        return torch.stack([load_latents(path).mean for path in _latent_files(tmp_path / target)])

    one = drawn(source, "one.safetensors", "--seed", "7")[0]
    audio = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
    posterior = EarVAE.from_pretrained(small_model).encode(audio)
    torch.testing.assert_close(one, posterior.sample(torch.Generator().manual_seed(7)), rtol=0, atol=1e-5)
    folder = drawn(tmp_path / "in", "folder", "--seed", "7")
    assert not torch.equal(folder[0], folder[1])
    (tmp_path / "in" / "a.wav").unlink()
    assert torch.equal(drawn(tmp_path / "in", "again", "--seed", "7")[0], folder[1])
    assert not torch.equal(drawn(source, "x.safetensors"), drawn(source, "y.safetensors"))


def _latent_files(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else [place]


def test_bfloat16_is_near_float32(tmp_path: Path, small_model: Path) -> None:
    source, model = str(write(tmp_path / "a.wav")), ["--model", str(small_model)]
    assert main(["reconstruct", source, str(tmp_path / "one.wav"), *model]) == 0
    assert main(["reconstruct", source, str(tmp_path / "two.wav"), *model, "--dtype", "bfloat16"]) == 0
    one, two = (soundfile.read(tmp_path / name)[0] for name in ("one.wav", "two.wav"))
    difference = np.linalg.norm(one - two) / np.linalg.norm(one)
    assert 1e-5 < difference < 0.1


def test_the_chosen_dtype_is_said(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = str(write(tmp_path / "a.wav")), ["--model", str(small_model)]
    monkeypatch.setattr("ear_vae.inference.precision.PROMISED_DB", 1000.0)
    assert main(["reconstruct", source, str(tmp_path / "one.wav"), *model]) == 0
    assert main(["reconstruct", source, str(tmp_path / "two.wav"), *model, "--dtype", "auto"]) == 0
    assert "computes in float32: bfloat16 is" in capsys.readouterr().err
    one, two = (soundfile.read(tmp_path / name)[0] for name in ("one.wav", "two.wav"))
    assert np.array_equal(one, two)


@pytest.mark.filterwarnings("always")
def test_compiling_is_asked_for_and_not_required(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("ear_vae.network.snake._compiled", lambda function: refuse)
    source, model = str(write(tmp_path / "a.wav")), ["--model", str(small_model)]
    assert main(["reconstruct", source, str(tmp_path / "one.wav"), *model]) == 0
    assert "compiled" not in capsys.readouterr().err
    assert main(["reconstruct", source, str(tmp_path / "two.wav"), *model, "--optimize"]) == 0
    assert "runs without being compiled: no compiler" in capsys.readouterr().err
    one, two = (soundfile.read(tmp_path / name)[0] for name in ("one.wav", "two.wav"))
    assert np.array_equal(one, two)


def test_compiling_unasked(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the work, where it pays, unless forbidden; whatever fails then is not heard of."""
    compiled: list[object] = []

    def stand_in(function: Any) -> Any:
        return lambda *given: (compiled.append(function), function(*given))[1]

    for number in range(3):
        write(tmp_path / "in" / f"{number}.wav")
    command = ["reconstruct", str(tmp_path / "in")]

    def rebuilt(name: str, *options: str) -> np.ndarray:
        compiled.clear()
        assert main([*command, str(tmp_path / name), "--model", str(small_model), *options]) == 0
        assert len(capsys.readouterr().err.splitlines()) == 3
        return np.stack([soundfile.read(tmp_path / name / f"{number}.wav")[0] for number in range(3)])

    monkeypatch.setattr("ear_vae.network.snake._compiled", stand_in)
    plain = rebuilt("plain")
    assert not compiled
    monkeypatch.setattr("ear_vae.inference.compiling.COMPILING_SECONDS", 0)
    assert np.array_equal(rebuilt("forbidden", "--no-optimize"), plain)
    assert not compiled
    found = rebuilt("compiled")
    assert compiled
    assert np.array_equal(found[0], plain[0]), "the first tiles are timed"
    np.testing.assert_allclose(found[1:], plain[1:], rtol=0, atol=1e-5)

    def refuse(*_: object) -> None:
        compiled.append("tried")
        raise ValueError("whatever")

    monkeypatch.setattr("ear_vae.network.snake._compiled", lambda function: refuse)
    assert np.array_equal(rebuilt("refused"), plain)
    assert compiled == ["tried"]


_PAYING = """
import sys
from ear_vae.inference import compiling

compiled, compile_snake = [], compiling.compile_snake
compiling.COMPILING_SECONDS = 0
compiling.compile_snake = lambda *given: compiled.append(compile_snake(*given))
from ear_vae.cli import main
code = main(sys.argv[1:])
print(len(compiled))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "compiler", "cache"])
def test_compiling_unasked_with_torch_itself(tmp_path: Path, small_model: Path, broken: str) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.wav", seconds=2)
    (tmp_path / "file").touch()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if broken == "compiler":
        environment["CXX"] = str(tmp_path / "nonexistent")
    elif broken == "cache":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    command = [sys.executable, "-c", _PAYING, "reconstruct", str(tmp_path / "in")]
    runs = {}
    for name, options in {"plain": ["--no-optimize"], "found": []}.items():
        arguments = [*command, str(tmp_path / name), "--model", str(small_model), "--quiet", *options]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
        assert done.stderr == ""
        audio = [soundfile.read(tmp_path / name / f"{number}.wav")[0] for number in range(3)]
        runs[name] = np.stack(audio), int(done.stdout)
    (plain, none), (found, times) = runs["plain"], runs["found"]
    assert none == 0
    if broken:
        assert times == 0
        assert np.array_equal(found, plain)
    else:
        assert times == 1
        assert not np.array_equal(found, plain)
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)


def test_bars_are_for_terminals_and_for_those_who_ask(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "a.wav", seconds=10))
    arguments = ["reconstruct", source, str(tmp_path / "b.wav"), "--force", "--model", str(small_model)]
    assert main(arguments) == 0
    assert "%|" not in capsys.readouterr().err
    assert main([*arguments, "--progress"]) == 0
    printed = capsys.readouterr()
    assert "a.wav:   0%|" in printed.err
    assert printed.out == ""


def test_the_callers_signal_handler_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["info", str(tmp_path / "missing.wav")]) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path, small_model: Path) -> None:
    source = write(tmp_path / "a.wav")
    command = [sys.executable, "-m", "ear_vae", "reconstruct", source, "-", "--model", small_model]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    with running.stderr:
        errors = running.stderr.read().decode()
    assert running.wait(timeout=120) == 1
    assert len(errors.splitlines()) == 1, errors
    assert "Broken pipe" in errors
