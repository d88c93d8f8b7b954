"""The convolutional decoder."""

from __future__ import annotations

from torch import Tensor, nn

from ear_vae.config import EarVAEConfig
from ear_vae.network.blocks import Conv1d, ConvTranspose1d, Snake, convolve, residual_units
from ear_vae.network.snake import DeferredSum

IN_KERNEL_SIZE = 7
OUT_KERNEL_SIZE = 7


class DecoderBlock(nn.Module):
    """A Snake and a transposed convolution, then three residual units at the higher rate."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_snakes: int = 1) -> None:
        super().__init__()
        conv = ConvTranspose1d(in_channels, out_channels, 2 * stride, stride=stride, padding=stride // 2)
        self.snake = Snake(in_channels, wide=conv.in_float32)
        self.conv = conv
        self.residual_units = residual_units(out_channels, num_snakes)

    def forward(self, x: Tensor | DeferredSum) -> Tensor | DeferredSum:
        """Maps [B, in_channels, N] to [B, out_channels, N * stride]; either may be a sum to be added up."""
        return self.residual_units(convolve(self.conv, self.snake(x)))


class Decoder(nn.Module):
    """Latents [B, D, N] to audio [B, C, N * downsampling_ratio], unbounded (there is no tanh)."""

    def __init__(self, config: EarVAEConfig) -> None:
        super().__init__()
        first = config.block_widths[-1][1]
        self.conv_in = Conv1d(config.latent_dim, first, IN_KERNEL_SIZE, padding=IN_KERNEL_SIZE // 2)
        self.blocks = nn.Sequential(
            *(
                DecoderBlock(low_rate, wide_rate, stride, config.snakes_per_residual_unit)
                for (wide_rate, low_rate), stride in zip(
                    reversed(config.block_widths), reversed(config.strides), strict=True
                )
            )
        )
        self.snake_out = Snake(config.channels, wide=True)
        self.conv_out = Conv1d(
            config.channels, config.audio_channels, OUT_KERNEL_SIZE, padding=OUT_KERNEL_SIZE // 2, bias=False
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, D, N] to audio [B, C, N * downsampling_ratio]."""
        return self.conv_out(self.snake_out(self.blocks(convolve(self.conv_in, latents))))

    def stages(self) -> list[nn.Sequential]:
        """The same in pieces, each of which changes the rate once by its stride."""
        parts: list[list[nn.Module]] = [[block] for block in self.blocks]
        parts[0].insert(0, self.conv_in)
        parts[-1] += [self.snake_out, self.conv_out]
        return [nn.Sequential(*modules) for modules in parts]
