"""The ONNX files of a model, run in onnxruntime: encode and decode in exact tiles, without its network."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_vae.config import EarVAEConfig
from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.inference.arguments import as_audio_batch, as_latent_batch, require_decodable
from ear_vae.inference.tiling import Stage, run_stages, tile_length
from ear_vae.integrations._optional import optional
from ear_vae.limits import integer, sample_rate_of, shown, unpack_facts, whole_number
from ear_vae.posterior import Posterior

with optional("onnxruntime", extra="onnx"):
    import onnxruntime

FORMAT, FORMAT_VERSION = "ear-vae-onnx", 1
_CPU = ("CPUExecutionProvider",)


class EarVAEOnnx:
    """A model that `ear-vae convert MODEL FOLDER --to onnx` wrote.

    The transformer runs once over all latents, the convolutions in tiles that give what one pass would give.
    Results are float32. Memory is that of a tile and the audio; with a transformer also that of its attention
    in onnxruntime, which grows with the square of the duration (about 0.6 GB for three minutes).

    Args:
        folder: The folder with `encoder.onnx`, `decoder.onnx` and `weights.bin`.
        providers: What onnxruntime computes with, in order of preference, such as
            `("CUDAExecutionProvider", "CPUExecutionProvider")`.
        tile_frames: Latent frames of a tile; by default as many as take some hundred MB.

    Attributes:
        config: The architecture.
        name: Name of the model that was exported.
        weights_sha256: Fingerprint of its weights, as `EarVAE.weights_sha256`.

    Raises:
        EarVAEError: A file is missing, damaged, not one of ours or of another model than the others, or
            onnxruntime has no such provider.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[str] = _CPU,
        tile_frames: int | None = None,
    ) -> None:
        folder = Path(folder)
        if tile_frames is not None:
            tile_frames = whole_number(tile_frames, "tile_frames", lowest=1)
        encoder = _Part.open(folder, "encoder", providers)
        self.config, self.name = encoder.config, encoder.name
        self.weights_sha256 = encoder.weights_sha256
        self._encoder, self._transformer = encoder, None
        if self.config.transformer_depth:
            self._transformer = _Part.open(folder, "transformer", providers, like=encoder)
            self._decoder = _Part.open(folder, "convolutions", providers, like=encoder)
        else:
            self._decoder = _Part.open(folder, "decoder", providers, like=encoder)
        self._tile_frames = tile_frames or tile_length(
            self.config.channels, self.config.downsampling_ratio, torch.device("cpu")
        )

    @property
    def sample_rate(self) -> int:
        """Rate of the audio the model works on, in Hz."""
        return self.config.sample_rate

    @property
    def latent_rate(self) -> float:
        """Latent frames per second."""
        return self.config.latent_rate

    @property
    def latent_dim(self) -> int:
        """Channels D of the latents."""
        return self.config.latent_dim

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        return self.config.downsampling_ratio

    @property
    def audio_channels(self) -> int:
        """Channels C of the audio the model works on."""
        return self.config.audio_channels

    def encode(self, audio: Tensor | np.ndarray, sample_rate: int | None = None) -> Posterior:
        """Encodes audio to a distribution over latents.

        Args:
            audio: As for `EarVAE.encode`: [C, T] or [B, C, T].
            sample_rate: Rate of `audio` in Hz when it is not the model's: it is then resampled.

        Returns:
            Posterior with tensors [D, N] or [B, D, N], N = ceil(T / downsampling_ratio).

        Raises:
            EarVAEError: As `EarVAE.encode`.
        """
        rate = None if sample_rate is None else sample_rate_of(sample_rate)
        x, squeeze = as_audio_batch(audio, self.audio_channels)
        if rate not in (None, self.sample_rate):
            x = resample(x, rate, self.sample_rate)
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.downsampling_ratio))
        moments = self._tiled(self._encoder, x, self.downsampling_ratio, 1)
        posterior = Posterior.from_parameters(moments, self.config.min_std)
        return Posterior(posterior.mean[0], posterior.std[0]) if squeeze else posterior

    def decode(self, latents: Tensor | np.ndarray, num_samples: int | None = None) -> Tensor:
        """Decodes latents to audio at the model's rate.

        Args:
            latents: [D, N] or [B, D, N], floating point.
            num_samples: Length to trim to, at most N * downsampling_ratio; untrimmed by default.

        Returns:
            Audio [C, T] or [B, C, T], not limited to [-1, 1].

        Raises:
            EarVAEError: As `EarVAE.decode`.
        """
        z, squeeze = as_latent_batch(latents, self.latent_dim)
        require_decodable(num_samples, z.shape[-1] * self.downsampling_ratio)
        if self._transformer is not None:
            z = self._transformer.run(z)
        audio = self._tiled(self._decoder, z, 1, self.downsampling_ratio)
        return (audio[0] if squeeze else audio)[..., :num_samples]

    def _tiled(self, part: _Part, x: Tensor, inputs: int, outputs: int) -> Tensor:
        stage = Stage(part.run, inputs, outputs, part.context_frames, sys.maxsize)
        with torch.no_grad():
            return run_stages([stage], x, tile_frames=self._tile_frames)


class _Part:
    """One file, and what it states of itself."""

    def __init__(self, path: Path, session: Any, facts: dict[str, Any]) -> None:
        self._session, self._input = session, session.get_inputs()[0].name
        self.config = EarVAEConfig.from_dict(facts["config"])
        self.name, self.weights_sha256 = str(facts["name"]), str(facts["weights_sha256"])
        self.context_frames = _context_frames(facts["context_frames"])

    @classmethod
    def open(cls, folder: Path, name: str, providers: Sequence[str], like: _Part | None = None) -> _Part:
        """Opens the file of a part, which must be of one model with another part.

        Raises:
            EarVAEError: It is missing, damaged, not one of ours, or of another model.
        """
        path = folder / f"{name}.onnx"
        if not path.is_file():
            raise EarVAEError(
                f"{path}: the file is missing; ear-vae convert MODEL FOLDER --to onnx writes all of them"
            )
        session = open_session(path, providers)
        try:
            facts = unpack_facts(session.get_modelmeta().custom_metadata_map)
            if facts.get("format") != FORMAT or facts.get("part") != name:
                raise EarVAEError(f"{path}: is not the {name} of an εar-VAE that ear-vae exported")
            if facts.get("format_version") != FORMAT_VERSION:
                raise EarVAEError(
                    f"{path}: is of version {shown(facts.get('format_version'))} of the format, this ear-vae "
                    f"reads {FORMAT_VERSION}; export it again"
                )
            part = cls(path, session, facts)
        except (ValueError, KeyError, TypeError) as error:
            raise EarVAEError(f"{path}: its metadata are damaged: {shown(error)}; export it again") from error
        if like is not None and (part.weights_sha256, part.config) != (like.weights_sha256, like.config):
            raise EarVAEError(
                f"{path}: is of {shown(part.name)} with weights {part.weights_sha256[:12]}…, encoder.onnx of "
                f"{shown(like.name)} with {like.weights_sha256[:12]}…; take all files from one export"
            )
        return part

    def run(self, x: Tensor) -> Tensor:
        """What the file computes of a batch."""
        values = np.ascontiguousarray(x.detach().to("cpu", torch.float32).numpy())
        return torch.from_numpy(self._session.run(None, {self._input: values})[0])


def _context_frames(value: Any) -> tuple[int, int]:
    """Frames before and after a tile; (0, 0) where a part is never tiled.

    Raises:
        ValueError: It is no pair of such numbers.
    """
    if value is None:
        return 0, 0
    before, after = map(integer, value)
    if before is None or after is None or not 0 <= min(before, after) <= max(before, after) <= 10_000:
        raise ValueError(f"context_frames must be two numbers of frames, got {shown(value)}")
    return before, after


def open_session(path: Path, providers: Sequence[str] = _CPU) -> Any:
    """An onnxruntime session on a file, with as many threads as torch has.

    Raises:
        EarVAEError: The file or its weights are missing or damaged, or there is no such provider.
    """
    available = onnxruntime.get_available_providers()
    if unknown := [name for name in providers if name not in available]:
        raise EarVAEError(f"onnxruntime has no {', '.join(unknown)} here; it has {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
    # It has classes of its own for each kind of damage, which are not part of its interface.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EarVAEError(f"{path}: onnxruntime cannot load it: {reason}") from error
