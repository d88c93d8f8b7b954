"""The discriminator and what it is trained with, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ear_vae import EarVAEError
from ear_vae.losses.adversarial import adversarial, discriminator_loss, feature_matching
from ear_vae.network.discriminator import Discriminator, DiscriminatorConfig, DiscriminatorOutput

SMALL = DiscriminatorConfig(window_sizes=(512, 128), channels=4)


def output(logit: float, *features: float) -> DiscriminatorOutput:
    return DiscriminatorOutput(
        torch.full((2, 1, 3, 5), logit), tuple(torch.full((2, 4, 3, 5), f) for f in features)
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_resolution_judges_every_frame_and_bin() -> None:
    outputs = Discriminator(SMALL)(noise(3, 2, 4096))
    for (scores, features), size in zip(outputs, SMALL.window_sizes, strict=True):
        frames, bins = 1 + 4096 // (size // 4), size // 2 + 1
        assert scores.shape == (3, 1, frames, bins)
        assert [tuple(f.shape) for f in features] == [(3, 4, frames, bins)] * 5


def test_a_stride_thins_out_the_bins_once_per_dilated_layer() -> None:
    config = DiscriminatorConfig(window_sizes=(512,), channels=4, frequency_stride=2)
    (judged,) = Discriminator(config)(noise(1, 2, 4096))
    assert [f.shape[-1] for f in judged.features] == [257, 129, 65, 33, 33]


def test_it_hears_the_spectra_of_both_channels() -> None:
    """A first layer that adds Re L and twice Im R gives what torch.stft says of them."""
    network = Discriminator(DiscriminatorConfig(window_sizes=(512,), channels=1))
    kernel = torch.zeros(1, 4, 3, 9)
    kernel[0, 0, 1, 4], kernel[0, 3, 1, 4] = 1, 2
    first = network.resolutions[0].layers[0]
    first.weight = kernel
    torch.nn.init.zeros_(first.bias)
    audio = noise(1, 2, 4096)
    (judged,) = network(audio)
    window = torch.hann_window(512)
    spectra = torch.stft(
        audio[0], 512, 128, window=window / window.square().sum().sqrt(), return_complex=True
    )
    expected = torch.nn.functional.leaky_relu(spectra[0].real + 2 * spectra[1].imag, 0.2)
    torch.testing.assert_close(judged.features[0][0, 0], expected.T, rtol=1e-4, atol=1e-5)


def test_dilation_reaches_in_time_and_the_kernel_in_frequency() -> None:
    """By gradient: (1 + 1 + 2 + 4 + 1 + 1) frames to each side, and 4 · 4 + 1 + 1 bins."""
    resolution = Discriminator(DiscriminatorConfig(window_sizes=(512,), channels=3)).resolutions[0]
    spectrum = torch.randn(1, 2, 257, 60, dtype=torch.complex64).requires_grad_()
    resolution(spectrum).scores[0, 0, 30, 128].abs().backward()
    heard = spectrum.grad.abs().sum((0, 1)) > 0
    bins, frames = heard.any(dim=1).nonzero(), heard.any(dim=0).nonzero()
    assert (int(frames.min()), int(frames.max())) == (20, 40)
    assert (int(bins.min()), int(bins.max())) == (110, 146)


def test_the_layout_in_memory_changes_nothing() -> None:
    """Outputs and gradients are those of the layers applied one after the other to plain tensors."""
    network = Discriminator(SMALL)
    audio = noise(2, 2, 4096)
    for resolution, judged, spectrum in zip(
        network.resolutions, network(audio), network.stft(audio), strict=True
    ):
        x = torch.cat((spectrum.real, spectrum.imag), dim=1).mT.contiguous()
        expected = []
        for layer in resolution.layers:
            convolved = torch.nn.functional.conv2d(
                x.contiguous(),
                layer.weight.contiguous(),
                layer.bias,
                padding=layer.padding,
                dilation=layer.dilation,
            )
            x = torch.where(convolved > 0, convolved, 0.2 * convolved)
            expected.append(x)
        for found, feature in zip(judged.features, expected, strict=True):
            torch.testing.assert_close(found, feature, rtol=1e-4, atol=1e-6)
        parameters = list(resolution.layers.parameters())
        gradients = [
            torch.autograd.grad(features.square().sum(), parameters)
            for features in (judged.features[-1], expected[-1])
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_wrong_audio_and_configs_are_refused() -> None:
    with pytest.raises(EarVAEError, match=r"needs audio \[B, 2, T\], got \[1, 1, 4096\]"):
        Discriminator(SMALL)(noise(1, 1, 4096))
    with pytest.raises(EarVAEError, match="too few for windows of 512"):
        Discriminator(SMALL)(noise(1, 2, 200))
    for settings in ({"window_sizes": ()}, {"channels": 0}, {"dilations": (0,)}, {"negative_slope": 1.0}):
        with pytest.raises(EarVAEError, match="discriminator: "):
            DiscriminatorConfig(**settings)  # type: ignore[arg-type]


def test_losses_in_closed_form() -> None:
    estimate = [output(0.2, 1.0, 2.0), output(0.6, 0.0, -1.0)]
    target = [output(0.9, 1.5, 2.0), output(1.0, 0.0, 1.0)]
    loss = (0.2**2 + 0.1**2 + 0.6**2 + 0) / 2
    assert float(discriminator_loss(estimate, target)) == pytest.approx(loss)
    swapped = (0.9**2 + 0.8**2 + 1**2 + 0.4**2) / 2
    assert float(discriminator_loss(target, estimate)) == pytest.approx(swapped)
    assert float(adversarial(estimate)) == pytest.approx((0.8**2 + 0.4**2) / 2)
    assert float(feature_matching(estimate, target)) == pytest.approx((0.5 + 0 + 0 + 2) / 4)


def test_feature_matching_makes_no_wide_copies_of_narrow_features() -> None:
    """Counted by dtype and size; the result is that of float64 within what the differences are rounded by."""
    a, b = (torch.randn(2, 4, 300, 5).to(torch.bfloat16) for _ in range(2))
    a.requires_grad_()
    wide = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype is torch.float32 and result.numel() > 1:
                wide.append(func)
            return result

    with Listening():
        loss = feature_matching([DiscriminatorOutput(a, (a,))], [DiscriminatorOutput(b, (b,))])
    assert wide == []
    assert loss.dtype is torch.float32
    assert float(loss.detach()) == pytest.approx(float((a - b.double()).detach().abs().mean()), rel=1e-3)
    loss.backward()
    torch.testing.assert_close(a.grad.float(), (a - b).sign().float() / a.numel(), rtol=1e-2, atol=0)


def test_feature_matching_moves_the_estimate_only() -> None:
    estimate, target = (
        [DiscriminatorOutput(f, (f,))] for f in (torch.zeros(2).requires_grad_() for _ in range(2))
    )
    estimate[0].features[0].data += 1
    feature_matching(estimate, target).backward()
    assert target[0].features[0].grad is None
    assert estimate[0].features[0].grad.tolist() == [0.5, 0.5]


def test_it_learns_to_tell_noise_from_tones() -> None:
    torch.manual_seed(0)
    network = Discriminator(SMALL)
    tone = 0.1 * torch.sin(torch.arange(4096) * 0.1).expand(2, 2, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = discriminator_loss(network(noise(2, 2, 4096)), network(tone))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        unheard = network(noise(2, 2, 4096, seed=1))
        assert float(discriminator_loss(unheard, network(tone))) < 0.15
        assert float(discriminator_loss(network(tone), unheard)) > 1


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("channels", [8, 16, 64])
def test_layers_under_bfloat16_autocast_are_those_of_float32(channels: int, stride: int) -> None:
    # On processors with AMX, oneDNN gets narrow strided convolutions over time wrong; not these.
    config = DiscriminatorConfig((256,), channels=channels, frequency_stride=stride)
    torch.manual_seed(0)
    for layer in Discriminator(config).resolutions[0].layers:
        inputs = layer.weight.shape[1]
        x = torch.randn(2, inputs, 12, 65).contiguous(memory_format=torch.channels_last).requires_grad_(True)
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x)
            gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
            parameters = (x, *layer.parameters())
            found.append((y, *torch.autograd.grad(y, parameters, gradient)))
        for expected, half in zip(*found, strict=True):
            assert (half.float() - expected).norm() < 0.02 * expected.norm()
