"""Exact tiling: long sequences through a convolutional network in pieces, with the result of one pass.

Every output frame of the encoder and decoder depends on a finite stretch of input. A piece that is
computed together with that much neighbouring input, its edges then cut off, is therefore the same as
in a pass over everything; at the true ends nothing is added, because there the network pads by itself.
Pieces start on the grid of latent frames, so that strided convolutions keep their phase.

       ├──context──┼────── kept ──────┼──context──┤          one tile
                              ├──context──┼────── kept ──────┼──context──┤

A network goes through its stages in this way twice over. Along the file it takes tiles of some seconds, whose
memory is what a long file costs. Within one, each stage takes tiles whose activations fit the processor's
cache, with the context that this stage alone needs; the context of the stages behind it is cut off as soon as
it has served, so that little is computed twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ear_vae.backlog import Backlog
from ear_vae.config import EarVAEConfig
from ear_vae.network import Decoder, Encoder

# Of a tile along the file: what its widest activation would take in one piece. With all stages but the last
# whole, about half as much is alive at a time.
_TILE_BYTES = 2**27
# Of a tile within a stage, by device: its widest activation. A CPU's are to stay in its cache. A GPU needs
# enough to do at once.
_ACTIVATION_BYTES = {"cpu": 2**22}
_OTHER_ACTIVATION_BYTES = 2**28
# With fewer, reading the weights takes longer than using them.
_FEWEST_UNITS = 512
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
    """Latent frames per tile along a file, for a network that is `channels` wide at full rate."""
    return max(1, _TILE_BYTES // (_BYTES_PER_VALUE * channels * downsampling_ratio))


@dataclass(frozen=True)
class Stage:
    """A part of a network that changes the rate once.

    Its unit is one position at its lower rate.

    Attributes:
        network: Maps [B, *, n * inputs] to [B, *, n * outputs].
        inputs: Input positions per unit.
        outputs: Output positions per unit.
        context: Units that the outputs of one depend on, before and after it.
        tile_units: Units that are computed at once.
    """

    network: Callable[[Tensor], Tensor]
    inputs: int
    outputs: int
    context: tuple[int, int]
    tile_units: int


def encoder_stages(encoder: Encoder, config: EarVAEConfig, device: torch.device) -> list[Stage]:
    """The stages of an encoder, the rate falling by a stride in each."""
    stages = []
    for network, stride, (width, _) in zip(
        encoder.stages(), config.strides, config.block_widths, strict=True
    ):
        before, after = encoder_reach(network, stride)
        context = (-(-before // stride), -(-after // stride))
        stages.append(Stage(network, stride, 1, context, _tile_units(width * stride, device)))
    return stages


def decoder_stages(decoder: Decoder, config: EarVAEConfig, device: torch.device) -> list[Stage]:
    """The stages of a decoder, the rate rising by a stride in each."""
    stages = []
    for network, stride, (width, _) in zip(
        decoder.stages(), reversed(config.strides), reversed(config.block_widths), strict=True
    ):
        context = decoder_reach(network, stride)
        stages.append(Stage(network, 1, stride, context, _tile_units(width * stride, device)))
    return stages


def _tile_units(values_per_unit: int, device: torch.device) -> int:
    budget = _ACTIVATION_BYTES.get(device.type, _OTHER_ACTIVATION_BYTES)
    return max(_FEWEST_UNITS, budget // (_BYTES_PER_VALUE * values_per_unit))


def run_stages(
    stages: Sequence[Stage],
    x: Tensor,
    *,
    tile_frames: int,
    prepare: Callable[[Tensor], Tensor] = lambda tile: tile,
    finish: Callable[[Tensor], Tensor] = lambda tile: tile,
) -> Tensor:
    """All stages of a network, in tiles of `tile_frames` latent frames and in those of each stage.

    Args:
        stages: Of an encoder or a decoder.
        x: Input of the first stage, [B, C, T], of a whole number of latent frames.
        tile_frames: Frames of one tile along the sequence; short items of a batch share one.
        prepare: What is done to the input of a tile, such as moving it to a device.
        finish: What is done to the output of a tile; it gives [B, C, T] again.

    Returns:
        Output of the last stage, [B, C, T].
    """
    chain = _Chain(stages, prepare, finish)
    num_frames = x.shape[-1] // chain.inputs_per_frame

    def compute(rows: slice, start: int, stop: int) -> Tensor:
        spans = chain.spans(start, stop, num_frames)
        return chain.run(x[rows, :, slice(*spans[0])], spans)

    return _assembled(compute, x.shape[0], num_frames, chain.outputs_per_frame, tile_frames)


def stream_stages(
    stages: Sequence[Stage],
    blocks: Iterable[Tensor],
    *,
    tile_frames: int,
    prepare: Callable[[Tensor], Tensor] = lambda tile: tile,
    finish: Callable[[Tensor], Tensor] = lambda tile: tile,
) -> Iterator[Tensor]:
    """`run_stages` on input that comes in pieces, tile by tile as soon as the input of one is there.

    Args:
        stages: Of an encoder or a decoder.
        blocks: Pieces of the input, [B, C, T_i], together of a whole number of latent frames.
        tile_frames: Frames of one tile.
        prepare: As for `run_stages`.
        finish: As for `run_stages`.

    Yields:
        Pieces of the output, [B, C, T_j], each of `tile_frames` frames but for the last.
    """
    chain = _Chain(stages, prepare, finish)
    held = Backlog()
    source = iter(blocks)
    start, num_frames = 0, sys.maxsize
    while start < num_frames:
        spans = chain.spans(start, start + tile_frames, num_frames)
        if not held.fill(source, spans[0][1]):
            num_frames = held.stop // chain.inputs_per_frame
            if start >= num_frames:
                return
            spans = chain.spans(start, min(start + tile_frames, num_frames), num_frames)
        yield chain.run(held.take(*spans[0]), spans)
        start += tile_frames
        held.drop(chain.spans(start, start + 1, sys.maxsize)[0][0])


class _Chain:
    """Stages one behind the other, and which part of each is needed for a part of the last."""

    def __init__(
        self,
        stages: Sequence[Stage],
        prepare: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self._stages, self._prepare, self._finish = stages, prepare, finish
        # Units of each stage to a latent frame: the product of the steps between the two.
        self._units = [
            math.prod(stage.outputs for stage in stages[:index])
            * math.prod(stage.inputs for stage in stages[index + 1 :])
            for index in range(len(stages))
        ]
        self.inputs_per_frame = self._units[0] * stages[0].inputs
        self.outputs_per_frame = self._units[-1] * stages[-1].outputs

    def spans(self, start: int, stop: int, num_frames: int) -> list[tuple[int, int]]:
        """First and last position of what each stage takes, and of what is wanted of the last one."""
        first, last = start * self.outputs_per_frame, stop * self.outputs_per_frame
        spans = [(first, last)]
        for stage, per_frame in zip(reversed(self._stages), reversed(self._units), strict=True):
            before, after = stage.context
            first = max(0, first // stage.outputs - before) * stage.inputs
            last = min(num_frames * per_frame, -(-last // stage.outputs) + after) * stage.inputs
            spans.insert(0, (first, last))
        return spans

    def run(self, x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        """The last span of the output, from the first of the input."""
        (first, _), *others = spans
        tile = self._prepare(x)
        for stage, (wanted, end) in zip(self._stages, others, strict=True):
            tile = run_tiled(
                stage.network,
                tile,
                inputs_per_frame=stage.inputs,
                outputs_per_frame=stage.outputs,
                context_frames=stage.context,
                tile_frames=stage.tile_units,
            )
            first = first // stage.inputs * stage.outputs
            tile = tile[..., wanted - first : end - first]
            first = wanted
        tile = self._finish(tile)
        if (callback := _observer.get()) is not None:
            callback(tile.shape[-1] // self.outputs_per_frame)
        return tile


def run_tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    inputs_per_frame: int,
    outputs_per_frame: int,
    context_frames: tuple[int, int],
    tile_frames: int,
) -> Tensor:
    """`network(x)`, computed in tiles of `tile_frames` frames and batches that fit one tile's memory.

    Args:
        network: Maps [B, *, n * inputs_per_frame] to [B, *, n * outputs_per_frame].
        x: Input, [B, *, N * inputs_per_frame].
        inputs_per_frame: Input positions per frame.
        outputs_per_frame: Output positions per frame.
        context_frames: Frames that a tile needs before and after itself.
        tile_frames: Frames kept of each tile.

    Returns:
        [B, *, N * outputs_per_frame].
    """
    num_frames = x.shape[-1] // inputs_per_frame
    before, after = context_frames

    def compute(rows: slice, start: int, stop: int) -> Tensor:
        first, last = max(0, start - before), min(num_frames, stop + after)
        tile = network(x[rows, ..., first * inputs_per_frame : last * inputs_per_frame])
        return tile[..., (start - first) * outputs_per_frame : (stop - first) * outputs_per_frame]

    return _assembled(compute, x.shape[0], num_frames, outputs_per_frame, tile_frames)


def _assembled(
    compute: Callable[[slice, int, int], Tensor],
    batch: int,
    num_frames: int,
    outputs_per_frame: int,
    tile_frames: int,
) -> Tensor:
    """Tiles side by side in one tensor; `compute` gives those of some rows, from one frame to another."""
    items = max(1, tile_frames // num_frames)
    if num_frames <= tile_frames and batch <= items:
        return compute(slice(0, batch), 0, num_frames)
    output: Tensor | None = None
    for row in range(0, batch, items):
        rows = slice(row, row + items)
        for start in range(0, num_frames, tile_frames):
            stop = min(start + tile_frames, num_frames)
            tile = compute(rows, start, stop)
            if output is None:
                shape = (batch, *tile.shape[1:-1], num_frames * outputs_per_frame)
                layout = torch.channels_last if tile.ndim == 4 else torch.contiguous_format
                output = torch.empty(shape, dtype=tile.dtype, device=tile.device, memory_format=layout)
            output[rows, ..., start * outputs_per_frame : stop * outputs_per_frame] = tile
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
