"""Small models, signals and folders that several test modules use."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.dsp._torchaudio import functional
from ear_vae.network.discriminator import DiscriminatorConfig

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter, which it wants to know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, or the unpacked source distribution."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def piece(repository: Path) -> Path:
    """Twenty seconds of music, stereo at 44.1 kHz."""
    return repository / "examples" / "piece.ogg"


def beside(repository: Path, name: str, what: str) -> Path:
    """A folder of what may be used here and not be published."""
    folder = repository.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs {what} in ../shared")
    return folder


@pytest.fixture(scope="session")
def parity(repository: Path) -> Path:
    """Weights in the official layout, and what the official code makes of them."""
    return beside(repository, "parity", "the parity fixtures")


@pytest.fixture(scope="session")
def training_music(repository: Path) -> Path:
    return beside(repository, "music/train", "the licensed music")


@pytest.fixture(scope="session")
def tiny_config() -> EarVAEConfig:
    """The smallest network with the published hop of 1024."""
    return EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))


@pytest.fixture(scope="session")
def least_config() -> EarVAEConfig:
    """A network of a few hundred numbers, hop 8, without a transformer."""
    return EarVAEConfig(
        channels=2,
        channel_multipliers=(1, 2),
        strides=(2, 4),
        latent_dim=4,
        transformer_depth=0,
        transformer_head_dim=2,
    )


@pytest.fixture(scope="session")
def tiny_discriminator() -> DiscriminatorConfig:
    return DiscriminatorConfig(window_sizes=(512, 128), channels=4)


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """`noise(*shape, seed=0, level=0.1)`: Gaussian, with that standard deviation."""

    def make(*shape: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
        return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, hop 1024 at 44.1 kHz."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oobleck() -> Any:
    """diffusers' own Oobleck, hop 64, every tensor random, so that no two Snakes are alike."""
    functional()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        decoder_channels=8,
        decoder_input_channels=4,
        channel_multiples=[1, 2, 2],
        downsampling_ratios=[2, 4, 8],
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def write_latents() -> Callable[..., Path]:
    """`write_latents(folder, format, items, ...)`: a data set, from its description alone."""

    def write(
        folder: Path,
        format: str,
        items: list[dict[str, Any]],
        *,
        rate: int = 44_100,
        ratio: int = 1024,
        weights_sha256: str = "0" * 64,
        per_shard: int = 2,
    ) -> Path:
        """Each item has `mean` and `std` [D, N], and may have `frames` that are valid, `start` in samples,
        `seconds` of its source, and `columns` of the user."""
        folder.mkdir(parents=True)
        members: list[tuple[str, bytes]] = []
        for number, item in enumerate(items):
            mean, std, key = item["mean"], item["std"], f"{number:04}"
            frames, start = item.get("frames", mean.shape[1]), item.get("start", 0)
            seconds = item.get("seconds", (start + frames * ratio) / rate)
            values = {
                **item.get("columns", {}),
                "path": f"/music/{key}.wav",
                "relpath": f"{key}.wav",
                "timestamps": [start / rate, (start + frames * ratio) / rate],
                "seconds_start": start // rate,
                "seconds_total": math.ceil(seconds),
                "sample_rate": rate,
                "padding_mask": [1] * frames + [0] * (mean.shape[1] - frames),
                "ear_vae": {
                    "key": key,
                    "weights_sha256": weights_sha256,
                    "latent_dim": mean.shape[0],
                    "downsampling_ratio": ratio,
                    "num_samples": frames * ratio,
                    "num_frames": frames,
                    "start_sample": start,
                    "source_sample_rate": 48_000,
                    "source_num_samples": round(seconds * 48_000),
                    "source_sha256": "1" * 64,
                    "dtype": str(mean.dtype),
                    "columns": item.get("renamed", {}),
                },
            }
            arrays = {}
            for name, array in (("npy", mean), ("std.npy", std)):
                stream = io.BytesIO()
                np.save(stream, array)
                arrays[name] = stream.getvalue()
            if format == "safetensors":
                (folder / "album").mkdir(exist_ok=True)
                tensors = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
                metadata = {"ear_vae": json.dumps({"format": "ear-vae-latents", "metadata": values})}
                save_file(tensors, folder / "album" / f"{key}.safetensors", metadata)
            else:
                members += [(f"{key}.json", json.dumps(values).encode())]
                members += [(f"{key}.{name}", content) for name, content in arrays.items()]
        if format == "stable-audio":
            (folder / "album").mkdir()
            for name, content in members:
                (folder / "album" / name).write_bytes(content)
            listed = [f"album/{number:04}.npy\n" for number in range(len(items))]
            (folder / "filelist.txt").write_text("".join(listed))
        for shard, first in enumerate(range(0, len(members), 3 * per_shard)):
            if format == "webdataset":
                with tarfile.open(folder / f"{shard:06}.tar", "w") as tar:
                    for name, content in members[first : first + 3 * per_shard]:
                        header = tarfile.TarInfo(name)
                        header.size = len(content)
                        tar.addfile(header, io.BytesIO(content))
        return folder

    return write


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs goes where nobody else reads it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
