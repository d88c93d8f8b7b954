"""What is written can be loaded again; what could not be is not written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae._atomic import atomic_folder
from ear_vae.pretrained import convert
from ear_vae.training import EarVAEModule


def in_training(config: EarVAEConfig) -> EarVAE:
    return EarVAEModule(config).vae


def not_finite(config: EarVAEConfig) -> EarVAE:
    vae = EarVAE(config).requires_grad_(False)
    vae.encoder.conv_in.weight[0, 0, 0] = torch.nan
    return vae


def beyond_float32(config: EarVAEConfig) -> EarVAE:
    vae = EarVAE(config).double().requires_grad_(False)
    vae.encoder.conv_in.weight[0, 0, 0] = 1e300
    return vae


def without_values(config: EarVAEConfig) -> EarVAE:
    return EarVAE(config).to("meta")


def pruned(config: EarVAEConfig) -> EarVAE:
    vae = EarVAE(config)
    prune.l1_unstructured(vae.encoder.conv_in, "weight", 0.5)
    return vae


def wrapped(config: EarVAEConfig) -> EarVAE:
    vae = EarVAE(config)
    vae.encoder = torch.compile(vae.encoder)  # compiles nothing before it runs
    return vae


@pytest.mark.parametrize("make", [in_training, not_finite, beyond_float32, without_values, pruned, wrapped])
def test_a_model_that_could_not_be_loaded_is_not_written(
    make: Callable[[EarVAEConfig], EarVAE], least_config: EarVAEConfig, tmp_path: Path
) -> None:
    whole = EarVAE(least_config)
    whole.save_pretrained(tmp_path / "old")
    for folder in ("new", "old"):
        with pytest.raises(EarVAEError, match="nothing was written: a model in training is written by"):
            make(least_config).save_pretrained(tmp_path / folder)
    assert not (tmp_path / "new").exists()
    assert EarVAE.from_pretrained(tmp_path / "old").weights_sha256 == whole.weights_sha256


def test_a_name_that_is_none_leaves_nothing_behind(least_config: EarVAEConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        EarVAE(least_config, name=None).save_pretrained(tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16"])
def test_weights_are_stored_in_floating_point(
    dtype: torch.dtype, least_config: EarVAEConfig, tmp_path: Path
) -> None:
    EarVAE(least_config).save_pretrained(tmp_path / "model")
    with pytest.raises(EarVAEError, match="weights cannot be stored as"):
        convert(tmp_path / "model", tmp_path / "converted", dtype=dtype)
    assert not (tmp_path / "converted").exists()


def test_weights_beyond_float16_are_not_stored_in_it(least_config: EarVAEConfig, tmp_path: Path) -> None:
    vae = EarVAE(least_config).requires_grad_(False)
    vae.encoder.conv_in.weight[0, 0, 0] = 1e6
    vae.save_pretrained(tmp_path / "model")
    with pytest.raises(
        EarVAEError, match=r"encoder.conv_in.weight holds NaN or infinity; nothing was written"
    ):
        convert(tmp_path / "model", tmp_path / "converted", dtype=torch.float16)
    assert not (tmp_path / "converted").exists()


def test_there_are_two_layouts_to_convert_to(least_config: EarVAEConfig, tmp_path: Path) -> None:
    EarVAE(least_config).save_pretrained(tmp_path / "model")
    with pytest.raises(EarVAEError, match="to must be 'folder' or 'official', got 'Folder'"):
        convert(tmp_path / "model", tmp_path / "converted", to="Folder")  # type: ignore[arg-type]
    assert not (tmp_path / "converted").exists()


# Audit events come before a move: when the second one does, one file of the model has been replaced.
_INTERRUPT = """
import signal, sys

moves = []

def interrupt(event, arguments):
    if event == "os.rename" and sys.argv[2] in str(arguments[1]) and ".ear-vae-" not in str(arguments[1]):
        moves.append(arguments)
        if len(moves) == 2:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
"""
_CONVERTED = (
    _INTERRUPT
    + """
from ear_vae.cli import main

sys.addaudithook(interrupt)
code = main(["convert", *sys.argv[1:], "--force"])
assert len(moves) > 1
sys.exit(code)
"""
)
_SAVED = (
    _INTERRUPT
    + """
from ear_vae import EarVAE

vae = EarVAE.from_pretrained(sys.argv[1])
sys.addaudithook(interrupt)
vae.save_pretrained(sys.argv[2])
"""
)


@pytest.mark.parametrize("to", ["folder", "official"])
def test_a_conversion_interrupted_while_it_replaces_a_model_leaves_a_model(
    least_config: EarVAEConfig, tmp_path: Path, to: str
) -> None:
    """All of one of the two."""
    wider = EarVAEConfig(**{**vars(least_config), "channels": 2 * least_config.channels})
    new, old, target = EarVAE(wider), EarVAE(least_config), tmp_path / "target"
    new.save_pretrained(tmp_path / "new")
    old.save_pretrained(tmp_path / "old")
    convert(tmp_path / "old", target, to=to)  # type: ignore[arg-type]
    command = [sys.executable, "-c", _CONVERTED, str(tmp_path / "new"), str(target), "--to", to]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130, ended.stderr
    assert EarVAE.from_pretrained(target).weights_sha256 in (new.weights_sha256, old.weights_sha256)
    assert [path for path in target.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("was_there", [False, True], ids=["no folder", "empty folder"])
def test_a_folder_that_came_to_exist_meanwhile_is_left_alone(tmp_path: Path, was_there: bool) -> None:
    target = tmp_path / "target"
    if was_there:
        target.mkdir()

    def write() -> None:
        with atomic_folder(target, overwrite=False) as folder:
            (folder / "weights").write_text("ours")
            target.mkdir(exist_ok=True)
            (target / "weights").write_text("theirs")

    with pytest.raises(EarVAEError, match="target: exists already"):
        write()
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("weights", "theirs")]


def test_tied_weights_are_stored_twice(least_config: EarVAEConfig, tmp_path: Path) -> None:
    vae = EarVAE(least_config)
    shapes: dict[torch.Size, torch.nn.Conv1d] = {}
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv1d):
            first = shapes.setdefault(module.weight.shape, module)
            module.weight = first.weight
    vae.save_pretrained(tmp_path / "tied")
    loaded = EarVAE.from_pretrained(tmp_path / "tied")
    assert sum(parameter.numel() for parameter in vae.parameters()) < sum(
        parameter.numel() for parameter in loaded.parameters()
    )
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_saving_over_a_model_is_all_or_nothing(least_config: EarVAEConfig, tmp_path: Path) -> None:
    wider = EarVAE(EarVAEConfig(**{**vars(least_config), "channels": 2 * least_config.channels}))
    wider.save_pretrained(tmp_path / "new")
    EarVAE(least_config).save_pretrained(tmp_path / "target")
    command = [sys.executable, "-c", _SAVED, str(tmp_path / "new"), str(tmp_path / "target")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in ended.stderr
    assert EarVAE.from_pretrained(tmp_path / "target").weights_sha256 == wider.weights_sha256


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_private_files_become_ordinary_ones(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "model", overwrite=False) as folder:
            (folder / "weights").touch(mode=0o600)
    finally:
        os.umask(umask)
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o640
