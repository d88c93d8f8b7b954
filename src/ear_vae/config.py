"""The architecture of an εar-VAE, as one validated value."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ear_vae.errors import EarVAEError
from ear_vae.limits import (
    HIGHEST_DOWNSAMPLING_RATIO,
    finite_number,
    integer,
    read_json,
    sample_rate_of,
    shown,
)

FORMAT_VERSION = 1
"""Version of `config.json`: a later one has fields that this package does not know."""
# A config from a stranger must not build a million layers.
_MOST_BLOCKS = 16
_HIGHEST = {
    "audio_channels": 2,
    "channels": 4096,
    "latent_dim": 4096,
    "transformer_depth": 256,
    "transformer_head_dim": 4096,
    "snakes_per_residual_unit": 2,
}
_WIDEST_BLOCK = 16_384
_STATISTICS = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class EarVAEConfig:
    """Everything that fixes the shapes of the network's tensors, and the statistics of its latents.

    The defaults are the published `ear_vae_44k`. A config is immutable, compares by value and is
    valid by construction.

    Args:
        sample_rate: Rate of the audio the network works on, 1 000 to 768 000 Hz.
        audio_channels: Channels of that audio, 1 or 2.
        channels: Width of the blocks at full rate, at most 4096; every other width is a multiple of it.
        channel_multipliers: One multiple of `channels` per block, from full rate to latent rate; at most 16
            blocks, none wider than 16 384.
        strides: Downsampling of each block, together at most 65 536. Even: with an odd stride the published
            padding would change the length.
        latent_dim: Channels of the latents, at most 4096.
        transformer_depth: Layers of the transformer on the latents, at most 256; 0 for none.
        transformer_head_dim: Channels of one attention head; divides `latent_dim` and is even.
        architecture: Family of networks, one of `ear_vae.network.ARCHITECTURES`.
        snakes_per_residual_unit: 1 for one Snake that serves both places of a residual unit, 2 for one each,
            as in Oobleck.
        min_std: What is added to the softplus that gives the posterior's standard deviation, 0 to 1; 1e-4 in
            Oobleck.
        latents_mean: Mean of each latent channel over a data set, `latent_dim` numbers, or None where it was
            not measured (`ear-vae statistics`). The network does not use it, `EarVAE.normalize` does.
        latents_std: Standard deviation of each latent channel, likewise and always with `latents_mean`.

    Raises:
        EarVAEError: A field has the wrong type or a value out of range.

    Examples:
        >>> from ear_vae import EarVAEConfig
        >>> config = EarVAEConfig(strides=(2, 4, 4, 8), channel_multipliers=(2, 4, 16, 48))
        >>> config.downsampling_ratio, config.latent_rate
        (256, 172.265625)
        >>> EarVAEConfig.from_dict(config.to_dict()) == config
        True
    """

    sample_rate: int = 44_100
    audio_channels: int = 2
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8, 16)
    strides: tuple[int, ...] = (2, 4, 4, 4, 8)
    latent_dim: int = 64
    transformer_depth: int = 2
    transformer_head_dim: int = 32
    architecture: str = "ear_vae"
    snakes_per_residual_unit: int = 1
    min_std: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _STATISTICS:
                continue
            if field.name == "architecture":
                if not isinstance(value, str):
                    raise EarVAEError(f"config: architecture must be a name, got {shown(value)}")
                continue
            if field.name == "min_std":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                    raise EarVAEError(f"config: min_std must be a number from 0 to 1, got {shown(value)}")
                object.__setattr__(self, field.name, float(value))
                continue
            if field.name in ("channel_multipliers", "strides"):
                listed = [integer(v) for v in value] if isinstance(value, (list, tuple)) else []
                if not listed or None in listed:
                    raise EarVAEError(f"config: {field.name} must be a list of integers, got {shown(value)}")
                if len(listed) > _MOST_BLOCKS:
                    raise EarVAEError(
                        f"config: {field.name} has {len(listed)} entries, {_MOST_BLOCKS} are the most"
                    )
                object.__setattr__(self, field.name, tuple(listed))
                continue
            number = integer(value)
            if number is None:
                raise EarVAEError(f"config: {field.name} must be an integer, got {shown(value)}")
            object.__setattr__(self, field.name, number)
            if field.name == "sample_rate":
                sample_rate_of(number, "config: sample_rate")
                continue
            lowest, highest = int(field.name != "transformer_depth"), _HIGHEST[field.name]
            if not lowest <= number <= highest:
                raise EarVAEError(f"config: {field.name} must be {lowest} to {highest}, got {shown(number)}")
        if len(self.channel_multipliers) != len(self.strides):
            raise EarVAEError(
                f"config: channel_multipliers and strides must be equally long, got "
                f"{len(self.channel_multipliers)} and {len(self.strides)}"
            )
        if min(self.channel_multipliers) < 1:
            raise EarVAEError(
                f"config: channel_multipliers must be at least 1, got {shown(self.channel_multipliers)}"
            )
        if max(self.channel_multipliers) * self.channels > _WIDEST_BLOCK:
            raise EarVAEError(
                f"config: {self.channels} channels times channel_multipliers "
                f"{shown(self.channel_multipliers)} are more than {_WIDEST_BLOCK}"
            )
        if any(stride < 2 or stride % 2 for stride in self.strides):
            raise EarVAEError(f"config: strides must be even and at least 2, got {shown(self.strides)}")
        if self.downsampling_ratio > HIGHEST_DOWNSAMPLING_RATIO:
            raise EarVAEError(
                f"config: strides must come to at most {HIGHEST_DOWNSAMPLING_RATIO} samples per frame, "
                f"got {shown(self.strides)}"
            )
        if self.transformer_depth and (
            self.latent_dim % self.transformer_head_dim or self.transformer_head_dim % 2
        ):
            raise EarVAEError(
                f"config: transformer_head_dim must be even and divide latent_dim ({self.latent_dim}), "
                f"got {self.transformer_head_dim}"
            )
        self._check_statistics()

    def _check_statistics(self) -> None:
        given = [name for name in _STATISTICS if getattr(self, name) is not None]
        if len(given) == 1:
            raise EarVAEError(f"config: {given[0]} is given alone; latents_mean and latents_std go together")
        for name in given:
            value = getattr(self, name)
            least = 0.0 if name == "latents_std" else -math.inf
            listed = list(value) if isinstance(value, (list, tuple)) else []
            if len(listed) != self.latent_dim or not all(finite_number(v) and v > least for v in listed):
                kind = "finite numbers" if name == "latents_mean" else "finite numbers above 0"
                raise EarVAEError(
                    f"config: {name} must be a list of {self.latent_dim} {kind}, one for each channel, "
                    f"got {shown(value)}"
                )
            object.__setattr__(self, name, tuple(map(float, listed)))

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)

    @property
    def latent_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.downsampling_ratio

    @property
    def block_widths(self) -> tuple[tuple[int, int], ...]:
        """Width of each block at its higher and at its lower rate, from full rate to latent rate."""
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        return tuple(zip([self.channels, *widths[:-1]], widths, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values, without statistics that there are not.

        `from_dict` takes them back.
        """
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: v for name, v in values.items() if not (name in _STATISTICS and v is None)}

    def to_json(self) -> str:
        """Returns the text of a `config.json`: the fields and the version of the format."""
        return json.dumps({"format_version": FORMAT_VERSION, **self.to_dict()}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EarVAEConfig:
        """Builds a config from fields as `to_dict` returns them; absent ones have their defaults.

        Raises:
            EarVAEError: A field is unknown, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise EarVAEError(f"config: expected a JSON object, got {type(values).__name__}")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(values) - set(names))):
            raise EarVAEError(
                f"config: unknown {shown(unknown)}; the fields of format version {FORMAT_VERSION} are {names}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, path: Path) -> EarVAEConfig:
        """Reads a `config.json` as written by `EarVAE.save_pretrained`.

        Raises:
            EarVAEError: The file cannot be read, is not JSON, is of a later version, or holds an invalid
                config.
        """
        values = read_json(path)
        try:
            return cls.from_dict(without_version(values) if isinstance(values, Mapping) else values)
        except EarVAEError as error:
            raise EarVAEError(f"{path}: {error}") from None


ConfigSource = EarVAEConfig | Mapping[str, Any] | str | os.PathLike[str]
"""Where the config of bare weights comes from: itself, its fields, a JSON file, or the name of a preset."""


def without_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `config.json`.

    Raises:
        EarVAEError: It is of a later version.
    """
    rest = dict(values)
    version = rest.pop("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        raise EarVAEError(
            f"config: format version {shown(version)}, this ear-vae reads {FORMAT_VERSION}; update ear-vae"
        )
    return rest
