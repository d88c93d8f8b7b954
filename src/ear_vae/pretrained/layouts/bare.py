"""Bare files of weights, with a config or without, and clones of the authors' repository."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_vae._torch_files import load_tensors
from ear_vae.config import ConfigSource, EarVAEConfig, without_version
from ear_vae.errors import EarVAEError
from ear_vae.limits import read_json, sample_rate_of, shown
from ear_vae.pretrained.conversion_cache import converted_once
from ear_vae.pretrained.folder import (
    WEIGHTS_FILE,
    expected_shapes,
    read_safetensors,
    require_fit,
    require_stated,
)
from ear_vae.pretrained.layouts.official_state_dict import (
    OFFICIAL_LAYERS,
    from_official,
    official_config,
    transformer_fields,
)
from ear_vae.pretrained.layouts.oobleck import is_oobleck_config, read_oobleck
from ear_vae.pretrained.layouts.state_dict import autoencoder_state, first_convolution
from ear_vae.pretrained.layouts.weight_norm import folded

SAFETENSORS_SUFFIX = ".safetensors"
WEIGHTS_SUFFIXES = (".pyt", ".pt", ".pth", ".ckpt", ".bin", SAFETENSORS_SUFFIX)
"""What files of weights are called, in lower case."""
PRESETS: dict[str, dict[str, Any]] = {
    "ear_vae_44k": {"sample_rate": 44_100, "strides": [2, 4, 4, 4, 8]},
    "ear_vae_v2_48k": {"sample_rate": 48_000, "strides": [2, 2, 4, 6, 10]},
}
"""What a name in place of a config stands for; widths and depths are those of the tensors."""
_CLONED_WEIGHTS, _CLONED_CONFIGS = "pretrained_weight", "config"
_OFFICIAL, _OURS = "layers.0", "conv_in"
_LONGEST_POINTER = 1024


@dataclass(frozen=True)
class GivenConfig:
    """What is known of a model beside its tensors.

    Attributes:
        where: Where it came from, for messages.
        values: The parsed config: ours, whole or in part, the authors', or one of an Oobleck.
    """

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Names:
    """Names of the tensors that tell the shape of a network, without `.weight`.

    Attributes:
        first: First convolution of the encoder.
        strided: Strided convolution of a block, by its number from 0.
        last: Last convolution of the encoder, by the number of blocks.
        layers: Prefix of the transformer's layers.
    """

    first: str
    strided: str
    last: str
    layers: str

    def block(self, index: int) -> str:
        """Name of a block's strided convolution."""
        return self.strided.format(index, index + 1)


_NAMES = {
    _OFFICIAL: _Names(
        "encoder.layers.0", "encoder.layers.{1}.layers.4", "encoder.layers.{0}", OFFICIAL_LAYERS
    ),
    _OURS: _Names("encoder.conv_in", "encoder.blocks.{0}.conv", "encoder.conv_out", "transformer.layers."),
}


def given_configs(weights: Path, config: ConfigSource | None) -> list[GivenConfig]:
    """What a caller gives as a config, else the `.json` beside the weights, else nothing.

    Args:
        weights: The file of weights.
        config: A config, its fields, the path of a JSON file, or the name of a preset.

    Raises:
        EarVAEError: There is no such file or preset, or it holds no JSON object.
    """
    if isinstance(config, EarVAEConfig):
        return [GivenConfig("config", config.to_dict())]
    if isinstance(config, Mapping):
        return [GivenConfig("config", config)]
    if config is None:
        beside = weights.with_suffix(".json")
        return [_from_file(beside)] if beside.is_file() else []
    if not isinstance(config, (str, os.PathLike)):
        raise EarVAEError(
            f"config must be a file, a dict, an EarVAEConfig or one of {', '.join(PRESETS)}, "
            f"got {shown(config)}"
        )
    path = Path(os.path.expanduser(config))
    if str(config) in PRESETS and not path.exists():
        return [GivenConfig(f"config {config}", PRESETS[str(config)])]
    if not path.is_file():
        raise EarVAEError(
            f"{path}: no such file; the config of weights is a JSON file, or one of {', '.join(PRESETS)}",
            argument="config",
            value=str(config),
        )
    return [_from_file(path)]


def weights_in(folder: Path) -> dict[str, Path]:
    """The files of weights in a folder that has no config for all: a clone of the authors' repository.

    They lie in `pretrained_weight`, or in the folder itself.

    Returns:
        Paths relative to the folder, by the names of the files without their extensions.
    """
    for place in (Path(_CLONED_WEIGHTS), Path()):
        found = [
            place / path.name
            for path in sorted((folder / place).glob("*"))
            # That of our own layout has lost its config.
            if path.suffix.lower() in WEIGHTS_SUFFIXES and path.name != WEIGHTS_FILE and path.is_file()
        ]
        if found:
            return {path.stem: path for path in found}
    return {}


def configs_in(folder: Path, weights: Path) -> list[GivenConfig]:
    """The configs in a clone, of which one may be that of the weights: beside them, else all in `config`.

    Raises:
        EarVAEError: One holds no JSON object.
    """
    beside = given_configs(weights, None)
    return beside or [_from_file(path) for path in sorted((folder / _CLONED_CONFIGS).glob("*.json"))]


def convert_bare(path: Path, configs: Sequence[GivenConfig], *, sha256: str, name: str, cache: Path) -> Path:
    """A folder in our layout with the model of a bare file, converted unless it was before.

    Args:
        path: The file of weights.
        configs: Configs of which one is that of the weights; none where the tensors have to tell.
        sha256: Checksum of the file.
        name: Name of the model in its card.
        cache: Where such folders are kept.

    Raises:
        EarVAEError: The file is damaged or holds something else, it and the config do not fit each other, the
            tensors do not tell all that is needed, or the cache cannot be written to.
    """
    known = json.dumps([dict(config.values) for config in configs], sort_keys=True, default=str)
    return converted_once(f"bare {sha256} {known}", lambda: _read(path, configs), name=name, cache=cache)


def sample_rate_for(values: Mapping[str, Any], strides: Any, where: str) -> int:
    """The sample rate of an official config, which it seldom tells: else that of the published strides.

    Raises:
        EarVAEError: The strides are no published ones, and the config does not tell.
    """
    if "sample_rate" in values:
        return sample_rate_of(values["sample_rate"], f"{where}: sample_rate")
    if (published := _published_rate(strides)) is not None:
        return published
    raise EarVAEError(
        f"{where}: does not tell the sample rate, and strides {shown(strides)} are of no published model; "
        "add sample_rate to it"
    )


def _from_file(path: Path) -> GivenConfig:
    values = read_json(path)
    if not isinstance(values, dict):
        raise EarVAEError(f"{path}: expected a JSON object, got {shown(values)}")
    return GivenConfig(str(path), values)


def _read(path: Path, configs: Sequence[GivenConfig]) -> tuple[EarVAEConfig, dict[str, Tensor]]:
    if len(configs) == 1 and is_oobleck_config(configs[0].values):
        return read_oobleck(configs[0].values, configs[0].where, path)
    # Tensors made in inference mode could not be written.
    with torch.inference_mode(False), torch.no_grad():
        content, facts = _content(path)
        state = autoencoder_state(path, content)
        layout = first_convolution(state)
        if layout not in _NAMES:
            raise EarVAEError(
                f"{path}: these are weights of diffusers' AutoencoderOobleck, whose tensors do not tell all; "
                "give its config.json",
                argument="config",
                value=...,
            )
        state = folded(path, state)
        config = _config(path, state, _NAMES[layout], configs)
        if layout == _OFFICIAL:
            return config, from_official(path, state, config)
        require_fit(path, state, expected_shapes(config, path=path))
        ours = {name: tensor.float() for name, tensor in state.items()}
        require_stated(path, ours, facts)
        return config, ours


def _content(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, and what it states about it."""
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        return read_safetensors(path)
    with open(path, "rb") as file:
        if file.read(_LONGEST_POINTER).startswith(b"version https://git-lfs"):
            raise EarVAEError(
                f"{path}: is not the weights, but git's note of where they lie: run git lfs pull"
            )
    return load_tensors(path, str(path)), {}


def _config(
    path: Path, state: Mapping[str, Tensor], names: _Names, configs: Sequence[GivenConfig]
) -> EarVAEConfig:
    told = _told_by_tensors(path, state, names)
    if len(configs) <= 1:
        given = configs[0] if configs else GivenConfig(str(path), {})
        return _one_config(given, told)
    fitting = [config for config in configs if _has_strides(config.values, told["strides"])]
    found = {_one_config(config, told) for config in fitting}
    if len(found) == 1:
        return found.pop()
    listed = ", ".join(config.where for config in fitting or configs)
    problem = "differ, and all fit its tensors" if found else "do not fit its tensors"
    raise EarVAEError(f"{path}: {listed}: {problem}; name the right one", argument="config", value=...)


def _has_strides(values: Mapping[str, Any], strides: Sequence[int]) -> bool:
    try:
        return list(values["encoder"]["config"]["strides"]) == list(strides)
    except (KeyError, TypeError):
        return bool(values.get("strides") == list(strides))


def _told_by_tensors(path: Path, state: Mapping[str, Tensor], names: _Names) -> dict[str, Any]:
    """The fields of our config that shapes tell.

    Raises:
        EarVAEError: Tensors that tell are missing, or of shapes that no network of the family has.
    """

    def kernel(name: str) -> Tensor:
        tensor = state.get(f"{name}.weight")
        if tensor is None or tensor.ndim != 3 or not tensor.numel():
            found = "missing" if tensor is None else list(tensor.shape)
            raise EarVAEError(
                f"{path}: these are not the weights of an εar-VAE: {name}.weight is {found}, expected a "
                "convolution [out, in, taps]"
            )
        return tensor

    channels, audio_channels, _ = kernel(names.first).shape
    blocks: list[Tensor] = []
    while f"{names.block(len(blocks))}.weight" in state:
        blocks.append(kernel(names.block(len(blocks))))
    # The kernel of a strided convolution is two strides long.
    return {
        "audio_channels": audio_channels,
        "channels": channels,
        "channel_multipliers": [block.shape[0] // channels for block in blocks],
        "strides": [block.shape[-1] // 2 for block in blocks],
        "latent_dim": kernel(names.last.format(len(blocks) + 2)).shape[0] // 2,
        **transformer_fields(state, names.layers),
    }


def _one_config(given: GivenConfig, told: Mapping[str, Any]) -> EarVAEConfig:
    """Our config for a given one and what the tensors tell.

    Raises:
        EarVAEError: It is of another kind or contradicts itself, or both together do not tell enough.
    """
    values, where = given.values, given.where
    try:
        if "encoder" in values:
            return official_config(
                values,
                sample_rate=sample_rate_for(values, told["strides"], "official config"),
                transformer_depth=told["transformer_depth"],
                transformer_head_dim=told.get("transformer_head_dim"),
            )
        if "variants" in values or "model" in values:
            kind = "of several models; give their folder" if "variants" in values else "of another network"
            raise EarVAEError(f"config: is one {kind}")
        fields = {**told, **without_version(values)}
        if "sample_rate" not in fields:
            fields["sample_rate"] = _published_rate(fields["strides"])
        needed = ["sample_rate", *(["transformer_head_dim"] if fields["transformer_depth"] else [])]
        if missing := [name for name in needed if fields.get(name) is None]:
            raise EarVAEError(
                f"neither the tensors nor a config tell {' and '.join(missing)}; give a config.json, or a "
                "dict with it",
                argument="config",
                value=...,
            )
        return EarVAEConfig.from_dict(fields)
    except EarVAEError as error:
        raise EarVAEError(f"{where}: {error.message}", argument=error.argument, value=error.value) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(f"{where}: field missing or of the wrong type: {shown(error)}") from error


def _published_rate(strides: Any) -> int | None:
    listed = list(strides) if isinstance(strides, (list, tuple)) else None
    return next((preset["sample_rate"] for preset in PRESETS.values() if preset["strides"] == listed), None)
