"""The model as ComfyUI's audio nodes call a VAE; `examples/comfyui` has the node that loads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ear_vae.vae import EarVAE


class ComfyVAE:
    """What the nodes VAE Encode Audio and VAE Decode Audio, tiled or not, call: audio with its channels last.

    Args:
        vae: The model, on the device that it is to run on.

    Attributes:
        vae: The model itself.
        audio_sample_rate: Rate of the audio in Hz; the nodes resample to it.
    """

    def __init__(self, vae: EarVAE) -> None:
        self.vae = vae
        self.audio_sample_rate = vae.sample_rate

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        """Encodes audio [B, T, C] to the posterior's mean [B, D, N].

        Raises:
            EarVAEError: As `EarVAE.encode`.
        """
        return self.vae.encode(audio.movedim(-1, 1)).mode()

    @torch.inference_mode()
    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        """Decodes latents [B, D, N] to audio [B, N * downsampling_ratio, C].

        Args:
            latents: Latents.
            **options: Taken and ignored.

        Raises:
            EarVAEError: As `EarVAE.decode`.
        """
        return self.vae.decode(latents).movedim(1, -1)

    def decode_tiled(
        self, latents: Tensor, tile_x: int = 0, tile_y: int = 0, overlap: int = 0, **options: Any
    ) -> Tensor:
        """The same as `decode`, which goes through exact tiles of its own.

        Args:
            latents: Latents.
            tile_x: Taken and ignored.
            tile_y: Taken and ignored.
            overlap: Taken and ignored.
            **options: Taken and ignored.
        """
        return self.decode(latents)
