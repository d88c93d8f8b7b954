"""Other codecs as systems, each through its own library; all of these are optional."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ear_vae.dsp import _torchaudio as torchaudio
from ear_vae.errors import EarVAEError, first_line
from ear_vae.evaluation.systems.base import System
from ear_vae.inference.tiling import run_tiled
from ear_vae.pretrained.resolve import why_offline

# Convolutional codecs process long audio in tiles of this length with this much context, which is more than
# the receptive field of any of them.
_TILE_SECONDS, _CONTEXT_SECONDS = 20, 2
_INSTALL = 'pip install "ear-vae[codecs]"'


@dataclass(frozen=True)
class Codec:
    """A codec that `--model NAME` or `--model NAME=SOURCE` names.

    Attributes:
        source: Hub repository that the name alone stands for.
        library: Name of the library that it needs, for messages.
        build: Function that loads it from a repository or folder, onto a device, and without the network
            where `local_files_only`.
    """

    source: str
    library: str
    build: Callable[..., tuple[Any, int, int, Callable[[Tensor], Tensor]]]


class CodecSystem:
    """A codec as a `System`.

    Args:
        name: Name of the system in tables.
        source: Folder or Hub repository.
        codec: Codec to load.
        device: Device to compute on.

    Raises:
        EarVAEError: Its library is missing, or the weights cannot be loaded.
    """

    def __init__(self, name: str, source: str, codec: Codec, device: torch.device) -> None:
        self.name = name
        # Their libraries import torchaudio, which must be importable even where its extension does not fit.
        torchaudio.functional()
        offline = None if Path(source).is_dir() else why_offline(source, "config.json")
        try:
            network, self.sample_rate, self.channels, self._rebuild = codec.build(
                source, device, local_files_only=offline is not None
            )
        except ImportError as error:
            raise EarVAEError(f"{name} needs {codec.library}: {_INSTALL} ({error})") from error
        # Whatever a library raises for a wrong folder, a refused download or a damaged file.
        except Exception as error:
            problem = first_line(error)
            if offline is not None:
                problem += (
                    f"; the Hub cannot be asked ({first_line(offline)}), so only what is in the local cache "
                    f"loads: check the connection, or give a local folder ({name.partition('=')[0]}=FOLDER)"
                )
            raise EarVAEError(f"{name}: cannot be loaded from {source}: {problem}") from error
        self.identity = _digest(network)
        self._device = device

    def reconstruct(self, audio: Tensor) -> Tensor:
        """Rebuilds audio [channels, T] at `sample_rate`; returns at most T samples."""
        with torch.inference_mode():
            rebuilt = self._rebuild(audio.unsqueeze(0).to(self._device))
        return rebuilt[0, :, : audio.shape[-1]].float().to(audio.device)


def load_codec(name: str, *, device: torch.device) -> System | None:
    """Loads the codec that a name or `NAME=SOURCE` stands for; None where it names none.

    Args:
        name: Key of `CODECS`, alone or with `=` and the folder or Hub repository to load.
        device: Device to compute on.

    Raises:
        EarVAEError: As `CodecSystem`.
    """
    if not is_codec(name):
        return None
    short, _, source = name.partition("=")
    codec = CODECS[short]
    return CodecSystem(name, source or codec.source, codec, device)


def is_codec(name: str) -> bool:
    """Whether a name, or `NAME=SOURCE`, stands for one of `CODECS`."""
    short, equals, source = name.partition("=")
    return short in CODECS and bool(source or not equals)


def _dac(
    source: str, device: torch.device, *, local_files_only: bool
) -> tuple[Any, int, int, Callable[[Tensor], Tensor]]:
    from transformers import DacModel

    model = DacModel.from_pretrained(source, use_safetensors=True, local_files_only=local_files_only)
    model = model.to(device).eval()
    hop = math.prod(model.config.downsampling_ratios)
    rate = model.config.sampling_rate
    return model, rate, 1, _tiled(lambda audio: model(audio).audio_values.unsqueeze(1), hop, rate)


def _encodec(
    source: str, device: torch.device, *, local_files_only: bool
) -> tuple[Any, int, int, Callable[[Tensor], Tensor]]:
    from transformers import EncodecFeatureExtractor, EncodecModel

    model = EncodecModel.from_pretrained(source, use_safetensors=True, local_files_only=local_files_only)
    model = model.to(device).eval()
    config = model.config
    # It cuts audio into overlapping chunks itself, which is part of the codec.
    prepare = EncodecFeatureExtractor(
        feature_size=config.audio_channels,
        sampling_rate=config.sampling_rate,
        chunk_length_s=config.chunk_length_s,
        overlap=config.overlap,
    )

    def rebuild(audio: Tensor) -> Tensor:
        given = audio[0].cpu().numpy()
        inputs = prepare(
            given if len(given) == 2 else given[0], sampling_rate=config.sampling_rate, return_tensors="pt"
        ).to(device)
        rebuilt: Tensor = model(**inputs, bandwidth=max(config.target_bandwidths)).audio_values
        return rebuilt

    return model, config.sampling_rate, config.audio_channels, rebuild


def _stable_audio_open(
    source: str, device: torch.device, *, local_files_only: bool
) -> tuple[Any, int, int, Callable[[Tensor], Tensor]]:
    from diffusers import AutoencoderOobleck

    folder = Path(source)
    inner = "vae" if not folder.is_dir() or (folder / "vae").is_dir() else None
    model = AutoencoderOobleck.from_pretrained(
        source,
        subfolder=inner,
        use_safetensors=True,
        local_files_only=local_files_only,
        low_cpu_mem_usage=False,  # what it falls back to without accelerate, with a notice of four lines
    )
    model = model.to(device).eval()
    rate = model.config.sampling_rate

    def rebuild(audio: Tensor) -> Tensor:
        rebuilt: Tensor = model.decode(model.encode(audio).latent_dist.mode()).sample
        return rebuilt

    hop = math.prod(model.config.downsampling_ratios)
    return model, rate, model.config.audio_channels, _tiled(rebuild, hop, rate)


def _agc(
    source: str, device: torch.device, *, local_files_only: bool
) -> tuple[Any, int, int, Callable[[Tensor], Tensor]]:
    from agc import AGC
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    # Its own from_pretrained does not work with transformers 5.
    files = ["config.json", "model.safetensors"]
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=files, local_files_only=local_files_only))
    model = AGC(AGC.config_class.from_json_file(folder / files[0]))
    model.load_state_dict(load_file(folder / files[1]))
    model.to(device).eval()
    rate = model.config.sample_rate

    def rebuild(audio: Tensor) -> Tensor:
        # It draws from its posterior.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rebuilt: Tensor = model.decode(model.encode(audio))
        return rebuilt

    return model, rate, 2, _tiled(rebuild, int(model.hop_length), rate)


def _tiled(network: Callable[[Tensor], Tensor], hop: int, sample_rate: int) -> Callable[[Tensor], Tensor]:
    """Makes `network` take audio [1, C, T] of any length, in tiles on the grid of its frames."""
    context = -(-_CONTEXT_SECONDS * sample_rate // hop)

    def in_tiles(audio: Tensor) -> Tensor:
        missing = -audio.shape[-1] % hop
        return run_tiled(
            network,
            torch.nn.functional.pad(audio, (0, missing)),
            inputs_per_frame=hop,
            outputs_per_frame=hop,
            context_frames=(context, context),
            tile_frames=_TILE_SECONDS * sample_rate // hop,
        )

    return in_tiles


def _digest(network: torch.nn.Module) -> str:
    """Computes the sha256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "dac": Codec("descript/dac_44khz", "transformers", _dac),
        "encodec": Codec("facebook/encodec_48khz", "transformers", _encodec),
        "sao": Codec("stabilityai/stable-audio-open-1.0", "diffusers", _stable_audio_open),
        "agc": Codec("Audiogen/agc-continuous", "audiogen-agc and transformers", _agc),
    }
)
