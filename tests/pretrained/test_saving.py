"""What is written can be loaded again; what could not be is not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
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
