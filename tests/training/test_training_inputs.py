"""What training and release make of inputs that are no good: one clear line, and nothing half-done."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAE
from ear_vae.cli import main

NARROW = ["--model.config.channels", "4", "--model.config.channel_multipliers", "[1,2,2,2,2]"]
SHORT = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
SHORT += ["--trainer.enable_model_summary", "false", "--trainer.logger", "false", "--data.num_workers", "0"]
SHORT += ["--data.segment_seconds", "0.1", "--data.batch_size", "1", "--data.segments_per_epoch", "10"]
JUDGE = ["--model.discriminator.channels", "4", "--model.discriminator.window_sizes", "[512,128]"]
ADVICE = ("weights_only", "re-running", "allowlist", "safe_globals")


def in_a_process(*arguments: str | Path | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ear_vae", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=300,
    )


def complaint(stderr: str) -> str:
    """The one line that says why the command failed."""
    lines = [line for line in stderr.splitlines() if line.startswith("ear-vae: ")]
    assert len(lines) == 1, stderr
    assert "unexpected" not in lines[0]
    assert not any(word in lines[0] for word in ADVICE), stderr
    assert len(lines[0]) < 700
    return lines[0]


def fit(music: Path | str, root: Path, *options: str | Path) -> list[str]:
    arguments = ["fit", "--data.folder", music, "--trainer.default_root_dir", root, *NARROW, *SHORT, *options]
    return list(map(str, arguments))


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    generator = np.random.default_rng(0)
    for index in range(2):
        soundfile.write(folder / f"{index}.wav", 0.1 * generator.standard_normal((22_050, 2)), 44_100)
    return folder


@pytest.fixture(scope="module")
def trained(music: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one step."""
    root = tmp_path_factory.mktemp("run")
    assert main(fit(music, root)) == 0
    return root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def content(trained: Path) -> dict[str, Any]:
    return dict(torch.load(trained, weights_only=True))


OPTIONS = [
    (["--model.variant", "ear_vae_44k"], "variant chooses among the models of pretrained"),
    (["--model.initialization", "filter_bank"], "initialization is for a new model"),
    (["--model.training_state", "state.safetensors"], "training_state goes on with the model"),
    (["--model.adversarial_after", "5"], "but there is no discriminator"),
    (
        ["--model.objective.weights", "{adversarial: 0.1}"],
        "adversarial has the weight 0.1, but there is no discriminator",
    ),
    (
        [*JUDGE, "--model.objective.weights", "{adversarial: 0, feature_matching: 0}"],
        "nothing learns from the discriminator",
    ),
    (
        [
            "--model.objective.weights",
            "{spectral_convergence: 0, log_magnitude: 0, correlation: 0, "
            "instantaneous_frequency: 0, group_delay: 0, kl: 0}",
        ],
        "nothing to minimise",
    ),
    (["--model.objective.weights", "{waveform: .inf}"], "loss weights must be finite"),
    (["--model.train_encoder", "false", "--model.objective.weights", "{kl: 0.1}"], "kl has the weight 0.1"),
    (["--model.seed", "-1"], "seed must be an integer of 0 or more"),
    (["--model.optimizer.betas", "[0.8, 1.5]"], "betas must be two numbers in [0, 1)"),
    (["--model.optimizer.weight_decay", ".inf"], "weight_decay must be finite"),
    (["--data.seed", "-1"], "seed must be an integer of 0 or more, got -1"),
    (["--data.segment_seconds", ".inf"], "segment_seconds and validation_seconds must be finite"),
    (["--data.min_level_db", ".nan"], "min_level_db must be"),
    (["--trainer.gradient_clip_val", "1"], "gradient clipping"),
    (["--ckpt_path", "last"], "last: no such file"),
]
PRETRAINED = ("initialization is for", "kl has the weight")


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_options_that_do_nothing_or_cannot_be(
    options: list[str], message: str, music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit(music, tmp_path, *options)
    if message.startswith(PRETRAINED):
        arguments = [a for a in arguments if a not in NARROW] + ["--model.pretrained", "ear-vae-tiny"]
    assert main(arguments) == 1
    assert message in complaint(capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


MANIFESTS: list[tuple[str, str, bytes, str]] = [
    ("a NUL in a path", "m.csv", b"path\n\x00.wav\n", "line 2: the path "),
    ("a NUL in JSON", "m.jsonl", b'{"path": "a\\u0000.wav"}', "holds a NUL character"),
    ("deep JSON", "m.jsonl", b'{"path": ' + b"[" * 100_000, "nested too deeply"),
    ("400 digits", "m.jsonl", b'{"path": "a.wav", "weight": ' + b"9" * 400 + b"}", "weight must be a number"),
    ("400 digits of text", "m.csv", b"path,weight\na.wav," + b"9" * 400, "weight must be a number"),
    ("a weight that is NaN", "m.csv", b"path,weight\na.wav,nan\n", "weight must be a number"),
    (
        "a weight that is NaN in JSON",
        "m.jsonl",
        b'{"path": "a.wav", "weight": NaN}',
        "weight must be a number",
    ),
    ("no column of paths", "m.csv", b"file,weight\na.wav,1\n", "line 2: has no 'path'"),
    ("a column twice", "m.csv", b"path,path\na.wav,b.wav\n", "it has two columns 'path'"),
    ("latin-1", "m.csv", "path\ncafé.wav\n".encode("latin-1"), "is not UTF-8 at byte 8"),
    ("UTF-16", "m.jsonl", '{"path": "a.wav"}'.encode("utf-16"), "is not UTF-8 at byte 0"),
    ("an endless field", "m.csv", b"path\n" + b"a" * 200_000, "field larger than field limit"),
    ("empty", "m.csv", b"", "no usable audio: 0 audio files"),
]


@pytest.mark.parametrize(
    ("name", "text", "message"), [row[1:] for row in MANIFESTS], ids=[row[0] for row in MANIFESTS]
)
def test_manifests(
    name: str, text: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(text)
    assert main(fit(tmp_path / name, tmp_path)) == 1
    assert message in complaint(capsys.readouterr().err)


class Evil:
    """Would leave a file behind if it were restored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def cut(path: Path, trained: Path, content: dict[str, Any]) -> None:
    path.write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])


def empty(path: Path, trained: Path, content: dict[str, Any]) -> None:
    path.write_bytes(b"")


def text(path: Path, trained: Path, content: dict[str, Any]) -> None:
    path.write_text("hello")


def evil(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save(content | {"state_dict": Evil(path.parent / "executed")}, path)


def foreign(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save({key: value for key, value in content.items() if key != "ear_vae"}, path)


def bare(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def listing(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save([1, 2, 3], path)


def facts_of_other_types(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save(content | {"ear_vae": content["ear_vae"] | {"validation": {"validation/total": "low"}}}, path)


def facts_of_another_config(path: Path, trained: Path, content: dict[str, Any]) -> None:
    changed = content["ear_vae"] | {"config": content["ear_vae"]["config"] | {"channels": 10**9}}
    torch.save(content | {"ear_vae": changed}, path)


def lacking_weights(path: Path, trained: Path, content: dict[str, Any]) -> None:
    left = {k: v for k, v in content["state_dict"].items() if not k.endswith("decoder.conv_in.bias")}
    torch.save(content | {"state_dict": left}, path)


def not_finite(path: Path, trained: Path, content: dict[str, Any]) -> None:
    state = {name: tensor.clone() for name, tensor in content["state_dict"].items()}
    for name, tensor in state.items():
        if name.endswith("decoder.conv_in.bias"):
            tensor[0] = torch.nan
    torch.save(content | {"state_dict": state}, path)


def moments_of_other_shapes(path: Path, trained: Path, content: dict[str, Any]) -> None:
    states = copy.deepcopy(content["optimizer_states"])
    states[0]["state"][3]["exp_avg"] = torch.zeros(1, 2, 3, 4)
    torch.save(content | {"optimizer_states": states}, path)


def no_moments(path: Path, trained: Path, content: dict[str, Any]) -> None:
    torch.save(content | {"optimizer_states": [{}]}, path)


CHECKPOINTS = [
    (cut, "cut off or damaged"),
    (empty, "is empty"),
    (text, "is not a checkpoint"),
    (evil, "holds objects that only running code"),
    (foreign, "is not a checkpoint of ear-vae fit"),
    (bare, "is not a checkpoint of ear-vae fit"),
    (listing, "is not a checkpoint of ear-vae fit"),
    (facts_of_other_types, "damaged: its values are not of the types"),
    (
        facts_of_another_config,
        ("another architecture", "channels must be 1 to 4096"),
    ),
    (lacking_weights, "the weights do not fit the config: missing"),
    (not_finite, "decoder.conv_in.bias holds NaN or infinity"),
    (moments_of_other_shapes, "damaged: the states of its optimizers"),
    (no_moments, "damaged: the states of its optimizers"),
]


@pytest.mark.parametrize(("make", "message"), CHECKPOINTS, ids=[make.__name__ for make, _ in CHECKPOINTS])
@pytest.mark.parametrize("command", ["fit", "release", "release --raw"])
def test_checkpoints(
    command: str,
    make: Callable[[Path, Path, dict[str, Any]], None],
    message: str | tuple[str, str],
    trained: Path,
    content: dict[str, Any],
    music: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "some.ckpt", tmp_path / "out"
    make(path, trained, content)
    if command == "fit":
        arguments = fit(music, out, "--ckpt_path", path, "--trainer.max_steps", "2")
    else:
        arguments = [*command.split(), str(path), str(out)]
    assert main(arguments) == 1
    found = complaint(capsys.readouterr().err)
    expected = message if isinstance(message, str) else message[command != "fit"]
    assert any(part in found for part in expected.split("|")), found
    assert "some.ckpt" in found or "another architecture" in found
    assert not (tmp_path / "executed").exists()
    # `fit` notes its options there; a release leaves nothing.
    assert {p.name for p in tmp_path.iterdir()} <= {"some.ckpt", *(["out"] if command == "fit" else [])}
    assert not (out / "model").exists()


@pytest.mark.parametrize("command", ["fit", "release"])
def test_in_a_process_of_its_own(
    command: str, trained: Path, content: dict[str, Any], music: Path, tmp_path: Path
) -> None:
    cut(tmp_path / "cut.ckpt", trained, content)
    if command == "fit":
        result = in_a_process(*fit(music, tmp_path, "--ckpt_path", tmp_path / "cut.ckpt"))
    else:
        result = in_a_process("release", tmp_path / "cut.ckpt", tmp_path / "out")
    assert result.returncode == 1
    assert "cut off or damaged" in complaint(result.stderr)
    assert not any(word in result.stderr for word in (*ADVICE, "Traceback"))


def test_errors_name_the_options_of_fit(
    music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which are longer than those of the other commands."""
    (tmp_path / "config.json").write_text('{"variants": {"a": {}, "b": {}}}')
    arguments = ["fit", "--data.folder", music, "--trainer.default_root_dir", tmp_path / "run"]
    assert main(list(map(str, [*arguments, "--model.pretrained", tmp_path]))) == 1
    assert complaint(capsys.readouterr().err).endswith("choose one of 'a', 'b' (--model.variant)")


def test_a_checkpoint_of_another_architecture(
    trained: Path, music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit(music, tmp_path, "--ckpt_path", trained, "--model.config.channels", "8")
    assert main(arguments) == 1
    assert "the checkpoint is of another architecture" in complaint(capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a run in another folder
def test_a_checkpoint_does_not_change_the_run(
    content: dict[str, Any],
    music: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options that Lightning would take from it, and a class that it would import."""
    (tmp_path / "evil.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'executed')!r})\nclass Module: ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    planted: list[dict[str, Any]] = [
        {"seed": 7, "optimizer": {"learning_rate": 0.5}, "max_skipped_steps": 1},
        {"_class_path": "evil.Module", "seed": 7},
    ]
    for number, hyper_parameters in enumerate(planted):
        path, root = tmp_path / f"{number}.ckpt", tmp_path / str(number)
        torch.save(content | {"hyper_parameters": hyper_parameters}, path)
        code = main(fit(music, root, "--ckpt_path", path, "--trainer.max_steps", "2"))
        shown = capsys.readouterr().err
        if "_class_path" in hyper_parameters:
            assert code == 1
            assert "name something to import (_class_path), which is never done" in complaint(shown)
            continue
        assert code == 0, shown
        after = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        assert after["global_step"] == 2
        assert after["ear_vae"]["settings"] == content["ear_vae"]["settings"]
        assert after["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-4
        assert f"ckpt_path: {path}" in (root / "config.yaml").read_text(encoding="utf-8")
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_on_other_data_says_what_changed(
    trained: Path, music: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(music, other)
    shutil.copy(other / "0.wav", other / "2.wav")
    changed = ["--data.batch_size", "2", "--data.seed", "9", "--data.segment_seconds", "0.2"]
    changed += [
        "--model.optimizer.learning_rate",
        "0.5",
        "--trainer.max_steps",
        "2",
        "--ckpt_path",
        str(trained),
    ]
    assert main(fit(other, tmp_path, *changed)) == 0
    (line,) = (line for line in caplog.messages if "resuming on other data" in line)
    for fact in (
        f"data: ['{music}'] there, ['{other}'] here",
        "files: 2 there, 3 here",
        "segment samples: 4096 there, 9216 here",
        "batch size: 1 there, 2 here",
        "seed: 0 there, 9 here",
    ):
        assert fact in line
    (line,) = (line for line in caplog.messages if "resuming with other settings" in line)
    assert "learning_rate 0.5" in line


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a run in another folder
def test_resuming_on_the_same_data_says_nothing(
    trained: Path, music: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Whatever a run before has made of it.
    caplog.set_level(logging.INFO, "lightning.pytorch")
    assert main(fit(music, tmp_path, "--ckpt_path", trained, "--trainer.max_steps", "2")) == 0
    assert "Restored all states from the checkpoint" in caplog.text
    assert "resuming" not in caplog.text


@pytest.mark.slow
def test_a_folder_with_all_kinds_of_names(music: Path, tmp_path: Path) -> None:
    """Names that are no UTF-8, a pipe, a folder too deep to be opened: reported, and left out."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    folder = tmp_path / "music"
    shutil.copytree(music, folder)
    os.mkfifo(folder / "pipe.wav")
    try:
        shutil.copy(os.fsencode(folder / "0.wav"), os.fsencode(folder) + b"/caf\xe9.wav")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    here = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        here, before = os.open("d" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    result = in_a_process(*fit(folder, tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"left out, unreadable: {folder / 'pipe.wav'}: is a pipe" in result.stderr
    assert result.stderr.count("left out, unreadable: ") >= 2
    assert "File name too long" in result.stderr
    found = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["AudioDataModule"]
    assert found["files"] == 3 or (found["files"] == 2 and "caf" in result.stderr)
    # The same again, from the cache.
    assert in_a_process(*fit(folder, tmp_path, "--force")).returncode == 0


def test_release_to_a_folder_that_holds_other_files(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert main(["release", str(trained), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    EarVAE.from_pretrained(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_release_does_not_replace_a_card_unasked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    assert main(["release", str(trained), str(tmp_path / "model")]) == 1
    assert "holds README.md already" in complaint(capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["README.md"]
    assert main(["release", str(trained), str(tmp_path / "model"), "--force"]) == 0
    assert (tmp_path / "model" / "README.md").read_text() != "mine"
