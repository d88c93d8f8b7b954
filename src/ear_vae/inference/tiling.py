"""Exact tiling: long sequences through a convolutional network in pieces, with the result of one pass.

Every output frame of the encoder and decoder depends on a finite stretch of input. A piece that is
computed together with that much neighbouring input, its edges then cut off, is therefore the same as
in a pass over everything; at the true ends nothing is added, because there the network pads by itself.
Pieces start on the grid of latent frames, so that strided convolutions keep their phase.

       ├──context──┼────── kept ──────┼──context──┤          one tile
                              ├──context──┼────── kept ──────┼──context──┤

On a CPU a network goes through its stages in this way twice over. Along the file it takes tiles of some
seconds, whose memory is what a long file costs. Within one, each stage takes tiles whose activations fit the
processor's cache, with the context that this stage alone needs; the context of the stages behind it is cut
off as soon as it has served, so that little is computed twice. Other devices have no such cache and need much
to do at once: there the whole network is one stage, in tiles as long as their memory allows, and results
travel to the host while the next tile is computed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ear_vae.config import EarVAEConfig
from ear_vae.dsp.stream_buffer import StreamBuffer
from ear_vae.network import Decoder, Encoder
from ear_vae.network.blocks import convolutions, keep_kernels, total

# Size of a tile's widest activation, had it to be held whole, by device. A CPU holds about half as much at a
# time: it has all stages but the last whole.
_TILE_BYTES = {"cpu": 2**27, "cuda": 2**30}
_OTHER_TILE_BYTES = 2**28
# How many activations as large as the widest are alive at once in a pass through a whole network, at most:
# 5.0 in the encoder, 5.8 in the decoder, and some room for what convolutions work in.
ACTIVATIONS_ALIVE = 7
# Share of a GPU's free memory that a tile may take; the rest is for others and for what is not counted.
_SHARE_OF_FREE = 0.7
# Bytes of a float32 value, the default on a CPU.
_BYTES_PER_VALUE = 4

TileObserver = Callable[[int, float], None]
_observers: ContextVar[tuple[TileObserver, ...]] = ContextVar("observers", default=())


@contextmanager
def observe_tiles(callback: TileObserver) -> Iterator[None]:
    """Calls `callback(latent_frames, seconds)` after every tile of every network that runs within the block.

    The seconds are those that it took to start computing the tile: on a CPU, to compute it.
    """
    token = _observers.set((*_observers.get(), callback))
    try:
        yield
    finally:
        _observers.reset(token)


def encoder_reach(encoder: nn.Module, downsampling_ratio: int) -> tuple[int, int]:
    """Samples before and after its own `downsampling_ratio` samples that one latent frame depends on."""
    first, last = 0, 0
    for conv in reversed(convolutions(encoder)):
        (kernel,), (stride,), (dilation,), padding = _geometry(conv)
        first = first * stride - padding
        last = last * stride - padding + dilation * (kernel - 1)
    return -first, last - (downsampling_ratio - 1)


def decoder_reach(decoder: nn.Module, downsampling_ratio: int) -> tuple[int, int]:
    """Latent frames before and after its own that the samples of one frame depend on."""
    first, last = 0, downsampling_ratio - 1
    for conv in reversed(convolutions(decoder)):
        (kernel,), (stride,), (dilation,), padding = _geometry(conv)
        if isinstance(conv, nn.ConvTranspose1d):
            # Output t takes input n where 0 <= t + padding - n * stride < kernel.
            first = -((kernel - 1 - padding - first) // stride)
            last = (last + padding) // stride
        else:
            first -= padding
            last += dilation * (kernel - 1) - padding
    return -first, last


def tile_length(
    channels: int, downsampling_ratio: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    """Latent frames per tile along a file, for a network that is `channels` wide at full rate.

    On a GPU no more than fit into what is free there now, and then a power of two: lengths that followed the
    last byte would hardly ever come again.

    Args:
        channels: Channels of the widest activation.
        downsampling_ratio: Positions of that activation per latent frame.
        device: Device that the network runs on.
        dtype: Dtype of the activations.
    """
    budget = _TILE_BYTES.get(device.type, _OTHER_TILE_BYTES)
    width = _BYTES_PER_VALUE if device.type == "cpu" else dtype.itemsize
    frames = max(1, budget // (width * channels * downsampling_ratio))
    if device.type != "cuda":
        return frames
    per_frame = ACTIVATIONS_ALIVE * width * channels * downsampling_ratio
    fitting = int(_SHARE_OF_FREE * free_bytes(device)) // per_frame
    return frames if fitting >= frames else 2 ** max(0, fitting.bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """What tensors can take on a GPU now: unused memory, and what torch holds without a tensor in it."""
    unused, _ = torch.cuda.mem_get_info(device)
    return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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


@dataclass(frozen=True)
class StageTiles:
    """How large the tiles within a stage are, on a CPU.

    Attributes:
        activation_bytes: Size of the widest activation of a tile, which should stay in the cache.
        fewest_units: Units of a tile at least: with fewer, reading the weights takes longer than using them.
    """

    activation_bytes: int = 2**22
    fewest_units: int = 512

    def units(self, values_per_unit: int, dtype: torch.dtype = torch.float32) -> int:
        """Units of a tile in a stage whose widest activation has that many values of a dtype per unit."""
        return max(self.fewest_units, self.activation_bytes // (dtype.itemsize * values_per_unit))


DEFAULT_STAGE_TILES = StageTiles()


def encoder_stages(
    encoder: Encoder,
    config: EarVAEConfig,
    device: torch.device,
    stage_tiles: StageTiles = DEFAULT_STAGE_TILES,
    dtype: torch.dtype = torch.float32,
) -> list[Stage]:
    """The stages of an encoder, the rate falling by a stride in each; off the CPU a single one."""
    if device.type != "cpu":
        return [_encoder_stage(encoder, config.downsampling_ratio, sys.maxsize)]
    return [
        _encoder_stage(network, stride, stage_tiles.units(width * stride, dtype))
        for network, stride, (width, _) in zip(
            encoder.stages(), config.strides, config.block_widths, strict=True
        )
    ]


def decoder_stages(
    decoder: Decoder,
    config: EarVAEConfig,
    device: torch.device,
    stage_tiles: StageTiles = DEFAULT_STAGE_TILES,
    dtype: torch.dtype = torch.float32,
) -> list[Stage]:
    """The stages of a decoder, the rate rising by a stride in each; off the CPU a single one."""
    if device.type != "cpu":
        return [_decoder_stage(decoder, config.downsampling_ratio, sys.maxsize)]
    return [
        _decoder_stage(network, stride, stage_tiles.units(width * stride, dtype))
        for network, stride, (width, _) in zip(
            decoder.stages(), reversed(config.strides), reversed(config.block_widths), strict=True
        )
    ]


def _encoder_stage(network: nn.Module, ratio: int, tile_units: int) -> Stage:
    before, after = encoder_reach(network, ratio)
    return Stage(network, ratio, 1, (-(-before // ratio), -(-after // ratio)), tile_units)


def _decoder_stage(network: nn.Module, ratio: int, tile_units: int) -> Stage:
    return Stage(network, 1, ratio, decoder_reach(network, ratio), tile_units)


def _immediately(tile: Tensor) -> Callable[[], Tensor]:
    return lambda: tile


def run_stages(
    stages: Sequence[Stage],
    x: Tensor,
    *,
    tile_frames: int,
    prepare: Callable[[Tensor], Tensor] = lambda tile: tile,
    retrieve: Callable[[Tensor], Callable[[], Tensor]] = _immediately,
) -> Tensor:
    """All stages of a network, in tiles of at most `tile_frames` latent frames and in those of each stage.

    Args:
        stages: Stages of an encoder or a decoder.
        x: Input of the first stage, [B, C, T], of a whole number of latent frames.
        tile_frames: Most frames of one tile along the sequence; short items of a batch share one.
        prepare: What is done to the input of a tile, such as moving it to a device.
        retrieve: Starts what is done to the output of a tile, such as copying it from a device, and returns
            a function that waits for the result, [B, C, T]. The next tile is started before that is called.

    Returns:
        Output of the last stage, [B, C, T].
    """
    chain = _Chain(stages, prepare, retrieve)
    num_frames = x.shape[-1] // chain.inputs_per_frame

    def start(span: TileSpan) -> Callable[[], Tensor]:
        spans = chain.spans(span.start, span.stop, num_frames)
        return chain.start(x[span.rows, :, slice(*spans[0])], spans)

    def tiles() -> Iterator[tuple[TileSpan, Tensor]]:
        started: tuple[TileSpan, Callable[[], Tensor]] | None = None
        # Even ones: a last tile of a few frames would cost reading all weights.
        for span in _tile_spans(x.shape[0], num_frames, tile_frames, even=True):
            following = span, start(span)
            if started is not None:
                yield started[0], started[1]()
            started = following
        assert started is not None, "an empty input is refused before it comes here"
        yield started[0], started[1]()

    return _assembled(tiles(), x.shape[0], num_frames, chain.outputs_per_frame)


def stream_stages(
    stages: Sequence[Stage],
    blocks: Iterable[Tensor],
    *,
    tile_frames: int,
    prepare: Callable[[Tensor], Tensor] = lambda tile: tile,
    retrieve: Callable[[Tensor], Callable[[], Tensor]] = _immediately,
) -> Iterator[Tensor]:
    """`run_stages` on input that comes in pieces, tile by tile as soon as the input of one is there.

    Args:
        stages: Stages of an encoder or a decoder.
        blocks: Pieces of the input, [B, C, T_i], together of a whole number of latent frames.
        tile_frames: Frames of one tile.
        prepare: As for `run_stages`.
        retrieve: As for `run_stages`, but waited for at once.

    Yields:
        Pieces of the output, [B, C, T_j], each of `tile_frames` frames but for the last.
    """
    chain = _Chain(stages, prepare, retrieve)
    held = StreamBuffer()
    source = iter(blocks)
    start, num_frames = 0, sys.maxsize
    while start < num_frames:
        spans = chain.spans(start, start + tile_frames, num_frames)
        if not held.fill(source, spans[0][1]):
            num_frames = held.stop // chain.inputs_per_frame
            if start >= num_frames:
                return
            spans = chain.spans(start, min(start + tile_frames, num_frames), num_frames)
        yield chain.start(held.read(*spans[0]), spans)()
        start += tile_frames
        held.discard(chain.spans(start, start + 1, sys.maxsize)[0][0])


class _Chain:
    """Stages one behind the other, and which part of each is needed for a part of the last."""

    def __init__(
        self,
        stages: Sequence[Stage],
        prepare: Callable[[Tensor], Tensor],
        retrieve: Callable[[Tensor], Callable[[], Tensor]],
    ) -> None:
        self._stages, self._prepare, self._retrieve = stages, prepare, retrieve
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

    def start(self, x: Tensor, spans: Sequence[tuple[int, int]]) -> Callable[[], Tensor]:
        """Starts computing the last span from the input at the first; returns what waits for the result."""
        started = time.perf_counter()
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
        arrival = self._retrieve(tile)
        seconds = time.perf_counter() - started

        def wait() -> Tensor:
            retrieved = arrival()
            for callback in _observers.get():
                callback(retrieved.shape[-1] // self.outputs_per_frame, seconds)
            return retrieved

        return wait


def run_tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    inputs_per_frame: int,
    outputs_per_frame: int,
    context_frames: tuple[int, int],
    tile_frames: int,
) -> Tensor:
    """`network(x)`, computed in tiles of at most `tile_frames` frames and batches that fit one tile's memory.

    Args:
        network: Maps [B, *, n * inputs_per_frame] to [B, *, n * outputs_per_frame].
        x: Input, [B, *, N * inputs_per_frame].
        inputs_per_frame: Input positions per frame.
        outputs_per_frame: Output positions per frame.
        context_frames: Frames that a tile needs before and after itself.
        tile_frames: Most frames kept of each tile.

    Returns:
        [B, *, N * outputs_per_frame].
    """
    num_frames = x.shape[-1] // inputs_per_frame
    before, after = context_frames

    def compute(span: TileSpan) -> Tensor:
        first, last = max(0, span.start - before), min(num_frames, span.stop + after)
        tile = total(network(x[span.rows, ..., first * inputs_per_frame : last * inputs_per_frame]))
        return tile[..., (span.start - first) * outputs_per_frame : (span.stop - first) * outputs_per_frame]

    # As few different lengths as can be, whatever the whole is: oneDNN keeps code for each, by the megabyte.
    spans = list(_tile_spans(x.shape[0], num_frames, tile_frames, even=False))
    tiles = ((span, compute(span)) for span in spans)
    with keep_kernels() if len(spans) > 1 else nullcontext():
        return _assembled(tiles, x.shape[0], num_frames, outputs_per_frame)


class TileSpan(NamedTuple):
    """The part of a batch that a tile covers: its rows, and its frames from `start` to before `stop`."""

    rows: slice
    start: int
    stop: int


def _tile_spans(batch: int, num_frames: int, tile_frames: int, *, even: bool) -> Iterator[TileSpan]:
    """Tiles of at most `tile_frames` frames, short items side by side.

    All but the last are of one length: `tile_frames` itself, or with `even` the least that is enough.
    """
    items = max(1, tile_frames // num_frames)
    length = -(-num_frames // -(-num_frames // tile_frames)) if even else tile_frames
    for row in range(0, batch, items):
        for start in range(0, num_frames, length):
            yield TileSpan(slice(row, row + items), start, min(start + length, num_frames))


def _assembled(
    tiles: Iterable[tuple[TileSpan, Tensor]], batch: int, num_frames: int, outputs_per_frame: int
) -> Tensor:
    """Tiles side by side in one tensor."""
    output: Tensor | None = None
    for (rows, start, stop), tile in tiles:
        if output is None:
            if tile.shape[0] == batch and stop - start == num_frames:
                return tile
            *inner, length = *tile.shape[1:-1], num_frames * outputs_per_frame
            if tile.ndim == 4:
                # Channels last by hand: a new tensor of the tile's kind, which torch.vmap takes too.
                channels, height = inner
                output = tile.new_empty((batch, height, length, channels)).movedim(-1, 1)
            else:
                output = tile.new_empty((batch, *inner, length))
        output[rows, ..., start * outputs_per_frame : stop * outputs_per_frame] = tile
    assert output is not None, "an empty input is refused before it comes here"
    return output


def _geometry(
    conv: nn.Conv1d | nn.ConvTranspose1d,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    assert not isinstance(conv.padding, str)
    return conv.kernel_size, conv.stride, conv.dilation, conv.padding[0]
