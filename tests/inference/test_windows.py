"""Recordings of every length, side by side in windows, against the network over each as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.inference.windows import BatchEncoder
from ear_vae.posterior import Posterior

HOP = 16
WINDOW = 96


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=4, channel_multipliers=(1, 2), strides=(4, 4), latent_dim=8, transformer_depth=0
    )
    return EarVAE(config).eval().requires_grad_(False)


def recordings(lengths: list[int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {length: 0.1 * torch.randn(2, length, generator=generator) for length in lengths}


def encoded(encoder: BatchEncoder, audio: dict[int, Tensor], block: int = 700) -> dict[object, Posterior]:
    """All recordings, the blocks of three at a time mixed."""
    found: dict[object, Posterior] = {}
    waiting = iter(audio.items())
    open_ones: dict[int, Iterator[Tensor]] = {}
    while True:
        while len(open_ones) < 3 and (following := next(waiting, None)):
            open_ones[following[0]] = iter(following[1].split(block, dim=1))
        if not open_ones:
            break
        for key in list(open_ones):
            if (piece := next(open_ones[key], None)) is None:
                del open_ones[key]
                encoder.finish(key)
            else:
                encoder.push(key, piece)
        found.update(encoder.done())
    encoder.flush()
    found.update(encoder.done())
    return found


@pytest.mark.parametrize("rows", [1, 4])
def test_every_length_is_as_if_it_were_alone(vae: EarVAE, rows: int) -> None:
    """Around the lengths where a window more is needed, and where the last one is short."""
    frames = [
        1,
        2,
        15,
        16,
        17,
        31,
        47,
        48,
        63,
        WINDOW - 1,
        WINDOW,
        WINDOW + 1,
        2 * WINDOW - 9,
        3 * WINDOW,
        411,
    ]
    lengths = sorted({f * HOP + extra for f in frames for extra in (-3, 0, 1)} | {1, 5 * WINDOW * HOP + 7})
    audio = recordings(lengths)
    found = encoded(BatchEncoder(vae, vae.encode, rows=rows, window_frames=WINDOW), audio)
    assert found.keys() == audio.keys()
    for length, whole in audio.items():
        parameters = vae.encoder(torch.nn.functional.pad(whole, (0, -length % HOP))[None])
        expected = Posterior.from_parameters(parameters)
        torch.testing.assert_close(found[length].mean, expected.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[length].std, expected.std[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_neighbours_do_not_change_a_bit(vae: EarVAE, rows: int) -> None:
    audio = recordings([HOP * frames + 5 for frames in (40, 41, 55, 130, 300)])
    together = encoded(BatchEncoder(vae, vae.encode, rows=rows, window_frames=WINDOW), audio)
    for key, one in audio.items():
        encoder = BatchEncoder(vae, vae.encode, rows=rows, window_frames=WINDOW)
        alone = encoded(encoder, {key: one}, block=333)[key]
        assert torch.equal(alone.mean, together[key].mean)
        assert torch.equal(alone.std, together[key].std)


def test_batches_have_few_shapes_and_mono_is_duplicated(vae: EarVAE) -> None:
    shapes: list[tuple[int, ...]] = []

    def encode(batch: Tensor) -> Posterior:
        shapes.append(tuple(batch.shape))
        return vae.encode(batch)

    lengths = [HOP * frames - 1 for frames in range(70, 430, 7)]
    audio = {length: whole[:1] for length, whole in recordings(lengths).items()}
    found = encoded(BatchEncoder(vae, encode, rows=4, window_frames=WINDOW), audio)
    assert {shape[:2] for shape in shapes} == {(4, 2)}
    # Multiples of 16 frames up to the window, for 52 lengths of recordings.
    assert {shape[2] // HOP for shape in shapes} <= set(range(16, WINDOW + 1, 16))
    both = audio[lengths[-1]].expand(2, -1)
    torch.testing.assert_close(found[lengths[-1]].mean, vae.encode(both).mean, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_forgotten(vae: EarVAE) -> None:
    audio = recordings([HOP * 200, HOP * 150])
    encoder = BatchEncoder(vae, vae.encode, rows=2, window_frames=WINDOW)
    encoder.push("lost", audio[HOP * 200])
    encoder.drop("lost")
    encoder.push("kept", audio[HOP * 150])
    encoder.finish("kept")
    encoder.flush()
    ((key, posterior),) = encoder.done()
    assert key == "kept"
    torch.testing.assert_close(posterior.mean, vae.encode(audio[HOP * 150]).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_hour_is_never_held(vae: EarVAE) -> None:
    """After each block what waits is less than a window; the rest has been encoded."""
    frames = 0

    def encode(batch: Tensor) -> Posterior:
        nonlocal frames
        frames += batch.shape[-1] // HOP
        latents = torch.zeros(1, 8, batch.shape[-1] // HOP)
        return Posterior(latents, latents)

    encoder = BatchEncoder(vae, encode)
    block = torch.zeros(2, 20 * 44_100)
    for number in range(1, 181):
        encoder.push("hour", block)
        assert number * block.shape[1] / HOP - frames < 1024
    encoder.finish("hour")
    ((_, posterior),) = encoder.done()
    assert posterior.mean.shape[1] == 3600 * 44_100 / HOP
