"""Audio and latents as callers give them, in one shape; what cannot be meant is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.limits import integer, shown


def as_audio_batch(audio: Tensor | np.ndarray, audio_channels: int) -> tuple[Tensor, bool]:
    """Audio [C, T] or [B, C, T] as [B, audio_channels, T], and whether a batch axis was added.

    Args:
        audio: Audio with one or two channels; mono is duplicated where `audio_channels` is 2.
        audio_channels: Channels that a model works on.

    Raises:
        EarVAEError: Wrong rank, integer dtype, no samples, too many channels.
    """
    x = as_dense_tensor("audio", audio)
    if x.ndim not in (2, 3):
        cure = "; add the channel axis with audio[None]" if x.ndim == 1 else ""
        raise EarVAEError(f"audio has shape {_shape(x)}; expected [C, T] or [B, C, T]{cure}")
    _require_floating("audio", x, "16-bit samples become audio with audio / 32768")
    channels, num_samples = x.shape[-2:]
    if x.numel() == 0:
        raise EarVAEError(f"audio has shape {_shape(x)}: there are no samples")
    if channels > 2:
        cure = (
            "the last axis looks like the channels: use audio.transpose(-1, -2)"
            if num_samples <= 2
            else "downmix it to stereo first"
        )
        raise EarVAEError(f"audio has {channels} channels (shape {_shape(x)}), expected 1 or 2; {cure}")
    if channels > audio_channels:
        raise EarVAEError(f"audio has {channels} channels, this model works on {audio_channels}")
    if channels < audio_channels:
        x = x.expand(*x.shape[:-2], audio_channels, num_samples)
    return (x, False) if x.ndim == 3 else (x.unsqueeze(0), True)


def as_latent_batch(latents: Tensor | np.ndarray, latent_dim: int) -> tuple[Tensor, bool]:
    """Latents [D, N] or [B, D, N] as [B, D, N], and whether a batch axis was added.

    Args:
        latents: Latents of any floating dtype.
        latent_dim: Channels D that a model has.

    Raises:
        EarVAEError: Wrong rank, dtype or number of channels, no frames.
    """
    z = as_dense_tensor("latents", latents)
    if z.ndim not in (2, 3) or z.shape[-2] != latent_dim:
        raise EarVAEError(
            f"latents have shape {_shape(z)}; expected [{latent_dim}, N] or [B, {latent_dim}, N]"
        )
    _require_floating("latents", z, "convert them with .float()")
    if z.numel() == 0:
        raise EarVAEError(f"latents have shape {_shape(z)}: there is nothing to decode")
    return (z, False) if z.ndim == 3 else (z.unsqueeze(0), True)


def require_decodable(num_samples: int | None, longest: int) -> None:
    """Refuses a length to trim to that latents do not have.

    Args:
        num_samples: Length asked for, None for all.
        longest: Samples that the latents decode to.

    Raises:
        EarVAEError: It is below 1 or above `longest`.
    """
    if num_samples is not None and not 0 < (integer(num_samples) or 0) <= longest:
        raise EarVAEError(
            f"num_samples is {shown(num_samples)}; these latents decode to 1 to {longest} samples"
        )


def as_dense_tensor(what: str, value: Tensor | np.ndarray) -> Tensor:
    """Returns what a caller gave as a dense tensor.

    Raises:
        EarVAEError: It is no array of numbers, or sparse.
    """
    if isinstance(value, Tensor):
        x = value
    else:
        try:
            array = np.asarray(value)
            # torch takes neither negative strides, as of a flipped array, nor a foreign byte order.
            x = torch.as_tensor(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
        except (TypeError, ValueError, RuntimeError) as error:
            raise EarVAEError(
                f"{what} must be a tensor or an array of numbers, got {type(value).__name__}"
                + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")
            ) from error
    if x.layout != torch.strided:
        raise EarVAEError(f"{what} must be dense, got {x.layout}; use {what}.to_dense()")
    return x


def blocks_alike(what: str, blocks: Iterable[Tensor | np.ndarray]) -> Iterator[Tensor]:
    """Yields the blocks that are not empty, as tensors.

    Raises:
        EarVAEError: They differ in more than their length.
    """
    first: Tensor | None = None
    for block in blocks:
        x = as_dense_tensor(what, block)
        if x.shape[-1:] == (0,):
            continue
        first = x if first is None else first
        if x.shape[:-1] != first.shape[:-1]:
            raise EarVAEError(
                f"{what}: a block of shape {_shape(x)} after one of {_shape(first)}; only their lengths may "
                "differ"
            )
        yield x


def _require_floating(what: str, x: Tensor, cure: str) -> None:
    if not x.is_floating_point():
        raise EarVAEError(f"{what} must be floating point, got {x.dtype}; {cure}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
