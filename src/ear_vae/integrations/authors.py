"""The class of the authors' inference script, `model.ear_vae.EAR_VAE`, as the code that vendors it calls it.

Differences that its user may notice:

- Audio is padded with zeros to whole frames, and `inference` returns as many samples as it was given. Theirs
  drops what is over: T // downsampling_ratio frames, of which the last 8 differ from ours.
  `EAR_VAE(model_config, floor=True)` gives their frames and their values.
- Audio of any length goes through in exact tiles, outside of which no gradient is recorded.
- Whether there is a transformer is decided by the weights, whatever the config lists.
- Weights load strictly. Parameters are plain; `state_dict` writes the authors' names, with weight norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ear_vae._dtype import require_runnable, upcast
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.inference.arguments import as_audio_batch
from ear_vae.inference.tiling import encoder_reach
from ear_vae.limits import shown
from ear_vae.network import Decoder, Encoder
from ear_vae.posterior import Posterior
from ear_vae.pretrained.layouts.bare import sample_rate_for
from ear_vae.pretrained.layouts.official_state_dict import (
    from_official,
    official_config,
    to_official,
    transformer_fields,
)
from ear_vae.pretrained.layouts.state_dict import autoencoder_state
from ear_vae.vae import EarVAE

_WHERE = "the state dict"
_NAME = "vae."
# Numbers in the widest activation of one pass: 12 s at the published size, some 2 GB together.
_MOST_AT_ONCE = 2**26


class EAR_VAE(nn.Module):
    """An `EarVAE` with the constructor, the methods and the state dict of the authors' class.

    Args:
        model_config: Content of the authors' `config/model_config.json` or `config/ear_vae_v2.json`; by
            default that of `ear_vae_44k` without a transformer, as theirs. Other strides than the two
            published tuples need `sample_rate` in it.
        floor: Drop what is over after whole frames, as the authors' class does, instead of padding it. Short
            audio (12 s at the published size) is then encoded in one pass, as theirs, so that values are
            theirs to the last bit; longer audio in tiles, which differ by the rounding.

    Attributes:
        vae: The model itself, with all that `EarVAE` can do.
        floor: Whether what is over is dropped.

    Raises:
        EarVAEError: The config is none of the authors', or of a network that they did not publish.
    """

    def __init__(self, model_config: Mapping[str, Any] | None = None, *, floor: bool = False) -> None:
        super().__init__()
        self.vae = EarVAE(_config(model_config))
        self.floor = floor
        self.register_load_state_dict_pre_hook(_take_official)
        self.register_state_dict_post_hook(_give_official)

    @property
    def encoder(self) -> Encoder:
        """The convolutional encoder: audio [B, C, T] to mean ‖ scale [B, 2 D, T // downsampling_ratio]."""
        return self.vae.encoder

    @property
    def decoder(self) -> Decoder:
        """The convolutional decoder: transformed latents [B, D, N] to audio."""
        return self.vae.decoder

    def encode(self, audio: Tensor, use_sample: bool = True) -> Tensor:
        """Encodes audio.

        Args:
            audio: [B, C, T] at the model's rate.
            use_sample: Draw from the posterior, with torch's global generator, instead of taking its mean.

        Returns:
            Latents [B, D, N], N = ceil(T / downsampling_ratio), or with `floor` T // downsampling_ratio.

        Raises:
            EarVAEError: As `EarVAE.encode`, or with `floor` there is no whole frame.
        """
        posterior = self._posterior(audio)
        return posterior.sample() if use_sample else posterior.mode()

    def decode(self, z: Tensor) -> Tensor:
        """Decodes latents [B, D, N] to audio [B, C, N * downsampling_ratio].

        Raises:
            EarVAEError: As `EarVAE.decode`.
        """
        return self.vae.decode(z)

    @torch.no_grad()
    def inference(self, audio: Tensor) -> Tensor:
        """Encodes audio [B, C, T] to a draw from its posterior, and decodes that.

        Returns:
            Audio of the length of `audio`; with `floor`, of its whole frames.

        Raises:
            EarVAEError: As `encode`.
        """
        return self.decode(self.encode(audio))[..., : audio.shape[-1]]

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """One pass as in training, through a draw from the posterior.

        Args:
            audio: [B, C, T] at the model's rate.

        Returns:
            Rebuilt audio as of `inference`, and the KL divergence, the mean over items and frames.

        Raises:
            EarVAEError: As `encode`.
        """
        posterior = self._posterior(audio)
        return self.decode(posterior.sample())[..., : audio.shape[-1]], posterior.kl().mean()

    def _posterior(self, audio: Tensor) -> Posterior:
        if not self.floor:
            return self.vae.encode(audio)
        hop = self.vae.downsampling_ratio
        x, squeeze = as_audio_batch(audio, self.vae.audio_channels)
        frames = x.shape[-1] // hop
        if not frames:
            raise EarVAEError(f"audio has {x.shape[-1]} samples, with floor=True it needs {hop} or more")
        if x.shape[0] * x.shape[-1] * self.vae.config.channels <= _MOST_AT_ONCE:
            posterior = self._straight(x)
        else:
            posterior = self._tiled(x, frames)
        return Posterior(posterior.mean[0], posterior.std[0]) if squeeze else posterior

    def _straight(self, x: Tensor) -> Posterior:
        """The posterior of audio in one pass, as the authors' class computes it."""
        require_runnable(self.vae.weight_dtypes(), self.vae.device)
        parameters = upcast(self.vae.encoder(x.to(self.vae.device, self.vae.dtype))).to(x.device)
        return Posterior.from_parameters(parameters, self.vae.config.min_std)

    def _tiled(self, x: Tensor, frames: int) -> Posterior:
        """The same in exact tiles; only the last frames see the end of the audio, and are computed anew."""
        hop = self.vae.downsampling_ratio
        whole = self.vae.encode(x[..., : frames * hop])
        before, after = (math.ceil(reach / hop) for reach in encoder_reach(self.vae.encoder, hop))
        first = max(0, frames - after)
        start = max(0, first - before)
        end = self._straight(x[..., start * hop :])
        mean, std = (
            torch.cat([tiled[..., :first], straight[..., first - start :]], dim=-1)
            for tiled, straight in ((whole.mean, end.mean), (whole.std, end.std))
        )
        return Posterior(mean, std)


def _config(values: Mapping[str, Any] | None) -> EarVAEConfig:
    if values is None:
        return EarVAEConfig(transformer_depth=0)
    try:
        strides = values["encoder"]["config"]["strides"]
        transformer = values.get("transformer") or {}
        return official_config(
            {**values, "transformer": transformer},
            sample_rate=sample_rate_for(values, strides, "model_config"),
            transformer_depth=transformer.get("depth", 0),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(
            f"model_config must be the content of the authors' config file, a dict; got {shown(values)}"
        ) from error


def _take_official(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts our tensors in the place of the authors', and makes the network that they are of."""
    assert isinstance(module, EAR_VAE)
    given = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
    state = autoencoder_state(_WHERE, given)
    config = replace(module.vae.config, **transformer_fields(state))
    with torch.no_grad():
        ours = from_official(_WHERE, state, config)
    if config != module.vae.config:
        old = module.vae
        trainable = any(parameter.requires_grad for parameter in old.parameters())
        module.vae = EarVAE(config, name=old.name).to(old.device, old.dtype).train(old.training)
        module.vae.requires_grad_(trainable)
    for name in given:
        del state_dict[prefix + name]
    state_dict |= {f"{prefix}{_NAME}{name}": tensor for name, tensor in ours.items()}


def _give_official(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts the authors' tensors in the place of ours."""
    assert isinstance(module, EAR_VAE)
    own = [name for name in state_dict if name.startswith(prefix + _NAME)]
    ours = {name.removeprefix(prefix + _NAME): state_dict.pop(name) for name in own}
    with torch.no_grad():
        official = to_official(ours, module.vae.config)
    state_dict |= {prefix + name: tensor for name, tensor in official.items()}
