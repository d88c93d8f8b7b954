"""The architecture's config: what is accepted, what is refused, what is derived."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ear_vae import EarVAEConfig, EarVAEError


def test_the_defaults_are_the_published_44k() -> None:
    config = EarVAEConfig()
    assert config.downsampling_ratio == 1024
    assert config.latent_rate == pytest.approx(43.0664, abs=1e-4)
    assert config.block_widths == ((128, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048))


def test_the_published_48k() -> None:
    config = EarVAEConfig(sample_rate=48_000, strides=(2, 2, 4, 6, 10), transformer_depth=0)
    assert config.downsampling_ratio == 960
    assert config.latent_rate == 50


def test_values_are_compared_hashed_and_immutable() -> None:
    config = EarVAEConfig(strides=[2, 4, 4, 4, 8])  # type: ignore[arg-type] - as JSON gives it
    assert config == EarVAEConfig()
    assert hash(config) == hash(EarVAEConfig())
    assert config != EarVAEConfig(channels=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.channels = 2  # type: ignore[misc]


def test_round_trips_through_json(tmp_path: Path) -> None:
    config = EarVAEConfig(
        sample_rate=48_000, audio_channels=1, channels=6, channel_multipliers=(1, 3), strides=(2, 6)
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert EarVAEConfig.from_json(path) == config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"channels": "128"}, "channels must be an integer, got '128'"),
        ({"channels": 128.0}, "channels must be an integer, got 128.0"),
        ({"channels": True}, "channels must be an integer, got True"),
        ({"channels": None}, "channels must be an integer, got None"),
        ({"channels": 0}, "channels must be 1 to 4096, got 0"),
        ({"sample_rate": float("nan")}, "sample_rate must be an integer, got nan"),
        ({"sample_rate": -44_100}, "sample_rate must be 1000 to 768000 Hz, got -44100"),
        ({"sample_rate": 10**12}, "sample_rate must be 1000 to 768000 Hz, got 1000000000000"),
        ({"sample_rate": 10**400}, "sample_rate must be 1000 to 768000 Hz, got an integer of 1329 bits"),
        ({"channels": 10**400}, "channels must be 1 to 4096, got an integer of 1329 bits"),
        ({"channels": [[[[[[0]]]]]] * 1000}, "channels must be an integer, got [[[["),
        ({"channels": 4096}, "are more than 16384"),
        ({"strides": [2] * 3000, "channel_multipliers": [1] * 3000}, "has 3000 entries, 16 are the most"),
        ({"strides": [10**400] * 5}, "at most 65536 samples per frame, got (an integer of 1329 bits"),
        ({"strides": [64] * 5}, "at most 65536 samples per frame, got (64, 64, 64, 64, 64)"),
        ({"latent_dim": 0}, "latent_dim must be 1 to 4096"),
        ({"audio_channels": 6}, "audio_channels must be 1 to 2, got 6"),
        ({"strides": 8}, "strides must be a list of integers, got 8"),
        ({"strides": "24448"}, "strides must be a list of integers"),
        ({"strides": []}, "strides must be a list of integers, got []"),
        ({"strides": [2, 4, 4, 4, True]}, "strides must be a list of integers"),
        ({"strides": [2, 4, 4, 4, 8.0]}, "strides must be a list of integers"),
        ({"strides": [2, 4, 4, 4, 5]}, "strides must be even and at least 2"),
        ({"strides": [2, 4, 4, 4, 0]}, "strides must be even and at least 2"),
        ({"strides": [2, 4, 4, 4, -2]}, "strides must be even and at least 2"),
        ({"strides": [2, 4]}, "equally long, got 5 and 2"),
        ({"channel_multipliers": [1, 2, 4, 8, 0]}, "channel_multipliers must be at least 1"),
        ({"channel_multipliers": {"a": 1}}, "channel_multipliers must be a list of integers"),
        ({"transformer_depth": -1}, "transformer_depth must be 0 to 256"),
        ({"transformer_depth": 10**9}, "transformer_depth must be 0 to 256"),
        (
            {"transformer_head_dim": 48},
            "transformer_head_dim must be even and divide latent_dim (64), got 48",
        ),
        ({"transformer_head_dim": 1}, "transformer_head_dim must be even"),
        ({"architecture": 1}, "architecture must be a name, got 1"),
        ({"snakes_per_residual_unit": 3}, "snakes_per_residual_unit must be 1 to 2, got 3"),
        ({"min_std": -1e-4}, "min_std must be a number from 0 to 1, got -0.0001"),
        ({"min_std": float("nan")}, "min_std must be a number from 0 to 1, got nan"),
        ({"min_std": True}, "min_std must be a number from 0 to 1, got True"),
        ({"min_std": "0"}, "min_std must be a number from 0 to 1, got '0'"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], problem: str) -> None:
    values = {**EarVAEConfig().to_dict(), **changes}
    with pytest.raises(EarVAEError) as caught:
        EarVAEConfig.from_dict(values)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 250


def test_integers_of_numpy_are_taken_and_kept_as_pythons() -> None:
    config = EarVAEConfig(sample_rate=np.int64(48_000), strides=tuple(np.array([2, 4, 4, 4, 8])))
    assert config == EarVAEConfig(sample_rate=48_000)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_the_head_size_is_free_without_a_transformer() -> None:
    assert EarVAEConfig(latent_dim=10, transformer_depth=0).latent_dim == 10


def test_unknown_fields_are_named_with_the_version_that_does_not_have_them() -> None:
    values = EarVAEConfig().to_dict()
    expected = (
        r"config: unknown \['dilation'\]; the fields of format version 1 are \['sample_rate', .*'strides'"
    )
    with pytest.raises(EarVAEError, match=expected):
        EarVAEConfig.from_dict({**values, "dilation": 3})


def test_absent_fields_have_their_defaults() -> None:
    values = EarVAEConfig(channels=8, transformer_depth=1).to_dict()
    for name in ("architecture", "transformer_head_dim", "strides"):
        del values[name]
    assert EarVAEConfig.from_dict(values) == EarVAEConfig(channels=8, transformer_depth=1)


def test_a_file_states_its_version_and_its_architecture(tmp_path: Path) -> None:
    config, path = EarVAEConfig(channels=6), tmp_path / "config.json"
    path.write_text(config.to_json())
    values = json.loads(path.read_text())
    assert values.pop("format_version") == 1
    assert values.pop("architecture") == "ear_vae"
    assert EarVAEConfig.from_json(path) == config
    path.write_text(json.dumps(values))  # written by hand
    assert EarVAEConfig.from_json(path) == config


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.0, [1]])
def test_a_file_of_another_version_is_refused(version: object, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**EarVAEConfig().to_dict(), "format_version": version, "new": 1}))
    with pytest.raises(EarVAEError, match=r"config\.json: config: format version .*reads 1; update ear-vae"):
        EarVAEConfig.from_json(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '"config"', "\x00", "[" * 100_000, "1" * 5000, '{"a": ' * 900, " " * 2**21],
)
def test_files_that_are_no_config(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(EarVAEError, match=r"config\.json: ") as caught:
        EarVAEConfig.from_json(path)
    assert "\n" not in str(caught.value)
    assert "set_int_max_str_digits" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match=r"nowhere\.json: cannot read the config"):
        EarVAEConfig.from_json(tmp_path / "nowhere.json")
    with pytest.raises(EarVAEError, match="cannot read the config"):
        EarVAEConfig.from_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(EarVAEError, match=r"latin\.json: cannot read the config"):
        EarVAEConfig.from_json(tmp_path / "latin.json")
