"""The parts of an autoencoder side by side, and the families of networks they can come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ear_vae._dtype import upcast
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import shown
from ear_vae.network.blocks import Conv1d, ConvTranspose1d
from ear_vae.network.decoder import Decoder
from ear_vae.network.encoder import Encoder
from ear_vae.network.transformer import LatentTransformer


class Family(NamedTuple):
    """What builds each part of a network from its config.

    Attributes:
        encoder: Builds the encoder.
        transformer: Builds what stands before the decoder, where `transformer_depth` is not 0.
        decoder: Builds the decoder.
    """

    encoder: Callable[[EarVAEConfig], Encoder]
    transformer: Callable[[EarVAEConfig], LatentTransformer]
    decoder: Callable[[EarVAEConfig], Decoder]


ARCHITECTURES = {"ear_vae": Family(Encoder, LatentTransformer, Decoder)}
"""The families of networks by `EarVAEConfig.architecture`; the only place that knows which there are."""


class Autoencoder(nn.Module):
    """Encoder, transformer and decoder with fresh weights; how they are run is `ear_vae.inference`'s.

    Args:
        config: The architecture.

    Attributes:
        config: The architecture.
        encoder: Audio [B, C, N * downsampling_ratio] to the posterior's parameters [B, 2 D, N].
        transformer: Latents [B, D, N] to latents of the same shape; None where `transformer_depth` is 0.
        decoder: Latents [B, D, N] to audio [B, C, N * downsampling_ratio].

    Raises:
        EarVAEError: The config names an architecture that there is not.
    """

    def __init__(self, config: EarVAEConfig) -> None:
        super().__init__()
        if config.architecture not in ARCHITECTURES:
            raise EarVAEError(
                f"config: architecture {shown(config.architecture)} is unknown; this ear-vae has "
                f"{', '.join(ARCHITECTURES)}: update ear-vae, or correct the name"
            )
        family = ARCHITECTURES[config.architecture]
        self.config = config
        self.encoder = family.encoder(config)
        self.transformer = family.transformer(config) if config.transformer_depth else None
        self.decoder = family.decoder(config)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the convolutions run: that of the weights, see `cast` for the exceptions."""
        return min((parameter.dtype for parameter in self.parameters()), key=lambda dtype: dtype.itemsize)

    def weight_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the weights, without float32 where `cast` leaves it beside bfloat16."""
        dtypes = {parameter.dtype for parameter in self.parameters()}
        if dtypes != {torch.float32, torch.bfloat16}:
            return dtypes
        wide = {id(p) for convolution in self.wide_convolutions() for p in convolution.parameters()}
        return {parameter.dtype for parameter in self.parameters() if id(parameter) not in wide}

    def wide_convolutions(self) -> list[nn.Conv1d | nn.ConvTranspose1d]:
        """The convolutions that keep float32 weights where the others get bfloat16.

        They are the first and the last of encoder and decoder, and those that compute in float32 in any case:
        a small part of the weights and of the work, but each rounding there is a rounding of all audio.
        """
        outer = {self.encoder.conv_in, self.encoder.conv_out, self.decoder.conv_in, self.decoder.conv_out}
        return [
            module
            for module in self.modules()
            if module in outer or (isinstance(module, (Conv1d, ConvTranspose1d)) and module.in_float32)
        ]

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the weights, those of `wide_convolutions` to float32 at least.

        `to` casts all of them, which runs as well and is less exact.
        """
        wide = torch.promote_types(dtype, torch.float32)
        convolutions = self.wide_convolutions()
        kept = [{name: upcast(p) for name, p in c.state_dict().items()} for c in convolutions]
        self.to(dtype=dtype)
        for convolution, state in zip(convolutions, kept, strict=True):
            convolution.to(dtype=wide).load_state_dict(state)
