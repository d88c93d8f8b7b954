"""Exact tiling: long sequences through a convolutional network in pieces, with the result of one pass.

Every output frame of the encoder and decoder depends on a finite stretch of input. A piece that is
computed together with that much neighbouring input, its edges then cut off, is therefore the same as
in a pass over everything; at the true ends nothing is added, because there the network pads by itself.
Pieces start on the grid of latent frames, so that strided convolutions keep their phase.

       ├──context──┼────── kept ──────┼──context──┤          one tile
                              ├──context──┼────── kept ──────┼──context──┤
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

# Largest activation of one pass. A few of them are alive at a time; larger tiles spend less on
# context, smaller ones fit caches better.
_ACTIVATION_BYTES = 2**26
_BYTES_PER_VALUE = 4

_observer: ContextVar[Callable[[int], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observe_tiles(callback: Callable[[int], None]) -> Iterator[None]:
    """Calls `callback(latent_frames)` after every tile of every network that runs within the block."""
    token = _observer.set(callback)
    try:
        yield
    finally:
        _observer.reset(token)


def encoder_reach(encoder: nn.Module, downsampling_ratio: int) -> tuple[int, int]:
    """Samples before and after its own `downsampling_ratio` samples that one latent frame depends on."""
    first, last = 0, 0
    for conv in reversed(_convolutions(encoder)):
        (kernel,), (stride,), (dilation,), padding = _geometry(conv)
        first = first * stride - padding
        last = last * stride - padding + dilation * (kernel - 1)
    return -first, last - (downsampling_ratio - 1)


def decoder_reach(decoder: nn.Module, downsampling_ratio: int) -> tuple[int, int]:
    """Latent frames before and after its own that the samples of one frame depend on."""
    first, last = 0, downsampling_ratio - 1
    for conv in reversed(_convolutions(decoder)):
        (kernel,), (stride,), (dilation,), padding = _geometry(conv)
        if isinstance(conv, nn.ConvTranspose1d):
            # Output t takes input n where 0 <= t + padding - n * stride < kernel.
            first = -((kernel - 1 - padding - first) // stride)
            last = (last + padding) // stride
        else:
            first -= padding
            last += dilation * (kernel - 1) - padding
    return -first, last


def tile_length(channels: int, downsampling_ratio: int) -> int:
    """Latent frames per tile for a network that is `channels` wide at full rate."""
    return max(1, _ACTIVATION_BYTES // (_BYTES_PER_VALUE * channels * downsampling_ratio))


def run_tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    inputs_per_frame: int,
    outputs_per_frame: int,
    context_frames: tuple[int, int],
    tile_frames: int,
) -> Tensor:
    """`network(x)`, computed in tiles of `tile_frames` latent frames and batches that fit one tile's memory.

    Args:
        network: Maps [B, *, n * inputs_per_frame] to [B, *, n * outputs_per_frame].
        x: Input, [B, *, N * inputs_per_frame].
        inputs_per_frame: Input positions per latent frame.
        outputs_per_frame: Output positions per latent frame.
        context_frames: Frames that a tile needs before and after itself.
        tile_frames: Frames kept of each tile.

    Returns:
        [B, *, N * outputs_per_frame] on the device of `x`.
    """
    batch, num_frames = x.shape[0], x.shape[-1] // inputs_per_frame
    items = max(1, tile_frames // num_frames)
    if num_frames <= tile_frames and batch <= items:
        return network(x).to(x.device)
    before, after = context_frames
    output: Tensor | None = None
    for row in range(0, batch, items):
        for start in range(0, num_frames, tile_frames):
            stop = min(start + tile_frames, num_frames)
            first, last = max(0, start - before), min(num_frames, stop + after)
            tile = network(x[row : row + items, :, first * inputs_per_frame : last * inputs_per_frame])
            if output is None:
                shape = (batch, tile.shape[1], num_frames * outputs_per_frame)
                output = torch.empty(shape, dtype=tile.dtype, device=x.device)
            kept = tile[..., (start - first) * outputs_per_frame : (stop - first) * outputs_per_frame]
            output[row : row + items, :, start * outputs_per_frame : stop * outputs_per_frame] = kept
            if (callback := _observer.get()) is not None:
                callback(stop - start)
    assert output is not None, "an empty input is refused before it comes here"
    return output


def _convolutions(network: nn.Module) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """The convolutions in the order they run, which is the order they are registered in."""
    return [module for module in network.modules() if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))]


def _geometry(
    conv: nn.Conv1d | nn.ConvTranspose1d,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    assert not isinstance(conv.padding, str)
    return conv.kernel_size, conv.stride, conv.dilation, conv.padding[0]
