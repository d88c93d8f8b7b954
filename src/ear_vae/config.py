"""The architecture of an εar-VAE, as one validated value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ear_vae.errors import EarVAEError

# A config from a stranger must not build a million layers.
_MAX_TRANSFORMER_DEPTH = 256


@dataclass(frozen=True)
class EarVAEConfig:
    """Everything that fixes the shapes of the network's tensors.

    The defaults are the published `ear_vae_44k`. A config is immutable, compares by value and is
    valid by construction.

    Args:
        sample_rate: Rate of the audio the network works on, in Hz.
        audio_channels: Channels of that audio.
        channels: Width of the blocks at full rate; every other width is a multiple of it.
        channel_multipliers: One multiple of `channels` per block, from full rate to latent rate.
        strides: Downsampling of each block. Even: with an odd stride the published padding would
            change the length.
        latent_dim: Channels of the latents.
        transformer_depth: Layers of the transformer on the latents, at most 256; 0 for none.
        transformer_head_dim: Channels of one attention head; divides `latent_dim` and is even.

    Raises:
        EarVAEError: A field has the wrong type or a value out of range.
    """

    sample_rate: int = 44_100
    audio_channels: int = 2
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8, 16)
    strides: tuple[int, ...] = (2, 4, 4, 4, 8)
    latent_dim: int = 64
    transformer_depth: int = 2
    transformer_head_dim: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("channel_multipliers", "strides"):
                if not isinstance(value, (list, tuple)) or not value or not all(map(_is_int, value)):
                    raise EarVAEError(f"config: {field.name} must be a list of integers, got {value!r}")
                object.__setattr__(self, field.name, tuple(value))
            elif not _is_int(value):
                raise EarVAEError(f"config: {field.name} must be an integer, got {value!r}")
        for name in ("sample_rate", "audio_channels", "channels", "latent_dim", "transformer_head_dim"):
            if getattr(self, name) < 1:
                raise EarVAEError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.audio_channels > 2:
            raise EarVAEError(f"config: audio_channels must be 1 or 2, got {self.audio_channels}")
        if not 0 <= self.transformer_depth <= _MAX_TRANSFORMER_DEPTH:
            raise EarVAEError(
                f"config: transformer_depth must be 0 to {_MAX_TRANSFORMER_DEPTH}, "
                f"got {self.transformer_depth}"
            )
        if len(self.channel_multipliers) != len(self.strides):
            raise EarVAEError(
                f"config: channel_multipliers and strides must be equally long, got "
                f"{len(self.channel_multipliers)} and {len(self.strides)}"
            )
        if min(self.channel_multipliers) < 1:
            raise EarVAEError(
                f"config: channel_multipliers must be at least 1, got {self.channel_multipliers}"
            )
        if any(stride < 2 or stride % 2 for stride in self.strides):
            raise EarVAEError(f"config: strides must be even and at least 2, got {self.strides}")
        if self.transformer_depth and (
            self.latent_dim % self.transformer_head_dim or self.transformer_head_dim % 2
        ):
            raise EarVAEError(
                f"config: transformer_head_dim must be even and divide latent_dim ({self.latent_dim}), "
                f"got {self.transformer_head_dim}"
            )

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
        """The fields as JSON-ready values; `from_dict` takes them back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EarVAEConfig:
        """Builds a config from exactly the fields of `to_dict`.

        Raises:
            EarVAEError: A field is unknown, missing, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise EarVAEError(f"config: expected a JSON object, got {type(values).__name__}")
        names = [field.name for field in fields(cls)]
        unknown, missing = sorted(set(values) - set(names)), [n for n in names if n not in values]
        if unknown or missing:
            problems = [f"unknown {unknown}"] * bool(unknown) + [f"missing {missing}"] * bool(missing)
            raise EarVAEError(f"config: {' and '.join(problems)}; the fields are {names}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: Path) -> EarVAEConfig:
        """Reads a `config.json` as written by `EarVAE.save_pretrained`.

        Raises:
            EarVAEError: The file cannot be read, is not JSON, or holds an invalid config.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise EarVAEError(f"{path}: cannot read the config: {error}") from error
        try:
            return cls.from_dict(values)
        except EarVAEError as error:
            raise EarVAEError(f"{path}: {error}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
