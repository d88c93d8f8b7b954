"""How a model is run: which stages and tiles, in which dtype, on which device, recorded or streamed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ear_vae._dtype import require_runnable, upcast
from ear_vae.errors import EarVAEError, first_line
from ear_vae.inference.asynchronous_copy import copy_to_device, start_copy
from ear_vae.inference.compiling import compile_activation
from ear_vae.inference.cuda_graphs import MOST_GRAPH_FRAMES, clear_graphs, run_graph
from ear_vae.inference.tiling import (
    DEFAULT_STAGE_TILES,
    Stage,
    StageTiles,
    decoder_stages,
    encoder_stages,
    run_stages,
    stream_stages,
    tile_length,
)
from ear_vae.network import Autoencoder, Decoder, Encoder
from ear_vae.network.blocks import KeptKernels, keep_kernels, total

_Network = TypeVar("_Network", Encoder, Decoder)
_StagesOf = Callable[[_Network, torch.dtype], list[Stage]]


@dataclass(frozen=True)
class Runner:
    """Runs the parts of a model on batches of any length, in memory that does not grow with it.

    Where a gradient is recorded, the whole length goes through at once. Results are float32 (float64 of a
    float64 model) and lie on the device of the input.

    Attributes:
        model: The model, whose weights decide on device and dtype.
        gradient_checkpointing: Where a gradient is recorded, keep activations only between stages.
        cuda_graphs: On CUDA, record short inputs whose shape comes again.
        tile_frames: Latent frames of a tile along the sequence; by default as many as are fast.
        stage_tiles: How large the tiles within a stage are, on a CPU.
        graph_frames: Latent frames of a batch together beyond which no graph is recorded.
    """

    model: Autoencoder
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    tile_frames: int | None = None
    stage_tiles: StageTiles = DEFAULT_STAGE_TILES
    graph_frames: int = MOST_GRAPH_FRAMES

    def encode(self, audio: Tensor) -> Tensor:
        """Computes the posterior's parameters [B, 2 D, N] of audio [B, C, T], zero-padded to whole frames.

        Raises:
            EarVAEError: The weights are in a dtype that is not supported, or in several.
        """
        missing = -audio.shape[-1] % self.model.config.downsampling_ratio
        return self._run(self.model.encoder, functional.pad(audio, (0, missing)), self._encoder_stages)

    def decode(self, latents: Tensor) -> Tensor:
        """Computes audio [B, C, N * downsampling_ratio] of latents [B, D, N].

        Raises:
            EarVAEError: The weights are in a dtype that is not supported, or in several.
        """
        if self.model.transformer is not None:
            latents = self.transform(latents)
        return self._run(self.model.decoder, latents, self._decoder_stages)

    def encode_stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `encode`, for audio in blocks [B, C, T_i], without gradients.

        Yields:
            The posterior's parameters, [B, 2 D, n].

        Raises:
            EarVAEError: The weights are in a dtype that is not supported, or in several.
        """
        padded = _padded(blocks, self.model.config.downsampling_ratio)
        return self._stream(self.model.encoder, padded, self._encoder_stages)

    def decode_stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `decode`, for latents in blocks [B, D, N_i], without gradients; a transformer holds them all.

        Yields:
            Audio, [B, C, t].

        Raises:
            EarVAEError: The weights are in a dtype that is not supported, or in several.
        """
        if self.model.transformer is not None and (pieces := list(blocks)):
            blocks = [self.transform(torch.cat(pieces, dim=-1))]
            del pieces
        yield from self._stream(self.model.decoder, blocks, self._decoder_stages)

    def transform(self, latents: Tensor) -> Tensor:
        """Computes what the model's transformer makes of latents [B, D, N], in float32 at least.

        It computes in float32 whatever the weights' dtype: it is a thousandth of the work, and what it gets
        wrong goes into every sample.

        Raises:
            EarVAEError: The weights are in a dtype that is not supported, or in several.
        """
        transformer, device = self.model.transformer, self.model.device
        assert transformer is not None
        dtype = self._runnable_dtype(latents)
        weights = {name: upcast(weight) for name, weight in transformer.named_parameters()}
        x = latents.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
        # Autocast would compute it in less.
        with torch.autocast(device.type, enabled=False):
            transformed: Tensor = functional_call(transformer, weights, (x,))
        return transformed.to(latents.device)

    def _encoder_stages(self, encoder: Encoder, dtype: torch.dtype) -> list[Stage]:
        return encoder_stages(encoder, self.model.config, self.model.device, self.stage_tiles, dtype)

    def _decoder_stages(self, decoder: Decoder, dtype: torch.dtype) -> list[Stage]:
        return decoder_stages(decoder, self.model.config, self.model.device, self.stage_tiles, dtype)

    def _runnable_dtype(self, x: Tensor) -> torch.dtype:
        """What the model is about to run in: looked up once a run, because it goes through all weights.

        Raises:
            EarVAEError: It cannot, on this device or for `x`; of all parts, whichever is about to run.
        """
        if x.is_meta != (self.model.device.type == "meta"):
            raise EarVAEError(
                f"the model is on {self.model.device} and its input on {x.device}: nothing on the meta "
                "device has values; load the model, or make the input, on a device that computes"
            )
        dtypes = self.model.weight_dtypes()
        require_runnable(dtypes, self.model.device)
        (dtype,) = dtypes
        return dtype

    def _run(self, network: _Network, x: Tensor, stages_of: _StagesOf[_Network]) -> Tensor:
        dtype = self._runnable_dtype(x)
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in network.parameters())
        ):
            # The autograd graph holds every activation anyway: tiles would only add their contexts to it.
            return upcast(self._run_with_gradients(network, self._to_model(dtype, x))).to(x.device)
        stages, tile_frames = self._with_graphs(network, stages_of(network, dtype)), self._tile_length(dtype)
        frames = x.shape[0] * x.shape[-1] // math.prod(stage.inputs for stage in stages)
        with self._kept_kernels({}) if frames > tile_frames else nullcontext():
            return run_stages(
                stages,
                x,
                tile_frames=tile_frames,
                prepare=partial(self._prepare, dtype),
                retrieve=lambda tile: _retrieve(tile, x.device),
            )

    def _stream(
        self, network: _Network, blocks: Iterable[Tensor], stages_of: _StagesOf[_Network]
    ) -> Iterator[Tensor]:
        """As `_run`, piece by piece; results lie on the device of the input, and no gradients are kept."""
        source = iter(blocks)
        if (first := next(source, None)) is None:
            return
        dtype = self._runnable_dtype(first)
        tiles = stream_stages(
            self._with_graphs(network, stages_of(network, dtype)),
            chain((first,), source),
            tile_frames=self._tile_length(dtype),
            prepare=partial(self._prepare, dtype),
            retrieve=lambda tile: _retrieve(tile, first.device),
        )
        kernels: KeptKernels = {}
        while True:
            # Not around the whole: between two tiles the caller's code runs.
            with torch.no_grad(), self._kept_kernels(kernels):
                tile = next(tiles, None)
            if tile is None:
                return
            yield tile

    def _kept_kernels(self, kernels: KeptKernels) -> AbstractContextManager[None]:
        """Has the tiles of a run on a GPU share reordered kernels; on a CPU the tiles of each stage do."""
        # A graph that found them there would read them when they are gone.
        shared = self.model.device.type == "cuda" and not self.cuda_graphs
        return keep_kernels(kernels) if shared else nullcontext()

    def _with_graphs(self, network: Encoder | Decoder, stages: list[Stage]) -> list[Stage]:
        if not self.cuda_graphs or self.model.device.type != "cuda":
            return stages
        # On a GPU the only stage is the network itself.
        return [
            replace(stage, network=partial(_run_short, network, self.graph_frames * stage.inputs))
            for stage in stages
        ]

    def _run_with_gradients(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        if not self.gradient_checkpointing:
            result: Tensor = network(x)
            return result
        for stage in network.stages():
            x = checkpoint(_added_up, stage, x, use_reentrant=False, preserve_rng_state=False)
        return x

    def _tile_length(self, dtype: torch.dtype) -> int:
        config = self.model.config
        return self.tile_frames or tile_length(
            config.channels, config.downsampling_ratio, self.model.device, dtype
        )

    def _prepare(self, dtype: torch.dtype, tile: Tensor) -> Tensor:
        """[B, C, T] as the networks take it in inference, see `ear_vae.network.blocks`."""
        if self.model.device.type == "cpu":
            # The first convolution takes it in float32, whatever the weights are in.
            tile = tile.to(torch.promote_types(dtype, torch.float32))
        else:
            tile = self._to_model(dtype, tile)
        # Channels last by hand, which torch.vmap takes too.
        return tile.movedim(1, -1).contiguous().movedim(-1, 1).unsqueeze(-2)

    def _to_model(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        return copy_to_device(x, self.model.device, dtype)


def optimize(model: Autoencoder) -> None:
    """Compiles the activation of a model on a CPU, and drops the CUDA graphs that have been recorded of it.

    Where torch cannot compile, there is a warning and nothing changes.
    """
    for network in (model.encoder, model.decoder):
        clear_graphs(network)
    if model.device.type == "cuda":
        return
    try:
        compile_activation(model)
    except (RuntimeError, OSError) as error:
        # torch's first line is "backend='inductor' raised:", and the reason stands in the second.
        reason = first_line(error, most=2)
        warnings.warn(f"runs without being compiled: {reason}", stacklevel=3)


def _added_up(stage: nn.Module, x: Tensor) -> Tensor:
    """One tensor, since all that comes out of a stage is kept."""
    return total(stage(x))


def _retrieve(tile: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Starts the way back from the networks, to [B, C, T] in float32 at least."""
    return start_copy(upcast(tile.squeeze(-2)), device)


def _padded(blocks: Iterable[Tensor], multiple: int) -> Iterator[Tensor]:
    """The blocks, and zeros after them where their length together is no multiple."""
    count = 0
    for block in blocks:
        count += block.shape[-1]
        yield block
    if (missing := -count % multiple) and count:
        yield block.new_zeros(*block.shape[:-1], missing)


def _run_short(network: Encoder | Decoder, most_inputs: int, x: Tensor) -> Tensor:
    """A pass without gradients, as a graph where the input is short enough for that to pay."""
    if x.shape[0] * x.shape[-1] > most_inputs:
        result: Tensor = network(x)
        return result
    return run_graph(network, x)
