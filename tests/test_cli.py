"""The command line, in-process where possible and as a real process where it matters."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.cli import main
from ear_vae.latents import load_latents

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
    produced = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert produced == ["a.wav", "deep er/-b.wav"]
    errors = capsys.readouterr().err
    assert errors.count("ear-vae: ") == 2
    assert f"ear-vae: {music / 'bad.mp3'}: not audio" in errors
    assert "1 of 3 files failed" in errors
    (music / "bad.mp3").unlink()
    (out / "a.wav").write_bytes(b"mine")
    assert main(arguments) == 0
    assert "a.wav: exists, kept" in capsys.readouterr().err
    assert (out / "a.wav").read_bytes() == b"mine"
    assert main([*arguments, "--force", "--format", "flac"]) == 0
    assert soundfile.info(out / "a.flac").subtype == "PCM_24"
    assert main([*arguments, "--force"]) == 0
    assert soundfile.info(out / "a.wav").frames == RATE // 2


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


def test_existing_output_of_one_file(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write(tmp_path / "a.wav"), tmp_path / "b.wav"
    target.write_bytes(b"mine")
    arguments = ["reconstruct", str(source), str(target), "--model", str(small_model)]
    assert main(arguments) == 1
    assert "b.wav: exists already" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert main([*arguments, "--force"]) == 0
    assert soundfile.info(target).frames == RATE // 2


def test_latents_of_another_model_are_refused(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(tmp_path / "other")
    EarVAE(EarVAEConfig(channels=4, latent_dim=32)).save_pretrained(tmp_path / "narrow")
    source, latents = str(write(tmp_path / "a.wav")), str(tmp_path / "a.safetensors")
    assert main(["encode", source, latents, "--model", str(small_model)]) == 0
    decode = ["decode", latents, str(tmp_path / "b.wav"), "--model"]
    assert main([*decode, str(tmp_path / "other")]) == 1
    assert "made by small (weights" in capsys.readouterr().err
    assert not (tmp_path / "b.wav").exists()
    assert main([*decode, str(tmp_path / "other"), "--force"]) == 0
    assert main([*decode, str(tmp_path / "narrow"), "--force"]) == 1
    assert "cannot decode" in capsys.readouterr().err


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
    assert main(["info", str(small_model)]) == 0
    assert "parameters" in capsys.readouterr().out


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
    assert "official weights are float32" in capsys.readouterr().err


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


BAD = {
    "missing.wav": "no such file",
    "zero.wav": "is empty",
    "text.wav": "not audio|not a format",
    "empty.wav": "no audio samples",
    "six.wav": "6 channels",
    "slow.wav": "sample rate 1000",
    "fast.wav": "sample rate 768000",
    "nan.wav": "NaN or infinite",
    "cut.wav": "truncated",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_audio_gives_one_line_and_leaves_nothing(
    tmp_path: Path, small_model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    path = tmp_path / name
    silence = np.zeros((1000, 2))
    if name == "zero.wav":
        path.touch()
    elif name == "text.wav":
        path.write_text("hello " * 50)
    elif name == "cut.wav":
        write(path)
        path.write_bytes(path.read_bytes()[:9000])
    elif name != "missing.wav":
        samples = {"empty.wav": silence[:0], "six.wav": np.zeros((1000, 6)), "nan.wav": silence * np.nan}
        rates = {"slow.wav": 1000, "fast.wav": 768_000}
        soundfile.write(path, samples.get(name, silence), rates.get(name, RATE), "FLOAT")
    before = set(tmp_path.iterdir())
    assert main(["reconstruct", str(path), str(tmp_path / "out.wav"), "--model", str(small_model)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"ear-vae: {re.escape(str(path))}: .*({BAD[name]}).*", error)
    assert set(tmp_path.iterdir()) == before


def test_bad_latents(tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, latents = write(tmp_path / "a.wav"), tmp_path / "a.safetensors"
    assert main(["encode", str(source), str(latents), "--model", str(small_model)]) == 0
    (tmp_path / "cut.safetensors").write_bytes(latents.read_bytes()[:-10])
    for path, message in (
        (tmp_path / "cut.safetensors", "truncated"),
        (small_model / "model.safetensors", "not a latent"),
    ):
        capsys.readouterr()
        assert main(["decode", str(path), str(tmp_path / "b.wav"), "--model", str(small_model)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b.wav").exists()


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


def test_places_that_cannot_be_written(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "a.wav"))
    (tmp_path / "folder").mkdir()
    for target, message in (
        (tmp_path / "no" / "b.wav", "does not exist"),
        (tmp_path / "folder", "is a folder"),
    ):
        assert main(["reconstruct", source, str(target), "--model", str(small_model)]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert (
        main(["reconstruct", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(small_model)]) == 1
    )
    assert "holds no files" in capsys.readouterr().err
    assert main(["reconstruct", str(tmp_path / "in"), source, "--model", str(small_model)]) == 1
    assert "give a folder" in capsys.readouterr().err


def test_usage_and_version() -> None:
    for arguments, code in (
        (["reconstruct"], 2),
        (["nonsense"], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["fit", "--help"], 0),
    ):
        result = process(*arguments)
        assert result.returncode == code
        assert b"Traceback" not in result.stderr


INTERRUPTED = """
import signal, sys
from ear_vae.cli import main
from ear_vae.vae import EarVAE
signal.signal(signal.SIGINT, signal.default_int_handler)
whole = EarVAE.reconstruct
def announced(*arguments, **options):
    print("at work", flush=True)
    return whole(*arguments, **options)
EarVAE.reconstruct = announced
sys.exit(main(sys.argv[1:]))
"""


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


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = process("info", tmp_path / "nothing.wav", "--debug")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr
    assert b"EarVAEError" in result.stderr


def test_silence_and_one_sample_simply_work(tmp_path: Path, small_model: Path) -> None:
    for name, samples in (("silence", np.zeros((5000, 2))), ("one", np.full((1, 1), 0.5))):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
        out = tmp_path / f"{name} out.wav"
        assert (
            main(["reconstruct", str(tmp_path / f"{name}.wav"), str(out), "--model", str(small_model)]) == 0
        )
        assert soundfile.info(out).frames == len(samples)
        assert soundfile.info(out).channels == samples.shape[1]
