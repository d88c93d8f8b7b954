"""Audio and latents that come in pieces give what the whole gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.dsp.resampling import resample, resample_stream

HOP_1024 = EarVAEConfig(channels=4)
WITHOUT_TRANSFORMER = EarVAEConfig(
    channels=4, sample_rate=48_000, strides=(2, 2, 4, 6, 10), transformer_depth=0
)
BOTH = pytest.mark.parametrize("config", [HOP_1024, WITHOUT_TRANSFORMER], ids=["hop1024", "hop960"])


def random_model(config: EarVAEConfig) -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(config).eval().requires_grad_(False)


def pieces(whole: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The whole in pieces of these sizes, over and over."""
    start = 0
    while start < whole.shape[-1]:
        for size in sizes:
            yield whole[..., start : start + size]
            start += size


@pytest.mark.parametrize("sizes", [[1_000_000], [1024], [700, 1, 0, 5000]], ids=["one", "frames", "uneven"])
@pytest.mark.parametrize("tile_frames", [1, 7, None])
@pytest.mark.parametrize("num_samples", [1, 960 * 8, 25_000])
@BOTH
def test_encode(config: EarVAEConfig, num_samples: int, tile_frames: int | None, sizes: list[int]) -> None:
    vae = random_model(config)
    audio = torch.randn(2, num_samples) * 0.3
    whole = vae.encode(audio)
    found = list(vae.encode_stream(pieces(audio, sizes), tile_frames=tile_frames))
    assert all(part.mean.shape[-1] == tile_frames for part in found[:-1])
    torch.testing.assert_close(
        torch.cat([part.mean for part in found], dim=-1), whole.mean, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.cat([part.std for part in found], dim=-1), whole.std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[1000], [1], [3, 0, 4]], ids=["one", "frames", "uneven"])
@pytest.mark.parametrize("tile_frames", [1, 7, None])
@pytest.mark.parametrize("num_frames", [1, 40])
@BOTH
def test_decode(config: EarVAEConfig, num_frames: int, tile_frames: int | None, sizes: list[int]) -> None:
    vae = random_model(config)
    latents = torch.randn(2, 64, num_frames)
    whole = vae.decode(latents)
    found = torch.cat(list(vae.decode_stream(pieces(latents, sizes), tile_frames=tile_frames)), dim=-1)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_mono_at_another_rate() -> None:
    vae = random_model(HOP_1024)
    audio = torch.randn(1, 70 * 22_050) * 0.3
    whole = vae.encode(audio, sample_rate=22_050).mean
    found = vae.encode_stream(pieces(audio, [100_000]), sample_rate=22_050)
    torch.testing.assert_close(torch.cat([part.mean for part in found], dim=-1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("old", "new"), [(48_000, 44_100), (8_000, 44_100), (44_100, 8_000), (9_973, 44_100)]
)
@pytest.mark.parametrize("seconds", [0.01, 20, 41, 63.7])
def test_resampling(old: int, new: int, seconds: float) -> None:
    audio = torch.randn(2, int(seconds * old))
    whole = resample(audio, old, new)
    found = torch.cat(list(resample_stream(pieces(audio, [old, 17]), old, new)), dim=-1)
    assert torch.equal(found, whole)


def test_what_comes_out_is_early() -> None:
    """A frame is there once its audio and 8293 samples more are, or 11 frames of latents more."""
    vae = random_model(HOP_1024)
    taken = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal taken
        for block in pieces(torch.randn(2, 40 * 1024), [128]):
            taken += block.shape[-1]
            yield block

    for frame, _ in enumerate(vae.encode_stream(blocks(), tile_frames=1)):
        assert taken <= min(40 * 1024, (frame + 1 + 9) * 1024)
    vae, taken = random_model(WITHOUT_TRANSFORMER), 0

    def latents() -> Iterator[Tensor]:
        nonlocal taken
        for block in pieces(torch.randn(64, 40), [1]):
            taken += 1
            yield block

    for frame, _ in enumerate(vae.decode_stream(latents(), tile_frames=1)):
        assert taken <= min(40, frame + 1 + 11)


def test_gradients_are_neither_kept_nor_switched_off_for_others() -> None:
    vae = random_model(HOP_1024).requires_grad_(True)
    for posterior in vae.encode_stream([torch.randn(2, 5000)], tile_frames=2):
        assert torch.is_grad_enabled()
        assert not posterior.mean.requires_grad


def test_nothing_and_wrong_pieces() -> None:
    vae = random_model(HOP_1024)
    assert list(vae.encode_stream([])) == list(vae.decode_stream([])) == []
    assert list(vae.encode_stream([torch.zeros(2, 0)])) == []
    with pytest.raises(EarVAEError, match="tile_frames must be an integer of 1 or more, got 0"):
        next(vae.encode_stream([torch.zeros(2, 10)], tile_frames=0))
    with pytest.raises(EarVAEError, match="3 channels"):
        next(vae.encode_stream([torch.zeros(3, 10)]))
    with pytest.raises(EarVAEError, match="expected \\[64, N\\]"):
        next(vae.decode_stream([torch.zeros(3, 10)]))
