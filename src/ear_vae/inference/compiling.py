"""Compiling the activation of a model on a CPU, and whether that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from ear_vae.network import Autoencoder
from ear_vae.network.blocks import Snake, convolutions
from ear_vae.network.snake import compile_snake

# What compiling takes on a processor of today where torch's cache holds nothing; a third of it where it does.
COMPILING_SECONDS = 15.0
# Parts of the time in the networks that it saves at the published size; docs/speed.md has the measurements.
SAVED_SHARE = {torch.float32: 0.1, torch.bfloat16: 0.25}
# Multiply-adds from which on it pays whatever the processor: in float32 half an hour of work for two cores
# with AVX-512, and a minute for sixty-four.
WORTHWHILE_MULTIPLY_ADDS = 2e14


def compile_activation(model: Autoencoder) -> None:
    """Compiles the activation of a model, which takes some seconds, once in a process.

    torch compiles anew for tensors of inference mode: call it in the mode in which the model will run.

    Raises:
        RuntimeError, OSError: torch cannot compile here; most often there is no C++ compiler.
    """
    compile_snake(model.device, model.dtype)
    for module in model.modules():
        if isinstance(module, Snake):
            module.compiled = True


@contextmanager
def activation_compiled(model: Autoencoder, compiled: bool) -> Iterator[None]:
    """Has a model on a CPU run with a compiled activation within the block, or without one.

    Where torch cannot compile, the model runs without and nothing is said. It is compiled for inference mode.
    On other devices nothing changes.
    """
    before = {module: module.compiled for module in model.modules() if isinstance(module, Snake)}
    if model.device.type == "cpu":
        for snake in before:
            snake.compiled = False
        if compiled:
            _try(model, compile_activation)
    try:
        yield
    finally:
        for snake, was_compiled in before.items():
            snake.compiled = was_compiled


class CompileWhenItPays:
    """Compiles the activation of a model in the middle of its work, once that saves more than it takes.

    What is left of the work is the audio that is left, at the speed of the tiles so far. The first tile does
    not count: kernels are generated for it.

    Args:
        model: Model on a CPU, which will run in the mode in which the tiles are reported.
        compile: Function that compiles it, called at most once; whatever it raises, the work goes on.
    """

    def __init__(
        self, model: Autoencoder, compile: Callable[[Autoencoder], None] = compile_activation
    ) -> None:
        self._model, self._compile = model, compile
        self._saved_share = SAVED_SHARE[torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32]
        self._tiles, self._timed_audio, self._timed = 0, 0.0, 0.0
        self._files, self._earlier, self._expected, self._done, self._following = 0, 0.0, 0.0, 0.0, 0
        self._is_over = False

    def begin_file(self, audio_seconds: float, following: int) -> None:
        """Says what comes next.

        Args:
            audio_seconds: Seconds of audio of the file that the networks will process, counted once for
                encoding and once for decoding.
            following: Number of files after this one; they are expected to be as long as those so far are on
                average.
        """
        self._earlier += self._done
        self._files += 1
        self._expected, self._done, self._following = audio_seconds, 0.0, following

    def tile_done(self, frames: int, seconds: float) -> None:
        """Says that a tile has been computed, and compiles if that pays.

        Args:
            frames: Latent frames of the tile.
            seconds: Time that computing it took.
        """
        if self._is_over:
            return
        audio_seconds = frames / self._model.config.latent_rate
        self._tiles += 1
        self._done += audio_seconds
        if self._tiles == 1:
            return
        self._timed_audio += audio_seconds
        self._timed += seconds
        if self._seconds_left() * self._saved_share > COMPILING_SECONDS:
            self._is_over = True
            _try(self._model, self._compile)

    def _seconds_left(self) -> float:
        of_this = max(self._done, self._expected)
        of_others = self._following * (self._earlier + of_this) / self._files
        return (of_this - self._done + of_others) * self._timed / self._timed_audio


def pays_beforehand(model: Autoencoder, audio_seconds: float) -> bool:
    """Whether a compiled activation pays for encoding that much audio, on no account of who does it.

    What is decided here must not depend on the clock, nor on the machine.
    """
    per_frame = multiply_adds_per_frame(model)
    return per_frame * model.config.latent_rate * audio_seconds > WORTHWHILE_MULTIPLY_ADDS


def multiply_adds_per_frame(model: Autoencoder) -> int:
    """Multiply-adds that the encoder's convolutions take for a latent frame."""
    positions, count = model.config.downsampling_ratio, 0
    for convolution in convolutions(model.encoder):
        positions //= convolution.stride[0]
        count += positions * convolution.weight.numel()
    return count


def _try(model: Autoencoder, compile: Callable[[Autoencoder], None]) -> None:
    # Nobody has asked for it, and the compilers of other people's machines fail in every way.
    with suppress(Exception), torch.inference_mode():
        compile(model)
