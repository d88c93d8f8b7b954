"""The parts of a model as graphs of torch.export, from which every format is written."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ear_vae.errors import EarVAEError
from ear_vae.inference.tiling import decoder_reach, encoder_reach
from ear_vae.vae import EarVAE

# Of a graph that is run against the network that it is of, relative to the largest value.
TOLERANCE = 1e-5
# Sizes of what a graph is made from and of what it is tried on; none may be 1, which would be a constant.
_EXAMPLE_BATCH, _EXAMPLE_FRAMES = 3, 11
_TRIED_BATCH, _TRIED_FRAMES = 2, 24


@dataclass(frozen=True)
class GraphPart:
    """A part of a model that is exported by itself.

    Attributes:
        name: Name of the part and of its file: `encoder`, `decoder`, `transformer` or `convolutions`.
        network: The part; it takes one tensor.
        input: Name of what it takes, `audio` or `latents`.
        output: Name of what it gives, `moments` (mean ‖ scale before the softplus), `latents` or `audio`.
        in_channels: Channels of its input.
        inputs_per_frame: Input positions per latent frame.
        outputs_per_frame: Output positions per latent frame.
        context_frames: Latent frames that one depends on, before and after it; None where it depends on all.
    """

    name: str
    network: nn.Module
    input: str
    output: str
    in_channels: int
    inputs_per_frame: int
    outputs_per_frame: int
    context_frames: tuple[int, int] | None

    def random_input(self, batch: int, frames: int, seed: int = 0) -> Tensor:
        """Noise that the part takes, [batch, in_channels, frames * inputs_per_frame]."""
        generator = torch.Generator().manual_seed(seed)
        level = 0.3 if self.input == "audio" else 1.0
        shape = (batch, self.in_channels, frames * self.inputs_per_frame)
        return level * torch.randn(shape, generator=generator)


class _Encoder(nn.Module):
    def __init__(self, vae: EarVAE) -> None:
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, audio: Tensor) -> Tensor:
        return self.encoder(audio)


class _Decoder(nn.Module):
    def __init__(self, vae: EarVAE) -> None:
        super().__init__()
        self.transformer, self.decoder = vae.transformer, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.transformer is None else self.transformer(latents))


class _Transformer(nn.Module):
    def __init__(self, vae: EarVAE) -> None:
        super().__init__()
        self.transformer = vae.transformer

    def forward(self, latents: Tensor) -> Tensor:
        assert self.transformer is not None
        return self.transformer(latents)


class _Convolutions(nn.Module):
    def __init__(self, vae: EarVAE) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def parts_of(vae: EarVAE) -> list[GraphPart]:
    """The encoder, the whole decoder and, of a model with a transformer, the two halves of the decoder."""
    config, hop = vae.config, vae.downsampling_ratio
    before, after = encoder_reach(vae.encoder, hop)
    context = decoder_reach(vae.decoder, hop)
    latents, audio = config.latent_dim, config.audio_channels
    whole = vae.transformer is None
    parts = [
        GraphPart(
            "encoder", _Encoder(vae), "audio", "moments", audio, hop, 1, (-(-before // hop), -(-after // hop))
        ),
        GraphPart("decoder", _Decoder(vae), "latents", "audio", latents, 1, hop, context if whole else None),
    ]
    if not whole:
        parts += [
            GraphPart("transformer", _Transformer(vae), "latents", "latents", latents, 1, 1, None),
            GraphPart("convolutions", _Convolutions(vae), "latents", "audio", latents, 1, hop, context),
        ]
    return parts


def exportable(vae: EarVAE, dtype: torch.dtype = torch.float32) -> EarVAE:
    """A copy on the CPU in float32, its weights rounded to a dtype in which they are to be stored."""
    plain = copy.deepcopy(vae).to("cpu").eval().requires_grad_(False)
    return plain.to(dtype).float()


def exported(part: GraphPart) -> ExportedProgram:
    """The graph of a part, for any batch and any number of frames.

    Raises:
        EarVAEError: This torch cannot export it.
    """
    example = part.random_input(_EXAMPLE_BATCH, _EXAMPLE_FRAMES)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    try:
        with quiet_exporters(), torch.no_grad():
            return torch.export.export(part.network, (example,), dynamic_shapes={part.input: free})
    # torch's exporters raise whatever their compilers do.
    except Exception as error:
        raise EarVAEError(
            f"the {part.name} cannot be exported by torch {torch.__version__}: {reason_of(error)}"
        ) from error


def require_equal(part: GraphPart, run: Callable[[Tensor], Tensor]) -> float:
    """Runs a written part on noise and compares it with the network.

    Args:
        part: The part.
        run: What takes the input, as a tensor, and gives the output.

    Returns:
        The largest difference relative to the largest value.

    Raises:
        EarVAEError: It is above 1e-5.
    """
    x = part.random_input(_TRIED_BATCH, _TRIED_FRAMES, seed=1)
    with torch.no_grad():
        expected = part.network(x)
    found = run(x)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise EarVAEError(
            f"the {part.name} was exported, but differs from the network by {difference:.1e} of the largest "
            f"value, more than {TOLERANCE:.0e}; nothing is kept: try other versions of torch and the runtime"
        )
    return difference


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keeps torch's exporters from telling what users can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
