"""The model behind the interface of diffusers' `AutoencoderOobleck`, with exact tiles.

Differences that a user of `AutoencoderOobleck` may notice:

- Audio is padded with zeros to whole frames; Oobleck drops the incomplete one.
- Tiles are exact and always on: `enable_tiling` is accepted and changes nothing.
- float16 audio and latents are computed in float32 and come back as float16. Only weights in float16 are
  refused, because the decoder overflows in it.
- `kl(other)` has the sign of the logarithm right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_vae._atomic import atomic_folder, atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.integrations._moments import moments
from ear_vae.integrations._optional import optional
from ear_vae.posterior import Posterior
from ear_vae.pretrained.folder import CONFIG_FILE
from ear_vae.pretrained.layouts.oobleck import CLASS_KEY, OUR_CLASS, config_for_diffusers, config_of_diffusers
from ear_vae.vae import EarVAE

with optional("diffusers", extra="diffusers"):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.autoencoder_oobleck import (
        AutoencoderOobleckOutput,
        OobleckDecoderOutput,
    )
    from diffusers.models.autoencoders.vae import AutoencoderMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils import is_accelerate_available
    from diffusers.utils.accelerate_utils import apply_forward_hook
    from diffusers.utils.torch_utils import randn_tensor

REMOTE_FILE = "modeling_ear_vae.py"
"""What `AutoModel.from_pretrained(folder, trust_remote_code=True)` runs."""
_AUTO_MAP = "auto_map"


class LatentDistribution:
    """The posterior as diffusers' pipelines read it, in the dtype of the audio.

    Args:
        posterior: Posterior with tensors [B, D, N].
        min_std: `EarVAEConfig.min_std` of the model.
        dtype: Dtype of the tensors and of what is drawn.

    Attributes:
        mean: Means, [B, D, N].
        std: Standard deviations, [B, D, N].
        var: Their squares.
        logvar: Logarithms of these.
        parameters: Mean ‖ scale before the softplus, [B, 2 D, N].
        deterministic: Always False.
    """

    deterministic = False

    def __init__(self, posterior: Posterior, min_std: float, dtype: torch.dtype) -> None:
        self._posterior = posterior
        self.mean, self.std = posterior.mean.to(dtype), posterior.std.to(dtype)
        self.var = posterior.std.square().to(dtype)
        self.logvar = (2 * posterior.std.log()).to(dtype)
        self.parameters = moments(posterior, min_std).to(dtype)

    def mode(self) -> Tensor:
        """The means."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Draws latents [B, D, N].

        Args:
            generator: Source of the noise, or one for each item of the batch.
        """
        noise: Tensor = randn_tensor(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise

    def kl(self, other: LatentDistribution | None = None) -> Tensor:
        """Divergence from the standard normal prior or another distribution, without the ½ of the textbook.

        Args:
            other: Distribution with tensors of the same shape.

        Returns:
            One number, the mean over items and frames of the sum over channels.
        """
        mean, std = self._posterior.mean, self._posterior.std
        if other is None:
            terms = mean.square() + std.square() - 2 * std.log() - 1
        else:
            to_mean, to_std = other._posterior.mean, other._posterior.std
            ratio = (std / to_std).square()
            terms = ((mean - to_mean) / to_std).square() + ratio - ratio.log() - 1
        return terms.sum(dim=1).mean().to(self.mean.dtype)


class AutoencoderEarVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """εar-VAE, or an Oobleck run in its exact tiles, as the autoencoder of a diffusers pipeline.

    The defaults are the published `ear_vae_44k`. `from_ear_vae` takes a model that `EarVAE.from_pretrained`
    loads; `from_pretrained` and `save_pretrained` are diffusers' own, in its layout.

    Args:
        encoder_hidden_size: Width of the blocks at full rate.
        downsampling_ratios: Downsampling of each block.
        channel_multiples: Widths of the blocks as multiples of that at full rate.
        decoder_channels: The same number as `encoder_hidden_size`.
        decoder_input_channels: Channels of the latents.
        audio_channels: Channels of the audio.
        sampling_rate: Rate of the audio in Hz.
        transformer_depth: Layers of the transformer on the latents.
        transformer_head_dim: Channels of one attention head.
        architecture: Family of networks, see `EarVAEConfig`.
        snakes_per_residual_unit: 2 for an Oobleck.
        min_std: 1e-4 for an Oobleck.
        latents_mean: Mean of each latent channel, where it was measured.
        latents_std: Standard deviation of each latent channel, likewise.

    Attributes:
        vae: The model itself, with all that `EarVAE` can do.
        sampling_rate: Rate of the audio in Hz.
        hop_length: Samples per latent frame.
        downsampling_ratio: The same under another name.
        use_slicing: Whether the items of a batch go through one by one.
        use_tiling: Whether tiling was asked for; tiles are always on.

    Raises:
        EarVAEError: The arguments are those of no network.
    """

    _supports_gradient_checkpointing = False
    # A pipeline that is loaded in float16 keeps it in float32. diffusers needs accelerate for that.
    _keep_in_fp32_modules = ["vae"] if is_accelerate_available() else None

    @register_to_config
    def __init__(
        self,
        encoder_hidden_size: int = 128,
        downsampling_ratios: tuple[int, ...] = (2, 4, 4, 4, 8),
        channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16),
        decoder_channels: int = 128,
        decoder_input_channels: int = 64,
        audio_channels: int = 2,
        sampling_rate: int = 44_100,
        transformer_depth: int = 2,
        transformer_head_dim: int = 32,
        architecture: str = "ear_vae",
        snakes_per_residual_unit: int = 1,
        min_std: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.vae = EarVAE(config_of_diffusers({CLASS_KEY: OUR_CLASS, **self.config}))
        self.sampling_rate = sampling_rate
        self.hop_length = self.downsampling_ratio = self.vae.downsampling_ratio
        self.use_slicing = False
        self.use_tiling = False

    @classmethod
    def from_ear_vae(cls, vae: EarVAE) -> AutoencoderEarVAE:
        """Wraps a model; its weights are shared, not copied."""
        with torch.device("meta"):
            wrapped = cls(**config_for_diffusers(vae.config))
        wrapped.vae = vae
        return wrapped.train(vae.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Loads what `save_pretrained` wrote, as `from_pretrained` of every diffusers model, but strictly.

        Args:
            pretrained_model_name_or_path: A folder or a Hub repository.
            **options: As diffusers' own, such as `subfolder` and `torch_dtype`; float16 leaves the weights in
                float32.

        Raises:
            EarVAEError: The weights are those of another network.
        """
        wants_info = options.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **options
            )
        except (ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EarVAEError(
                f"{pretrained_model_name_or_path}: the weights do not fit the config: {reason}"
            ) from error
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise EarVAEError(
                f"{pretrained_model_name_or_path}: the weights do not fit the config: "
                f"{'; '.join(problems[:3])}{more}; for weights in another layout use EarVAE.from_pretrained "
                "and AutoencoderEarVAE.from_ear_vae"
            )
        return (model, info) if wants_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Splits a config in arguments and the rest, as diffusers does, which would warn of `auto_map`."""
        config = {name: value for name, value in config_dict.items() if name != _AUTO_MAP}
        return super().extract_init_dict(config, **options)

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Writes `config.json`, and what `AutoModel.from_pretrained(…, trust_remote_code=True)` needs."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)
        path = Path(save_directory) / CONFIG_FILE
        values = json.loads(path.read_text(encoding="utf-8"))
        values[_AUTO_MAP] = {"AutoModel": f"{Path(REMOTE_FILE).stem}.{type(self).__name__}"}
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with atomic_path(path.with_name(REMOTE_FILE), overwrite=True) as temporary:
            temporary.write_bytes((files("ear_vae.integrations") / REMOTE_FILE).read_bytes())

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderOobleckOutput | tuple[LatentDistribution]:
        """Encodes audio.

        Args:
            x: [B, C, T] at `sampling_rate`, zero-padded to whole frames.
            return_dict: Return an `AutoencoderOobleckOutput` instead of a tuple.

        Returns:
            The distribution over latents [B, D, N] with N = ceil(T / hop_length), in the dtype of `x`.

        Raises:
            EarVAEError: As `EarVAE.encode`, or the weights are in float16.
        """
        with self._runnable(x):
            posteriors = [self.vae.encode(part) for part in self._slices(x)]
            mean, std = (
                torch.cat(parts) for parts in zip(*((p.mean, p.std) for p in posteriors), strict=True)
            )
            distribution = LatentDistribution(Posterior(mean, std), self.vae.config.min_std, x.dtype)
        return AutoencoderOobleckOutput(latent_dist=distribution) if return_dict else (distribution,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> OobleckDecoderOutput | tuple[Tensor]:
        """Decodes latents.

        Args:
            z: [B, D, N].
            return_dict: Return an `OobleckDecoderOutput` instead of a tuple.
            generator: Taken because pipelines give it; nothing is random here.

        Returns:
            Audio [B, C, N * hop_length] in the dtype of `z`.

        Raises:
            EarVAEError: As `EarVAE.decode`, or the weights are in float16.
        """
        with self._runnable(z):
            audio = torch.cat([self.vae.decode(part) for part in self._slices(z)]).to(z.dtype)
        return OobleckDecoderOutput(sample=audio) if return_dict else (audio,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> OobleckDecoderOutput | tuple[Tensor]:
        """Encodes and decodes audio.

        Args:
            sample: Audio [B, C, T].
            sample_posterior: Decode a draw from the posterior instead of its mean.
            return_dict: Return an `OobleckDecoderOutput` instead of a tuple.
            generator: Source of the draw, or one for each item.

        Returns:
            Audio of the shape of `sample`.

        Raises:
            EarVAEError: As `encode`.
        """
        distribution = self.encode(sample, return_dict=False)[0]
        z = distribution.sample(generator) if sample_posterior else distribution.mode()
        audio = self.decode(z, return_dict=False)[0][..., : sample.shape[-1]]
        return OobleckDecoderOutput(sample=audio) if return_dict else (audio,)

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim != 3:
            raise EarVAEError(f"expected a batch [B, channels, length], got shape {list(x.shape)}")
        return x.split(1) if self.use_slicing else (x,)

    @contextmanager
    def _runnable(self, x: Tensor) -> Iterator[None]:
        if self.dtype == torch.float16:
            raise EarVAEError(
                "the autoencoder's weights are in float16, in which its decoder overflows; move them back "
                "with pipe.vae.to(torch.float32): latents and the rest of the pipeline may stay in float16"
            )
        kind = self.device.type
        half = torch.amp.is_autocast_available(kind) and torch.get_autocast_dtype(kind) == torch.float16
        with torch.autocast(kind, enabled=False) if half else _as_it_is():
            yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def export_diffusers(vae: EarVAE, destination: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a model as a folder that `AutoencoderEarVAE.from_pretrained` and diffusers' `AutoModel` load.

    Args:
        vae: The model.
        destination: The folder; its parents are made.
        overwrite: Replace these files in a folder that exists.

    Raises:
        EarVAEError: The destination exists or cannot be written to.
    """
    with atomic_folder(Path(destination), overwrite=overwrite) as folder:
        AutoencoderEarVAE.from_ear_vae(vae).save_pretrained(folder)
