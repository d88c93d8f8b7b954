"""The convolutional encoder."""

from __future__ import annotations

from torch import Tensor, nn

from ear_vae.config import EarVAEConfig
from ear_vae.network.blocks import Conv1d, Snake, convolve, residual_units
from ear_vae.network.snake import DeferredSum

IN_KERNEL_SIZE = 7
OUT_KERNEL_SIZE = 3


class EncoderBlock(nn.Module):
    """Three residual units at the higher rate, then a Snake and a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_snakes: int = 1) -> None:
        super().__init__()
        self.residual_units = residual_units(in_channels, num_snakes)
        conv = Conv1d(in_channels, out_channels, 2 * stride, stride=stride, padding=stride // 2)
        self.snake = Snake(in_channels, wide=conv.in_float32)
        self.conv = conv

    def forward(self, x: Tensor | DeferredSum) -> Tensor | DeferredSum:
        """Maps [B, in_channels, N * stride] to [B, out_channels, N]; either may be a sum to be added up."""
        return convolve(self.conv, self.snake(self.residual_units(x)))


class Encoder(nn.Module):
    """Audio [B, C, N * downsampling_ratio] to the posterior's parameters [B, 2 D, N], mean ‖ scale."""

    def __init__(self, config: EarVAEConfig) -> None:
        super().__init__()
        self.conv_in = Conv1d(
            config.audio_channels, config.channels, IN_KERNEL_SIZE, padding=IN_KERNEL_SIZE // 2
        )
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(wide_rate, low_rate, stride, config.snakes_per_residual_unit)
                for (wide_rate, low_rate), stride in zip(config.block_widths, config.strides, strict=True)
            )
        )
        last = config.block_widths[-1][1]
        self.snake_out = Snake(last, wide=True)
        self.conv_out = Conv1d(last, 2 * config.latent_dim, OUT_KERNEL_SIZE, padding=OUT_KERNEL_SIZE // 2)

    def forward(self, audio: Tensor) -> Tensor:
        """Encodes audio [B, C, N * downsampling_ratio] to parameters [B, 2 D, N]."""
        return self.conv_out(self.snake_out(self.blocks(convolve(self.conv_in, audio))))

    def stages(self) -> list[nn.Sequential]:
        """The same in pieces, each of which changes the rate once by its stride."""
        parts: list[list[nn.Module]] = [[block] for block in self.blocks]
        parts[0].insert(0, self.conv_in)
        parts[-1] += [self.snake_out, self.conv_out]
        return [nn.Sequential(*modules) for modules in parts]
