"""The model as stable-audio-tools and Stable Audio 3 call an autoencoder.

`AutoencoderPretransform(EarVAEAutoencoder(vae))` stands where they have an Oobleck. Differences that a user
may notice: chunks are exact, whatever their size and overlap; float16 weights are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ear_vae.dsp.resampling import resample
from ear_vae.errors import EarVAEError
from ear_vae.inference.arguments import as_audio_batch
from ear_vae.integrations._moments import moments
from ear_vae.limits import sample_rate_of
from ear_vae.posterior import Posterior
from ear_vae.vae import EarVAE

_HALF = (
    "the autoencoder's decoder overflows with weights in float16; build the pretransform with "
    "model_half=False (the default), and move weights that are in float16 back with .float()"
)


class EarVAEAutoencoder(nn.Module):
    """An `EarVAE` with the attributes and methods of stable-audio-tools' `AudioAutoencoder`.

    Args:
        vae: The model; its weights are shared, not copied.
        sample: Encode to a draw from the posterior, as their VAE bottleneck does; False for its mean.

    Attributes:
        vae: The model itself.
        sample: Whether latents are drawn.
        io_channels: Channels of the audio.
        in_channels: The same.
        out_channels: The same.
        sample_rate: Rate of the audio in Hz.
        downsampling_ratio: Samples per latent frame.
        min_length: The same: the least that can be encoded without padding.
        latent_dim: Channels of the latents.
        bottleneck: None; the posterior is part of the model.
        is_discrete: False.
    """

    def __init__(self, vae: EarVAE, *, sample: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.sample = sample
        self.io_channels = self.in_channels = self.out_channels = vae.audio_channels
        self.sample_rate = vae.sample_rate
        self.downsampling_ratio = self.min_length = vae.downsampling_ratio
        self.latent_dim = vae.latent_dim
        self.bottleneck = None
        self.is_discrete = False

    def half(self) -> NoReturn:
        """Refuses what `AutoencoderPretransform(model_half=True)` asks for.

        Raises:
            EarVAEError: Always.
        """
        raise EarVAEError(_HALF)

    def encode(
        self,
        audio: Tensor,
        skip_bottleneck: bool = False,
        return_info: bool = False,
        skip_pretransform: bool = False,
        iterate_batch: bool = False,
        **options: Any,
    ) -> Any:
        """Encodes audio.

        Args:
            audio: [B, C, T] at `sample_rate`, zero-padded to whole frames.
            skip_bottleneck: Return mean ‖ scale before the softplus, [B, 2 D, N].
            return_info: Return a dictionary as well, with `pre_bottleneck_latents` (mean ‖ scale) and `kl`.
            skip_pretransform: Nothing; there is none.
            iterate_batch: Encode the items of the batch one by one.
            **options: Taken and ignored, as other autoencoders have more of them.

        Returns:
            Latents [B, D, N] in the dtype of `audio`.

        Raises:
            EarVAEError: As `EarVAE.encode`, or the weights are in float16.
        """
        self._require_runnable()
        posteriors = [self.vae.encode(part) for part in (audio.split(1) if iterate_batch else (audio,))]
        posterior = Posterior(
            torch.cat([part.mean for part in posteriors]), torch.cat([part.std for part in posteriors])
        )
        if skip_bottleneck:
            latents = moments(posterior, self.vae.config.min_std)
        else:
            latents = posterior.sample() if self.sample else posterior.mode()
        latents = latents.to(audio.dtype)
        if not return_info:
            return latents
        info = {
            "pre_bottleneck_latents": moments(posterior, self.vae.config.min_std).to(audio.dtype),
            "kl": posterior.kl().mean(),
        }
        return latents, info

    def decode(
        self, latents: Tensor, skip_bottleneck: bool = False, iterate_batch: bool = False, **options: Any
    ) -> Tensor:
        """Decodes latents.

        Args:
            latents: [B, D, N].
            skip_bottleneck: Nothing; it has no part in decoding.
            iterate_batch: Decode the items of the batch one by one.
            **options: Taken and ignored.

        Returns:
            Audio [B, C, N * downsampling_ratio] in the dtype of `latents`.

        Raises:
            EarVAEError: As `EarVAE.decode`, or the weights are in float16.
        """
        self._require_runnable()
        parts = latents.split(1) if iterate_batch else (latents,)
        return torch.cat([self.vae.decode(part) for part in parts]).to(latents.dtype)

    def encode_audio(
        self, audio: Tensor, chunked: bool = False, overlap: int = 32, chunk_size: int = 128, **options: Any
    ) -> Any:
        """Encodes audio of any length; always in exact tiles, whatever the chunks asked for.

        Args:
            audio: [B, C, T].
            chunked: Taken and ignored.
            overlap: Taken and ignored.
            chunk_size: Taken and ignored.
            **options: As for `encode`.

        Returns:
            As `encode`.
        """
        return self.encode(audio, **options)

    def decode_audio(
        self, latents: Tensor, chunked: bool = False, overlap: int = 32, chunk_size: int = 128, **options: Any
    ) -> Tensor:
        """Decodes latents of any length; always in exact tiles, whatever the chunks asked for.

        Args:
            latents: [B, D, N].
            chunked: Taken and ignored.
            overlap: Taken and ignored.
            chunk_size: Taken and ignored.
            **options: As for `decode`.

        Returns:
            As `decode`.
        """
        return self.decode(latents, **options)

    def preprocess_audio_for_encoder(self, audio: Tensor, in_sr: int) -> Tensor:
        """Prepares one recording: resampled, with the model's channels, padded to whole frames.

        Args:
            audio: [C, T], [1, C, T] or [T].
            in_sr: Its rate in Hz.

        Returns:
            [1, C, N * downsampling_ratio].
        """
        return self.preprocess_audio_list_for_encoder([audio], [in_sr])

    def preprocess_audio_list_for_encoder(
        self, audio_list: Sequence[Tensor], in_sr_list: int | Sequence[int]
    ) -> Tensor:
        """Prepares recordings of any rate and length as one batch, padded to the longest.

        Args:
            audio_list: Recordings, each [C, T], [1, C, T] or [T].
            in_sr_list: Their rate in Hz, or one for each.

        Returns:
            [B, C, N * downsampling_ratio].

        Raises:
            EarVAEError: There are not as many rates as recordings, a rate is out of range, or a recording is
                no audio that the model takes.
        """
        rates = [in_sr_list] * len(audio_list) if isinstance(in_sr_list, int) else list(in_sr_list)
        if len(rates) != len(audio_list) or not rates:
            raise EarVAEError(
                f"{len(audio_list)} recordings and {len(rates)} rates; give one rate for each, or one for all"
            )
        prepared = []
        for audio, rate in zip(audio_list, rates, strict=True):
            channels = audio[None] if audio.ndim == 1 else audio
            if self.io_channels == 1:
                channels = channels.mean(dim=-2, keepdim=True)
            batch, _ = as_audio_batch(channels, self.io_channels)
            if batch.shape[0] != 1:
                raise EarVAEError(f"expected one recording [C, T], got shape {list(audio.shape)}")
            if sample_rate_of(rate) != self.sample_rate:
                batch = resample(batch, rate, self.sample_rate)
            prepared.append(batch)
        longest = max(batch.shape[-1] for batch in prepared)
        longest += -longest % self.downsampling_ratio
        return torch.cat(
            [nn.functional.pad(batch, (0, longest - batch.shape[-1])) for batch in prepared], dim=0
        )

    def _require_runnable(self) -> None:
        if self.vae.dtype == torch.float16:
            raise EarVAEError(_HALF)
