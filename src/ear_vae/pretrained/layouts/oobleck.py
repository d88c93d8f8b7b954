"""Oobleck, as diffusers and stable-audio-tools keep it: their configs and state dicts, and the way to ours.

Oobleck is the autoencoder of Stable Audio. It is this network without the transformer, with two Snakes in a
residual unit and a floor of 1e-4 under the posterior's standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ear_vae._torch_files import load_tensors
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import read_json, shown
from ear_vae.pretrained.conversion_cache import converted_once, file_sha256
from ear_vae.pretrained.folder import WEIGHTS_FILE, expected_shapes, require_fit
from ear_vae.pretrained.layouts.official_state_dict import from_official
from ear_vae.pretrained.layouts.weight_norm import folded

CLASS_KEY = "_class_name"
"""What tells the config of a diffusers model from others."""
_MODEL_TYPE_KEY = "model_type"  # of stable-audio-tools
OUR_CLASS = "AutoencoderEarVAE"
"""Class of `ear_vae.integrations.diffusers`."""
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
STABLE_AUDIO_CONFIG_FILE = "model_config.json"
STABLE_AUDIO_WEIGHTS_FILES = (WEIGHTS_FILE, "model.ckpt")
MODULE_PREFIX = "vae."
"""Prefix of our tensors in the state dict of `AutoencoderEarVAE`."""

_OOBLECK: dict[str, Any] = {"transformer_depth": 0, "snakes_per_residual_unit": 2, "min_std": 1e-4}
# Our field by that of diffusers, and diffusers' default for Oobleck.
_DIFFUSERS_FIELDS = {
    "sample_rate": ("sampling_rate", 44_100),
    "audio_channels": ("audio_channels", 2),
    "channels": ("encoder_hidden_size", 128),
    "channel_multipliers": ("channel_multiples", (1, 2, 4, 8, 16)),
    "strides": ("downsampling_ratios", (2, 4, 4, 8, 8)),
    "latent_dim": ("decoder_input_channels", 64),
}
# Fields that diffusers' Oobleck does not have.
_OUR_FIELDS = (
    "transformer_depth",
    "transformer_head_dim",
    "architecture",
    "snakes_per_residual_unit",
    "min_std",
    "latents_mean",
    "latents_std",
)
# Where the tensors of an autoencoder are in checkpoints of stable-audio-tools: in its own, in those of its
# training, and in those of a diffusion model that it belongs to.
_PREFIXES = ("", "autoencoder.", "pretransform.model.")


@dataclass(frozen=True)
class _Layout:
    """One way to keep a model.

    Attributes:
        config: Our config for the parsed file.
        state: Our tensors for those of the file.
    """

    config: Callable[[Any], EarVAEConfig]
    state: Callable[[Path, EarVAEConfig], dict[str, Tensor]]


def convert_diffusers(config_path: Path, weights_path: Path, *, name: str, cache: Path) -> Path:
    """A folder in our layout with the model of a diffusers folder, converted unless it was before.

    Args:
        config_path: Its `config.json`.
        weights_path: Its `diffusion_pytorch_model.safetensors`.
        name: Name of the model in its card.
        cache: Where such folders are kept.

    Raises:
        EarVAEError: It is of another class or of an Oobleck that this network cannot be, a file is damaged,
            the two do not fit each other, or the cache cannot be written to.
    """
    return _convert(_DIFFUSERS, config_path, weights_path, name=name, cache=cache)


def convert_stable_audio(config_path: Path, weights_path: Path, *, name: str, cache: Path) -> Path:
    """The same for a model of stable-audio-tools, alone or inside a diffusion model.

    Args:
        config_path: Its `model_config.json`.
        weights_path: Its `model.safetensors` or `model.ckpt`.
        name: Name of the model in its card.
        cache: Where such folders are kept.

    Raises:
        EarVAEError: As `convert_diffusers`.
    """
    return _convert(_STABLE_AUDIO, config_path, weights_path, name=name, cache=cache)


def _convert(layout: _Layout, config_path: Path, weights_path: Path, *, name: str, cache: Path) -> Path:
    def make() -> tuple[EarVAEConfig, dict[str, Tensor]]:
        config = require_config(layout.config, config_path)
        return config, layout.state(weights_path, config)

    key = f"oobleck {file_sha256(weights_path)} {file_sha256(config_path)}"
    return converted_once(key, make, name=name, cache=cache)


def require_config(read: Callable[[Any], EarVAEConfig], path: Path) -> EarVAEConfig:
    """Our config for a file, with the file in what goes wrong; before a large download of its weights.

    Raises:
        EarVAEError: As `read`, or the file cannot be read.
    """
    return _config(read, read_json(path), path)


def is_oobleck_config(values: Mapping[str, Any]) -> bool:
    """Whether a parsed config is one of diffusers or of stable-audio-tools, whatever it is of."""
    return CLASS_KEY in values or _MODEL_TYPE_KEY in values


def read_oobleck(
    values: Mapping[str, Any], where: str, weights: Path
) -> tuple[EarVAEConfig, dict[str, Tensor]]:
    """Reads the weights to a config of diffusers or of stable-audio-tools.

    Args:
        values: The parsed config.
        where: Where it came from, for messages.
        weights: The file of weights.

    Raises:
        EarVAEError: As `convert_diffusers`.
    """
    layout = _DIFFUSERS if CLASS_KEY in values else _STABLE_AUDIO
    config = _config(layout.config, values, where)
    return config, layout.state(weights, config)


def _config(read: Callable[[Any], EarVAEConfig], values: Any, where: Path | str) -> EarVAEConfig:
    try:
        return read(values)
    except EarVAEError as error:
        raise EarVAEError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(f"{where}: field missing or of the wrong type: {shown(error)}") from error


def config_of_diffusers(values: Any) -> EarVAEConfig:
    """Our config for that of diffusers' `AutoencoderOobleck` or of our `AutoencoderEarVAE`.

    Args:
        values: The parsed `config.json`.

    Raises:
        EarVAEError: It is of another class, or of a network that ours cannot be.
    """
    name = values[CLASS_KEY]
    if name not in (OUR_CLASS, "AutoencoderOobleck"):
        raise EarVAEError(
            f"is the config of {shown(name)}; expected AutoencoderOobleck (Stable Audio's) or {OUR_CLASS}"
        )
    fields = _DIFFUSERS_FIELDS.items()
    if name == OUR_CLASS:
        taken = {ours: values[theirs] for ours, (theirs, _) in fields if theirs in values}
        config = EarVAEConfig.from_dict({**taken, **{f: values[f] for f in _OUR_FIELDS if f in values}})
    else:
        taken = {ours: values.get(theirs, default) for ours, (theirs, default) in fields}
        config = EarVAEConfig.from_dict({**taken, **_OOBLECK})
    _require(
        {
            "decoder_channels": values.get("decoder_channels", 128) == config.channels,
            "encoder_hidden_size": name == OUR_CLASS or config.channels == 2 * config.latent_dim,
        }
    )
    return config


def config_for_diffusers(config: EarVAEConfig) -> dict[str, Any]:
    """The arguments of `AutoencoderEarVAE` for our config."""
    values = config.to_dict()
    return {
        **{theirs: values[ours] for ours, (theirs, _) in _DIFFUSERS_FIELDS.items()},
        "decoder_channels": config.channels,
        **{field: values[field] for field in _OUR_FIELDS if field in values},
    }


def config_of_stable_audio(values: Any) -> EarVAEConfig:
    """Our config for that of an Oobleck of stable-audio-tools, alone or as a diffusion model's pretransform.

    Args:
        values: The parsed `model_config.json`.

    Raises:
        EarVAEError: It is of another autoencoder, or of an Oobleck that our network cannot be.
    """
    model = values["model"]
    if values[_MODEL_TYPE_KEY] != "autoencoder":
        pretransform = model["pretransform"]
        if pretransform["type"] != "autoencoder":
            raise EarVAEError(f"its pretransform is {shown(pretransform['type'])}; expected an autoencoder")
        model = pretransform["config"]
    kinds = {model["encoder"]["type"], model["decoder"]["type"]}
    if kinds != {"oobleck"}:
        raise EarVAEError(f"its autoencoder is {shown(', '.join(sorted(kinds)))}; expected oobleck")
    encoder, decoder = model["encoder"]["config"], model["decoder"]["config"]
    config = EarVAEConfig(
        sample_rate=values["sample_rate"],
        audio_channels=model["io_channels"],
        channels=encoder.get("channels", 128),
        channel_multipliers=encoder.get("c_mults", (1, 2, 4, 8)),
        strides=encoder.get("strides", (2, 4, 8, 8)),
        latent_dim=model["latent_dim"],
        **_OOBLECK,
    )
    # Their defaults, where a field is absent.
    half = {"channels": 128, "c_mults": [1, 2, 4, 8], "strides": [2, 4, 8, 8]}
    _require(
        {
            "bottleneck.type": (model.get("bottleneck") or {}).get("type") == "vae",
            "pretransform": model.get("pretransform") is None,
            "encoder.use_snake": encoder.get("use_snake", False) is True,
            "decoder.use_snake": decoder.get("use_snake", False) is True,
            "encoder.antialias_activation": encoder.get("antialias_activation", False) is False,
            "decoder.antialias_activation": decoder.get("antialias_activation", False) is False,
            "decoder.use_nearest_upsample": decoder.get("use_nearest_upsample", False) is False,
            "decoder.final_tanh": decoder.get("final_tanh", True) is False,
            "decoder.soft_clip": model["decoder"].get("soft_clip", False) is False,
            "encoder.in_channels": encoder.get("in_channels", 2) == config.audio_channels,
            "decoder.out_channels": decoder.get("out_channels", 2) == config.audio_channels,
            "encoder.latent_dim": encoder.get("latent_dim", 32) == 2 * config.latent_dim,
            "decoder.latent_dim": decoder.get("latent_dim", 32) == config.latent_dim,
            "downsampling_ratio": model["downsampling_ratio"] == config.downsampling_ratio,
            **{f"decoder.{n}": decoder.get(n, d) == encoder.get(n, d) for n, d in half.items()},
        }
    )
    return config


def _require(found: Mapping[str, bool]) -> None:
    if unsupported := [name for name, fits in found.items() if not fits]:
        raise EarVAEError(f"unsupported or inconsistent values of {', '.join(unsupported)}")


def _state_of_diffusers(path: Path, config: EarVAEConfig) -> dict[str, Tensor]:
    state = _read(path, [""])
    if any(name.startswith(MODULE_PREFIX) for name in state):
        names = {name: f"{MODULE_PREFIX}{name}" for name in expected_shapes(config, path=path)}
        return _renamed(path, state, names, config)
    state = {
        # [1, C, 1] to [C]
        name: tensor.flatten() if name.endswith((".alpha", ".beta")) and tensor.ndim == 3 else tensor
        for name, tensor in state.items()
    }
    return _renamed(path, folded(path, state), dict(_diffusers_names(config)), config)


def _state_of_stable_audio(path: Path, config: EarVAEConfig) -> dict[str, Tensor]:
    return from_official(path, _read(path, _PREFIXES), config)


def _renamed(
    path: Path, state: Mapping[str, Tensor], names: Mapping[str, str], config: EarVAEConfig
) -> dict[str, Tensor]:
    """Our state dict of one with plain weights, given their name of each of our tensors.

    Raises:
        EarVAEError: Tensors are missing, unexpected or misshapen, by their names in the file.
    """
    shapes = expected_shapes(config, path=path)
    require_fit(path, state, {names[ours]: shape for ours, shape in shapes.items()})
    return {ours: state[names[ours]].float() for ours in shapes}


def _read(path: Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors below the first of the prefixes that has an encoder, without the prefix.

    Raises:
        EarVAEError: The file is missing or damaged, holds more than tensors, or none of an autoencoder.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                # A diffusion model is large beside its autoencoder: only the latter is read.
                selected = _below(list(file.keys()), prefixes, path)
                return {name: file.get_tensor(full) for full, name in selected.items()}
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise EarVAEError(f"{path}: not a readable safetensors file: {error}") from error
    state = load_tensors(path, str(path))
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise EarVAEError(f"{path}: expected a state dict, or one under 'state_dict'")
    with torch.inference_mode(False), torch.no_grad():
        return {name: state[full] for full, name in _below(list(state), prefixes, path).items()}


def _below(names: Sequence[str], prefixes: Sequence[str], path: Path) -> dict[str, str]:
    for prefix in prefixes:
        # Ours are one level down.
        if any(name.startswith((f"{prefix}encoder.", f"{prefix}{MODULE_PREFIX}encoder.")) for name in names):
            return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    raise EarVAEError(f"{path}: has no tensors of an autoencoder, but {shown(sorted(names)[:3])}")


def _diffusers_names(config: EarVAEConfig) -> Iterator[tuple[str, str]]:
    """Our name and that of `AutoencoderOobleck`, of every tensor with its weight norm folded."""

    def conv(ours: str, theirs: str, *, bias: bool = True) -> Iterator[tuple[str, str]]:
        for parameter in ("weight", "bias") if bias else ("weight",):
            yield f"{ours}.{parameter}", f"{theirs}.{parameter}"

    def snake(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield f"{ours}.log_alpha", f"{theirs}.alpha"
        yield f"{ours}.log_beta", f"{theirs}.beta"

    for half, strided in (("encoder", "conv1"), ("decoder", "conv_t1")):
        yield from conv(f"{half}.conv_in", f"{half}.conv1")
        for index in range(len(config.strides)):
            ours, theirs = f"{half}.blocks.{index}", f"{half}.block.{index}"
            yield from snake(f"{ours}.snake", f"{theirs}.snake1")
            yield from conv(f"{ours}.conv", f"{theirs}.{strided}")
            for unit in range(3):
                ours_unit, theirs_unit = f"{ours}.residual_units.{unit}", f"{theirs}.res_unit{unit + 1}"
                yield from snake(f"{ours_unit}.snake", f"{theirs_unit}.snake1")
                yield from conv(f"{ours_unit}.conv_dilated", f"{theirs_unit}.conv1")
                yield from snake(f"{ours_unit}.snake2", f"{theirs_unit}.snake2")
                yield from conv(f"{ours_unit}.conv_pointwise", f"{theirs_unit}.conv2")
        yield from snake(f"{half}.snake_out", f"{half}.snake1")
        yield from conv(f"{half}.conv_out", f"{half}.conv2", bias=half == "encoder")


_DIFFUSERS = _Layout(config_of_diffusers, _state_of_diffusers)
_STABLE_AUDIO = _Layout(config_of_stable_audio, _state_of_stable_audio)
