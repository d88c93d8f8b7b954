"""What may be given to a model, in whatever container, dtype and layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.dsp.resampling import resample, resample_briefly, resample_stream


@pytest.fixture(scope="module")
def vae(least_config: EarVAEConfig) -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(replace(least_config, transformer_depth=1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    return 0.1 * torch.randn(2, 4410, generator=torch.Generator().manual_seed(1))


def test_flipped_and_foreign_arrays_are_what_they_show(vae: EarVAE, audio: Tensor) -> None:
    expected = vae.encode(audio.flip(0)).mean
    flipped = audio.numpy()[::-1]
    assert torch.equal(vae.encode(flipped).mean, expected)
    assert torch.equal(vae.encode(flipped.astype(">f4")).mean, expected)
    assert torch.equal(vae.reconstruct(flipped), vae.reconstruct(audio.flip(0)))
    (streamed,) = vae.encode_stream([flipped])
    assert torch.equal(streamed.mean, expected)
    latents = expected.flip(-1)
    assert torch.equal(vae.decode(expected.numpy()[:, ::-1]), vae.decode(latents))


@pytest.mark.parametrize(
    "given",
    [None, "song.wav", [[1.0], [1.0, 2.0]], np.zeros((2, 9), np.longdouble), np.array([[None]])],
)
def test_what_is_no_array_of_numbers_is_refused(vae: EarVAE, given: Any) -> None:
    for call in (vae.encode, vae.reconstruct, lambda x: list(vae.encode_stream([x]))):
        with pytest.raises(EarVAEError, match="audio must be a tensor or an array of numbers, got"):
            call(given)
    with pytest.raises(EarVAEError, match="latents must be a tensor or an array of numbers, got"):
        vae.decode(given)


def test_tensors_without_readable_values_are_refused(vae: EarVAE, audio: Tensor) -> None:
    with pytest.raises(EarVAEError, match="must be dense"):
        vae.encode(audio.to_sparse())
    with pytest.raises(EarVAEError, match="meta"):
        vae.encode(audio.to("meta"))
    with torch.device("meta"):
        empty = EarVAE(vae.config)
    with pytest.raises(EarVAEError, match="meta"):
        empty.decode(torch.zeros(4, 3))
    with pytest.raises(EarVAEError, match="device 'meta' is not available"):
        EarVAE.from_pretrained("ear-vae-tiny", device="meta")


@pytest.mark.parametrize("count", [1.5, 3.0, "3", True])
def test_counts_are_integers(vae: EarVAE, count: Any) -> None:
    with pytest.raises(EarVAEError, match="num_samples is"):
        vae.decode(torch.zeros(4, 5), num_samples=count)
    with pytest.raises(EarVAEError, match="tile_frames must be an integer"):
        list(vae.encode_stream([torch.zeros(2, 50)], tile_frames=count))
    assert vae.decode(torch.zeros(4, 5), num_samples=np.int64(3)).shape == (2, 3)


def test_blocks_of_a_stream_differ_in_length_only(vae: EarVAE, audio: Tensor) -> None:
    for other in (audio[:1], audio[None]):
        with pytest.raises(EarVAEError, match="only their lengths may differ"):
            list(vae.encode_stream([audio, other]))
    latents = vae.encode(audio).mean
    with pytest.raises(EarVAEError, match="only their lengths may differ"):
        list(vae.decode_stream([latents[None], torch.stack((latents, latents))]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_are_resampled_in_float32(vae: EarVAE, audio: Tensor, dtype: torch.dtype) -> None:
    short = audio.to(dtype)
    # To a rate without a common factor, too, which takes another way.
    for rate in (48_000, 44_101):
        expected = resample(short.float(), 44_100, rate)
        assert torch.equal(resample(short, 44_100, rate), expected)
        assert torch.equal(torch.cat(list(resample_stream(short.split(999, 1), 44_100, rate)), 1), expected)
        assert torch.equal(
            resample_briefly(short, 44_100, rate), resample_briefly(short.float(), 44_100, rate)
        )
    assert torch.equal(vae.encode(short, 48_000).mean, vae.encode(short.float(), 48_000).mean)
    assert torch.equal(vae.reconstruct(short, 44_101), vae.reconstruct(short.float(), 44_101))


def test_integers_are_not_resampled(audio: Tensor) -> None:
    with pytest.raises(EarVAEError, match="must be floating point, got"):
        resample((audio * 9000).short(), 44_100, 48_000)


@pytest.mark.parametrize("part", ["encoder", "decoder", "transformer"])
def test_parts_in_different_dtypes_are_refused(vae: EarVAE, audio: Tensor, part: str) -> None:
    mixed = EarVAE(vae.config).requires_grad_(False)
    getattr(mixed, part).double()
    with pytest.raises(EarVAEError, match="move all to one dtype"):
        mixed.reconstruct(audio)
