"""The public class: encode, decode and reconstruct stereo music."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ear_vae._dtype import available_device, supported_dtype
from ear_vae.config import ConfigSource, EarVAEConfig
from ear_vae.dsp.resampling import resample, resample_stream
from ear_vae.errors import EarVAEError
from ear_vae.inference.arguments import (
    as_audio_batch,
    as_dense_tensor,
    as_latent_batch,
    blocks_alike,
    require_decodable,
)
from ear_vae.inference.precision import cast_if_better
from ear_vae.inference.runner import Runner, optimize
from ear_vae.inference.tiling import encoder_reach
from ear_vae.limits import sample_rate_of, whole_number
from ear_vae.network import Autoencoder
from ear_vae.posterior import Posterior
from ear_vae.pretrained.card import ModelCardFacts
from ear_vae.pretrained.folder import fingerprint, read_folder, write_folder
from ear_vae.pretrained.push import push
from ear_vae.pretrained.resolve import resolve

_LOG = logging.getLogger(__name__)


class Reconstruction(NamedTuple):
    """What one pass through the whole model gives: `audio` [B, C, T] and the `posterior` it went through."""

    audio: Tensor
    posterior: Posterior


class EarVAE(Autoencoder):
    """A variational autoencoder for stereo music.

    A new instance has random weights; `EarVAE.from_pretrained` loads trained ones. Audio of any
    length goes through in exact tiles, so memory does not grow with duration beyond the audio itself
    (unless a gradient is recorded, which keeps every activation by nature).

    Results are float32 (float64 for a float64 model) and lie on the device of the input.

    Args:
        config: The architecture; the published 44.1 kHz one by default.
        name: What latent files will call this model.

    Attributes:
        gradient_checkpointing: Where a gradient is recorded, keep activations only between the stages of the
            networks and compute the others again on the way back: a fraction of the memory for a third
            more time, with the same gradients. False by default.

    Examples:
        >>> import torch
        >>> from ear_vae import EarVAE
        >>> vae = EarVAE.from_pretrained("ear-vae-tiny")
        >>> posterior = vae.encode(torch.zeros(2, 44_100))
        >>> posterior.mean.shape
        torch.Size([64, 173])
        >>> vae.decode(posterior.mode(), num_samples=44_100).shape
        torch.Size([2, 44100])

    Reference: Wang et al., "Back to Ear: Perceptually Driven High Fidelity Music Reconstruction",
    arXiv 2509.14912.
    """

    def __init__(self, config: EarVAEConfig | None = None, *, name: str = "unnamed") -> None:
        super().__init__(config or EarVAEConfig())
        self.name = name
        self.gradient_checkpointing = False
        self._cuda_graphs = False

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

    @property
    def weights_sha256(self) -> str:
        """Fingerprint of the weights, by which files of weights and of latents know their model.

        sha256 over names, shapes and values, these rounded to bfloat16: the same for one model in float32,
        bfloat16 and float64, whatever file it came from; a change that rounds away does not show. It is
        computed anew each time, so that no change of the weights can be missed: 0.4 to 0.5 s of
        processor time at the published size. Keep it in a variable where many files are compared.
        """
        return fingerprint(self.state_dict())

    def encode(self, audio: Tensor | np.ndarray, sample_rate: int | None = None) -> Posterior:
        """Encodes audio to a distribution over latents.

        Args:
            audio: [C, T] or [B, C, T], floating point, nominally within [-1, 1] (not enforced), one or
                two channels; mono is duplicated to two.
            sample_rate: Rate of `audio`, 1 000 to 768 000 Hz, when it is not the model's: it is then
                resampled.

        Returns:
            Posterior with tensors [D, N] or [B, D, N], N = ceil(T / downsampling_ratio) for T samples
            at the model's rate. The last frame is zero-padded on the right.

        Raises:
            EarVAEError: Not an array of numbers, wrong rank, integer dtype, no samples, too many channels,
                unusable rate.
        """
        rate = None if sample_rate is None else sample_rate_of(sample_rate)
        batched, squeeze = self._as_batch(audio)
        batched = _resampled(batched, rate, self.sample_rate)
        posterior = Posterior.from_parameters(self._runner().encode(batched), self.config.min_std)
        return Posterior(posterior.mean[0], posterior.std[0]) if squeeze else posterior

    def decode(self, latents: Tensor | np.ndarray, num_samples: int | None = None) -> Tensor:
        """Decodes latents to audio at the model's rate.

        Args:
            latents: [D, N] or [B, D, N], floating point.
            num_samples: Length to trim to, at most N * downsampling_ratio; untrimmed by default.

        Returns:
            Audio [C, T] or [B, C, T], not limited to [-1, 1].

        Raises:
            EarVAEError: Wrong rank, dtype or number of channels, no frames, `num_samples` out of range.
        """
        z, squeeze = self._as_latents(latents)
        require_decodable(num_samples, z.shape[-1] * self.downsampling_ratio)
        audio = self._runner().decode(z)
        return (audio[0] if squeeze else audio)[..., :num_samples]

    def encode_stream(
        self,
        blocks: Iterable[Tensor | np.ndarray],
        sample_rate: int | None = None,
        *,
        tile_frames: int | None = None,
    ) -> Iterator[Posterior]:
        """Encodes audio that comes in blocks of any length, in memory that does not grow.

        The posteriors, put side by side, are that of the whole. Each comes out as soon as its audio and
        what the encoder sees after it has come in: 8293 samples at the published strides. At another
        sample rate the resampling holds back some 20 s more.

        Args:
            blocks: Pieces of the audio, each as for `encode`, all of one shape but for their length.
            sample_rate: As for `encode`.
            tile_frames: Frames of one posterior, all but the last; by default as many as are fast. Each
                computes its neighbourhood again, about 9 frames on either side.

        Yields:
            Posteriors with tensors [D, n] or [B, D, n].

        Raises:
            EarVAEError: As for `encode`; blocks that are not alike, or `tile_frames` below 1.
        """
        runner = self._runner(tile_frames)
        rate = None if sample_rate is None else sample_rate_of(sample_rate)
        squeeze = False

        def batches() -> Iterator[Tensor]:
            nonlocal squeeze
            for block in blocks_alike("audio", blocks):
                batched, squeeze = self._as_batch(block)
                yield batched

        resampled = batches() if rate is None else resample_stream(batches(), rate, self.sample_rate)
        for parameters in runner.encode_stream(resampled):
            posterior = Posterior.from_parameters(parameters, self.config.min_std)
            yield Posterior(posterior.mean[0], posterior.std[0]) if squeeze else posterior

    def decode_stream(
        self, blocks: Iterable[Tensor | np.ndarray], *, tile_frames: int | None = None
    ) -> Iterator[Tensor]:
        """Decodes latents to audio that comes out in blocks, in memory that does not grow with the audio.

        The blocks, put side by side, are what `decode` gives of the whole. A model with a transformer looks
        at all latents before the first sample comes out, so these are held; one without holds back 11 frames.

        Args:
            blocks: Pieces of the latents, each as for `decode`, all of one shape but for their length.
            tile_frames: Frames of one block of audio, all but the last; by default as many as are fast. Each
                computes its neighbourhood again, about 11 frames on either side.

        Yields:
            Audio [C, t] or [B, C, t] at the model's rate.

        Raises:
            EarVAEError: As for `decode`; blocks that are not alike, or `tile_frames` below 1.
        """
        runner = self._runner(tile_frames)
        squeeze = False

        def batches() -> Iterator[Tensor]:
            nonlocal squeeze
            for block in blocks_alike("latents", blocks):
                batched, squeeze = self._as_latents(block)
                yield batched

        for audio in runner.decode_stream(batches()):
            yield audio[0] if squeeze else audio

    def reconstruct(self, audio: Tensor | np.ndarray, sample_rate: int | None = None) -> Tensor:
        """Encodes audio to the posterior's mean and decodes it again.

        Args:
            audio: As for `encode`.
            sample_rate: As for `encode`.

        Returns:
            Audio of the input's shape and rate. Mono comes back as mono (the mean of the two
            channels), other levels and lengths are not touched.

        Raises:
            EarVAEError: As for `encode`.
        """
        rate = None if sample_rate is None else sample_rate_of(sample_rate)
        x = as_dense_tensor("audio", audio)
        batched, squeeze = self._as_batch(x)
        num_samples, mono_in_stereo = batched.shape[-1], x.shape[-2] < self.audio_channels
        batched = _resampled(batched, rate, self.sample_rate)
        model_samples = batched.shape[-1]
        parameters = self._runner().encode(batched)
        del batched  # An hour of audio is a gigabyte; do not hold it while decoding.
        rebuilt = self._runner().decode(Posterior.from_parameters(parameters).mean)[..., :model_samples]
        if mono_in_stereo:
            rebuilt = rebuilt.mean(dim=1, keepdim=True)
        if rate is not None:
            rebuilt = _resampled(rebuilt, self.sample_rate, rate)[..., :num_samples]
        return rebuilt[0] if squeeze else rebuilt

    def forward(
        self, audio: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """One pass as in training.

        Args:
            audio: [B, C, T] at the model's rate with the model's channels.
            sample: Decode a draw from the posterior instead of its mean.
            generator: Source of the draw.

        Returns:
            The rebuilt audio [B, C, T] and the posterior.

        Raises:
            EarVAEError: As for `encode`.
        """
        posterior = self.encode(audio)
        latents = posterior.sample(generator) if sample else posterior.mode()
        return Reconstruction(self.decode(latents, num_samples=audio.shape[-1]), posterior)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        config: ConfigSource | None = None,
        variant: str | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
    ) -> EarVAE:
        """Loads a trained model: a local folder or file, else a bundled checkpoint, else a Hub repository.

        The model comes in evaluation mode and frozen (`requires_grad_(True)` to train it), so that a
        call outside `torch.no_grad()` does not keep every activation; gradients with respect to audio
        and latents flow all the same.

        Args:
            name_or_path: A folder in our layout (`config.json`, `model.safetensors`) or in the official
                one, the name of a bundled checkpoint such as `ear-vae-tiny`, or a Hub repository id such
                as `earlab/EAR_VAE`. Folders and repositories may hold an Oobleck of diffusers or of
                stable-audio-tools as well. Or a bare file of weights (`.pyt`, `.pt`, `.safetensors` …), with
                the authors' names or ours, with weight norm or without, alone or under `state_dict`, `model`
                or `gen_ema`; or a clone of the authors' repository.
            config: Of a bare file of weights: its config as a JSON file or a dict, the authors', ours or
                in part (`{"sample_rate": 44100}`), or the name of a published model whose sample rate and
                strides it has. By default the `.json` of the same name beside it, else what the tensors
                tell: all but the sample rate, which is known of the two published tuples of strides.
            variant: Which model of a repository that holds several, such as `ear_vae_44k`.
            revision: Branch, tag or commit on the Hub.
            device: Where to put the model; the CPU by default.
            dtype: float32 (default), bfloat16 or float64, as torch's or by name. float16 is refused: it
                overflows in the decoder. Or `"auto"`: bfloat16 where half a second of audio shows that it is
                faster on this processor and at least 45 dB SI-SDR from float32, or on a GPU that has it, else
                float32; which takes some passes more, and is told to the logger `ear_vae.vae`.
            local_files_only: Do not go to the network.
            token: Access token for the Hub.
            cache_dir: Where Hub files and conversions are cached instead of the Hub's usual folder.
            force_download: Fetch from the Hub again even if cached.

        Raises:
            EarVAEError: Nothing is found under the name, the variant is missing or unknown, a file is
                damaged, holds something else or does not fit its config, the weights do not have the
                fingerprint that their file states, the download failed, or there is no such device or dtype.
        """
        automatic = isinstance(dtype, str) and dtype == "auto"
        device, dtype = available_device(device), None if automatic else supported_dtype(dtype)
        checkpoint = resolve(
            name_or_path,
            config=config,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
        )
        # Weights made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            config, state = read_folder(checkpoint.folder)
            with torch.device("meta"):
                vae = cls(config, name=checkpoint.name)
            vae.load_state_dict(state, assign=True)
            vae.eval().requires_grad_(False)
            if dtype is not None:
                vae.cast(dtype)
            vae.to(device=device)
            if automatic:
                chosen = cast_if_better(vae)
                _LOG.info("%s computes in %s: %s", vae.name, chosen.dtype, chosen.reason)
            return vae

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, card: ModelCardFacts | None = None
    ) -> None:
        """Writes `config.json`, `model.safetensors` and, unless there is one, a model card `README.md`.

        The card says what the model itself tells. The same model gives the same files to the bit.

        Args:
            directory: Folder to write, made if needed.
            card: What to add to the card: licence, data, base model, figures.

        Raises:
            EarVAEError: The weights are not those that `from_pretrained` would take: parts of them have other
                names, as with weight norm or under torch.compile, or they are not finite; `card` is given and
                there is a card; or the folder cannot be written to.
        """
        write_folder(directory, self.config, self.state_dict(), name=self.name, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload εar-VAE",
        card: ModelCardFacts | None = None,
    ) -> str:
        """Creates the Hub repository if needed and uploads what `save_pretrained` writes.

        A card that is in the repository stays.

        Args:
            repo_id: Repository, `owner/name`.
            token: Access token with the right to write; by default that of the login.
            private: Make a new repository private; by default what the account's settings say.
            commit_message: First line of the commit.
            card: What to add to the card, as for `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            EarVAEError: As `save_pretrained`, or the Hub refused or could not be reached.
        """
        return push(
            self.config,
            self.state_dict(),
            repo_id,
            name=self.name,
            token=token,
            private=private,
            commit_message=commit_message,
            card=card,
        )

    def normalize(self, latents: Tensor | np.ndarray) -> Tensor:
        """Returns latents with mean 0 and standard deviation 1 in each channel, for generative models.

        (latents − mean) / std with the statistics in `config.latents_mean` and `config.latents_std`, which
        `ear-vae statistics DATASET --into MODEL` writes and `set_latent_statistics` sets.

        Args:
            latents: [D, N] or [B, D, N], floating point.

        Returns:
            Latents of the same shape and dtype, on the same device; gradients flow.

        Raises:
            EarVAEError: The model has no statistics; otherwise as for `decode`.
        """
        z, mean, std = self._with_statistics(latents)
        return ((z - mean) / std).to(z.dtype)

    def denormalize(self, latents: Tensor | np.ndarray) -> Tensor:
        """Returns what `normalize` made normal as latents to decode: latents · std + mean.

        Args:
            latents: [D, N] or [B, D, N], floating point.

        Returns:
            Latents of the same shape and dtype, on the same device; gradients flow.

        Raises:
            EarVAEError: As for `normalize`.
        """
        z, mean, std = self._with_statistics(latents)
        return (z * std + mean).to(z.dtype)

    def set_latent_statistics(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Gives the model the statistics that `normalize` uses; `save_pretrained` writes them.

        Args:
            mean: Mean of each latent channel, D numbers.
            std: Standard deviation of each latent channel, D numbers above 0.

        Raises:
            EarVAEError: They are not D finite numbers each, or a standard deviation is not above 0.
        """
        try:
            listed = [tuple(map(float, values)) for values in (mean, std)]
        except (TypeError, ValueError) as error:
            raise EarVAEError(f"mean and std must be {self.latent_dim} numbers each") from error
        self.config = replace(self.config, latents_mean=listed[0], latents_std=listed[1])

    def silence(self, num_frames: int) -> Tensor:
        """Returns the latents of digital silence, with which generative models pad: they are not zeros.

        What `encode(torch.zeros(C, num_frames * downsampling_ratio)).mode()` gives. Frames that do not see
        the edges are all alike, so that any length costs what a short one does.

        Args:
            num_frames: Number of latent frames N, at least 1.

        Returns:
            Latents [D, N] in float32 (float64 for a float64 model), on the model's device.

        Raises:
            EarVAEError: `num_frames` is no integer of 1 or more.
        """
        frames = whole_number(num_frames, "num_frames", lowest=1)
        ratio = self.downsampling_ratio
        before, after = (-(-reach // ratio) for reach in encoder_reach(self.encoder, ratio))
        computed = min(frames, before + 1 + after)
        audio = torch.zeros(self.audio_channels, computed * ratio, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            latents = self.encode(audio).mode()
        middle = latents[:, before : before + 1].expand(-1, frames - computed)
        return torch.cat([latents[:, :before], middle, latents[:, before:]], dim=1)

    def optimize_for_inference(self) -> None:
        """Prepares for many passes that record no gradient, on the device where the model is now.

        On a CPU the activation is compiled to one pass over memory instead of four, which takes some seconds
        once in a process. Encode and decode then run about an eighth faster at the published size, with the
        same result but for the rounding; `docs/speed.md` has figures. Call it in the mode in which the model
        will run, `torch.inference_mode` or not: torch compiles anew for the other. Where it cannot compile,
        there is a warning and nothing changes.

        On CUDA, also if the model is moved there later, the activation is one pass already, and short inputs
        (up to some 9 s) of a shape that comes again are recorded as CUDA graphs and replayed; threads take
        turns. Calling it again drops the graphs that have been recorded.

        It has nothing to do with `compile`, which is `torch.nn.Module.compile` and compiles `forward`.
        """
        self._cuda_graphs = True
        optimize(self)

    def _as_batch(self, audio: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        return as_audio_batch(audio, self.audio_channels)

    def _as_latents(self, latents: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        return as_latent_batch(latents, self.latent_dim)

    def _with_statistics(self, latents: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Latents as a tensor, and the statistics as [D, 1] in float32 at least."""
        if self.config.latents_mean is None or self.config.latents_std is None:
            raise EarVAEError(
                f"{self.name} has no latent statistics to normalize with; measure them with ear-vae "
                "statistics DATASET --into MODEL, or give them with EarVAE.set_latent_statistics"
            )
        z, squeeze = self._as_latents(latents)
        dtype = torch.promote_types(z.dtype, torch.float32)
        mean, std = (
            torch.tensor(values, dtype=dtype, device=z.device)[:, None]
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return (z[0] if squeeze else z), mean, std

    def _runner(self, tile_frames: int | None = None) -> Runner:
        if tile_frames is not None:
            tile_frames = whole_number(tile_frames, "tile_frames", lowest=1)
        return Runner(
            self,
            gradient_checkpointing=self.gradient_checkpointing,
            cuda_graphs=self._cuda_graphs,
            tile_frames=tile_frames,
        )


def _resampled(audio: Tensor, original_rate: int | None, target_rate: int) -> Tensor:
    return audio if original_rate in (None, target_rate) else resample(audio, original_rate, target_rate)
