"""The linear start: the network computes the transform, and the transform is a codec."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.dsp.si_sdr import scale_invariant_sdr_db
from ear_vae.training.filter_bank import analyse, choose_bands, initialize, mdct
from ear_vae.training.weight_norm import apply_weight_norm, load_plain_weights, plain_weights

SHAPES = pytest.mark.parametrize(
    "config",
    [
        EarVAEConfig(channels=16),
        EarVAEConfig(channels=16, channel_multipliers=(1, 2, 4, 12, 24)),
        EarVAEConfig(
            channels=16, sample_rate=48_000, strides=(2, 2, 4, 6, 10), channel_multipliers=(1, 2, 4, 8, 16)
        ),
    ],
    ids=["published widths", "wider below", "48 kHz"],
)


def bass(config: EarVAEConfig, frames: int = 60, batch: int = 4) -> torch.Tensor:
    """Stereo noise that fills the lowest 31 bins of mid and side, which 64 coefficients can hold."""
    cutoff_hz = 31 * config.latent_rate / 2
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft(torch.randn(batch, 2, frames * config.downsampling_ratio, generator=generator))
    spectrum[..., int(cutoff_hz / config.sample_rate * 2 * spectrum.shape[-1]) :] = 0
    audio = torch.fft.irfft(spectrum)
    return 0.2 * audio / audio.std()


def test_mdct_is_orthonormal_and_cancels_its_aliasing() -> None:
    hop = 64
    basis = mdct(hop, hop).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(hop, dtype=torch.float64), rtol=0, atol=1e-5)
    signal = torch.randn(1, 1, 10 * hop, dtype=torch.float64)
    coefficients = torch.nn.functional.conv1d(signal, basis[:, None], stride=hop)
    rebuilt = torch.nn.functional.conv_transpose1d(coefficients, basis[:, None], stride=hop)
    torch.testing.assert_close(rebuilt[..., hop:-hop], signal[..., hop:-hop], rtol=0, atol=1e-5)


@SHAPES
def test_the_network_computes_the_planned_coefficients(config: EarVAEConfig) -> None:
    torch.manual_seed(0)
    vae, audio = EarVAE(config).requires_grad_(False), bass(config)
    coefficients = analyse(config, audio)
    choice = choose_bands(config, coefficients)
    initialize(vae, choice)
    posterior = vae.eval().encode(audio)
    expected = coefficients[:, choice.indices] * choice.scales[:, None]
    error = (posterior.mean - expected)[..., 2:-2]
    # The Snakes bend a little: this is a start, not a transform library.
    assert error.norm() < 0.1 * expected[..., 2:-2].norm()
    assert posterior.mean.std() == pytest.approx(1.0, abs=0.1)
    assert posterior.std.mean() == pytest.approx(0.018, rel=0.05)


@SHAPES
def test_it_is_a_codec_before_any_training(config: EarVAEConfig) -> None:
    torch.manual_seed(0)
    vae, audio = EarVAE(config).requires_grad_(False), bass(config)
    initialize(vae, choose_bands(config, analyse(config, audio)))
    rebuilt = vae.eval().reconstruct(audio)
    inner = slice(2 * config.downsampling_ratio, -2 * config.downsampling_ratio)
    assert scale_invariant_sdr_db(rebuilt[..., inner], audio[..., inner]).min() > 12
    random = EarVAE(config).eval().requires_grad_(False)
    assert scale_invariant_sdr_db(random.reconstruct(audio)[..., inner], audio[..., inner]).max() < 0


def test_the_transformer_starts_as_no_transformer() -> None:
    """With and without one, the same weights rebuild the same audio."""
    torch.manual_seed(0)
    config = EarVAEConfig(channels=16)
    bare_config = dataclasses.replace(config, transformer_depth=0)
    vae, bare = (EarVAE(c).eval().requires_grad_(False) for c in (config, bare_config))
    audio = bass(config, frames=20, batch=2)
    initialize(vae, choose_bands(config, analyse(config, audio)))
    assert bare.transformer is None
    bare.load_state_dict({k: v for k, v in vae.state_dict().items() if not k.startswith("transformer.")})
    torch.testing.assert_close(bare.reconstruct(audio), vae.reconstruct(audio), rtol=0, atol=1e-6)
    initialize(bare, choose_bands(bare_config, analyse(bare_config, audio)))
    assert scale_invariant_sdr_db(bare.reconstruct(audio), audio).min() > 6


def test_the_plan_follows_the_music() -> None:
    """Mono music gives every coefficient to the mid, hard-panned music shares them evenly."""
    config = EarVAEConfig(channels=16)
    left = bass(config)[:, :1]
    num_bins = analyse(config, left.expand(-1, 2, -1)).shape[1] // 2
    mono = choose_bands(config, analyse(config, left.expand(-1, 2, -1) + 1e-6 * bass(config)))
    assert (mono.indices[:20] < 20).all()
    panned = choose_bands(config, analyse(config, torch.cat((left, torch.zeros_like(left)), 1)))
    assert int((panned.indices < num_bins).sum()) == pytest.approx(32, abs=2)
    assert len(set(mono.indices.tolist())) == 64


def test_what_cannot_be_a_filter_bank_is_refused() -> None:
    with pytest.raises(EarVAEError, match="at least"):
        analyse(EarVAEConfig(channels=4), torch.zeros(1, 2, 8192))
    with pytest.raises(EarVAEError, match="first stride of 2"):
        analyse(EarVAEConfig(channels=16, strides=(4, 4, 4, 4, 8)), torch.zeros(1, 2, 8192))
    config = EarVAEConfig(channels=16)
    with pytest.raises(EarVAEError, match="silence"):
        choose_bands(config, analyse(config, torch.zeros(1, 2, 8192)))


def test_weight_norm_changes_nothing_and_folds_away() -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval()
    torch.nn.init.zeros_(vae.encoder.blocks[0].residual_units[0].conv_pointwise.weight)
    names, audio = set(vae.state_dict()), torch.randn(2, 4096)
    before = vae.encode(audio).mean.detach()
    apply_weight_norm(vae)
    torch.testing.assert_close(vae.encode(audio).mean.detach(), before, rtol=1e-4, atol=1e-5)
    vectors = [p for name, p in vae.named_parameters() if name.endswith("original1")]
    assert len(vectors) == 2 * (1 + 5 * 7 + 1)
    for vector in vectors:
        norms = torch.linalg.vector_norm(vector, dim=(1, 2))
        torch.testing.assert_close(norms, torch.ones_like(norms))
    vae.encode(audio).mean.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())
    plain = EarVAE(EarVAEConfig(channels=4)).eval()
    assert set(plain.state_dict()) == names
    plain.load_state_dict(plain_weights(vae, names))
    torch.testing.assert_close(plain.encode(audio).mean.detach(), before, rtol=1e-4, atol=1e-5)
    other = EarVAE(EarVAEConfig(channels=4)).eval()
    apply_weight_norm(other)
    load_plain_weights(other, plain.state_dict())
    torch.testing.assert_close(other.encode(audio).mean.detach(), before, rtol=1e-4, atol=1e-5)


def test_si_sdr_in_closed_form() -> None:
    """Noise at a tenth of the amplitude is 20 dB below, whatever the gain and the offset."""
    time = torch.arange(44_100, dtype=torch.float64)
    target = torch.sin(2 * torch.pi * 441 / 44_100 * time).expand(2, -1)
    error = 0.1 * torch.cos(2 * torch.pi * 441 / 44_100 * time)
    assert float(scale_invariant_sdr_db(3 * (target + error) + 0.5, target)) == pytest.approx(20.0, abs=1e-6)
    assert float(scale_invariant_sdr_db(target, target + error)) == pytest.approx(20.0, abs=0.1)
