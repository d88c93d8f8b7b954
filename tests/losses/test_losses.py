"""Loss terms against closed forms and signal truths."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ear_vae import EarVAEError, Posterior
from ear_vae.audio import read_audio
from ear_vae.dsp.spectral import MultiResolutionSTFT, mel_filters
from ear_vae.dsp.stereo import mid_side_left_right
from ear_vae.dsp.weighting import a_weight, k_weight
from ear_vae.losses import ReconstructionObjective, phase, spectral
from ear_vae.losses.objective import (
    ADVERSARIAL_TERMS,
    DEFAULT_LOSS_WEIGHTS,
    DEFAULT_WINDOW_SIZES,
    MagnitudeChannels,
    Weighting,
)

RATE = 44_100
RECONSTRUCTION_TERMS = [name for name in DEFAULT_LOSS_WEIGHTS if name not in ("kl", *ADVERSARIAL_TERMS)]


@pytest.fixture
def objective() -> ReconstructionObjective:
    return ReconstructionObjective(RATE, weights={"waveform": 1.0, "band_level": 1.0})


def standard_normal(batch: int) -> Posterior:
    return Posterior(torch.zeros(batch, 64, 8), torch.ones(batch, 64, 8))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(audio: Tensor, size: int = 512) -> Tensor:
    return MultiResolutionSTFT([size])(audio)[0]


def test_stft_of_white_noise_has_its_level_at_every_size() -> None:
    for stft in MultiResolutionSTFT([128, 1024, 4096])(noise(4, 100_000)):
        assert float(stft.abs().square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_mid_and_side() -> None:
    left, right = noise(50), noise(50, seed=1)
    mid, side, same_left, same_right = mid_side_left_right(torch.stack((left, right)))
    torch.testing.assert_close(mid + side, left)
    torch.testing.assert_close(mid - side, right)
    assert torch.equal(same_left, left)
    assert torch.equal(same_right, right)
    assert not mid_side_left_right(torch.stack((left, left)))[1].any()
    with pytest.raises(EarVAEError, match="2 channels"):
        mid_side_left_right(torch.zeros(1, 50))


@pytest.mark.parametrize("gain", [0.25, 0.5, 2.0])
def test_gain_in_closed_form(gain: float, objective: ReconstructionObjective) -> None:
    target = noise(2, 2, 16_384)
    terms = objective.terms(gain * target, target, standard_normal(2))
    assert float(terms["spectral_convergence"]) == pytest.approx(abs(gain - 1), rel=1e-4)
    assert float(terms["waveform"]) == pytest.approx(abs(gain - 1), rel=1e-4)
    for name in ("log_magnitude", "band_level"):
        assert float(terms[name]) == pytest.approx(abs(math.log(gain)), rel=1e-3)
    for name in ("correlation", "instantaneous_frequency", "group_delay"):
        assert float(terms[name]) == pytest.approx(0, abs=2e-3)


def test_identical_signals_give_zero(objective: ReconstructionObjective) -> None:
    audio = noise(2, 2, 16_384)
    terms = objective.terms(audio, audio.clone(), standard_normal(2))
    assert set(terms) == set(DEFAULT_LOSS_WEIGHTS) - set(ADVERSARIAL_TERMS)
    for name, value in terms.items():
        assert float(value) == pytest.approx(0, abs=1e-3), name


def test_polarity_flip(objective: ReconstructionObjective) -> None:
    """Magnitudes and phase derivatives do not see it, the correlation is at its worst."""
    target = noise(1, 2, 16_384)
    terms = objective.terms(-target, target, standard_normal(1))
    expected = {"spectral_convergence": 0, "log_magnitude": 0, "correlation": 2, "waveform": 2}
    expected |= {"instantaneous_frequency": 0, "group_delay": 0, "band_level": 0}
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, abs=2e-3), name


def test_the_level_that_suits_noise_best() -> None:
    """Of a flat spectrum against white noise: by bin the median magnitude √ln 2, by band the RMS of 1."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 2, 513, 400, dtype=torch.complex128, generator=generator)
    bands = mel_filters(1024, RATE, 8).double()
    bands = bands / bands.sum(dim=0)
    levels = torch.linspace(0.7, 1.2, 101, dtype=torch.float64)
    by_bin = [spectral.log_magnitude(level * torch.ones_like(target), target) for level in levels]
    by_band = [spectral.band_level(level * torch.ones_like(target), target, bands) for level in levels]
    assert float(levels[torch.stack(by_bin).argmin()]) == pytest.approx(math.sqrt(math.log(2)), abs=0.015)
    assert float(levels[torch.stack(by_band).argmin()]) == pytest.approx(1, abs=0.03)


def test_mel_filters_cover_the_spectrum_once() -> None:
    """Their peaks rise, each overlaps its neighbours only, and every bin between the outer ones is heard."""
    bands = mel_filters(2048, RATE, 64)
    assert bands.shape == (1025, 64)
    peaks = bands.argmax(dim=0)
    assert (peaks.diff() > 0).all()
    heard = (bands > 0).sum(dim=1)[int(peaks[0]) : int(peaks[-1])]
    assert set(heard.tolist()) <= {1, 2}


@pytest.mark.parametrize("delay", [0, 1, 100, 255, 257, 300])
def test_a_delay_turns_the_group_delay_by_its_angle(delay: int) -> None:
    """An impulse d samples later turns 2π d / size more per bin; steps beyond π wrap around."""
    size = 512
    audio = torch.zeros(2, size, dtype=torch.float64)
    audio[0, 100] = audio[1, 100 + delay] = 1
    early, late = torch.fft.rfft(audio)[:, :, None]
    wrapped = abs(math.remainder(2 * math.pi * delay / size, 2 * math.pi))
    assert float(phase.group_delay(late, early)) == pytest.approx(wrapped, abs=1e-6)


def test_a_frequency_shift_turns_the_instantaneous_frequency_by_its_angle() -> None:
    """Frames are size/4 apart: a tone of f0 + Δ against f0 differs by 2π Δ hop / rate."""
    size, time = 1024, torch.arange(RATE, dtype=torch.float64) / RATE
    tone = [torch.sin(2 * math.pi * hz * time)[None] for hz in (1000.0, 1004.0)]
    x, y = (spectrum(t, size)[:, 20:27, 8:-8] for t in tone)
    expected = 2 * math.pi * 4 * (size // 4) / RATE
    assert float(phase.instantaneous_frequency(x, y)) == pytest.approx(expected, rel=0.02)


def test_phase_steps_are_wrapped() -> None:
    """Steps of 3 and -3 radians are 2π − 6 apart, not 6."""
    frames = torch.arange(6, dtype=torch.float64)
    x, y = (
        torch.polar(torch.ones(1, 1, 6).double(), 3 * frames),
        torch.polar(torch.ones(1, 1, 6).double(), -3 * frames),
    )
    assert float(phase.instantaneous_frequency(x, y)) == pytest.approx(2 * math.pi - 6)
    turned = [z.transpose(-1, -2) for z in (x, y)]
    assert float(phase.group_delay(*turned)) == pytest.approx(2 * math.pi - 6)


def test_independent_phases_are_half_a_turn_off_the_worst() -> None:
    """Uniform random differences: mean |angle| π/2, mean cosine 0."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.polar(torch.ones(200, 200), 6.2832 * torch.rand(200, 200, generator=generator))
        for _ in range(2)
    )
    assert float(phase.instantaneous_frequency(x, y)) == pytest.approx(math.pi / 2, abs=0.02)
    assert float(phase.group_delay(x, y)) == pytest.approx(math.pi / 2, abs=0.02)
    assert float(phase.correlation(x, y)) == pytest.approx(1, abs=0.02)


MUSIC = [
    Path(__file__).parents[2] / "examples" / "piece.ogg",
    *sorted((Path(__file__).parents[3] / "shared" / "music" / "eval").rglob("*.ogg")),
]


@pytest.mark.parametrize("size", DEFAULT_WINDOW_SIZES)
@pytest.mark.parametrize("path", MUSIC, ids=lambda path: path.stem[:20])
def test_music_correlates_with_itself_at_any_level(path: Path, size: int) -> None:
    """Fades and the quiet top octave included: an ε in the denominator makes 0.1 to 0.5 of them."""
    audio, rate = read_audio(path, num_samples=8 * RATE)
    audio = k_weight(audio.expand(2, -1)[None], rate)
    x = spectrum(audio, size)
    for gain in (1.0, 2.0):
        assert float(phase.correlation(gain * x, x)) == pytest.approx(0, abs=1e-4)


def test_correlation_counts_the_bins_in_which_the_target_is_audible() -> None:
    """Elsewhere the estimate may do what it likes; silence where the target sounds is as bad as noise."""
    y = spectrum(noise(2, 2, 8192))
    y[:, :, 100:] *= 1e-6
    estimate = y.clone()
    estimate[:, :, 100:] = spectrum(noise(2, 2, 8192, seed=1))[:, :, 100:]
    assert float(phase.correlation(estimate, y)) == pytest.approx(0, abs=1e-4)
    estimate[:, :, :50] = 0
    assert float(phase.correlation(estimate, y)) == pytest.approx(0.5, abs=1e-4)
    assert float(phase.correlation(estimate, torch.zeros_like(y))) == 0


def test_silent_bins_carry_no_phase() -> None:
    x, y = spectrum(noise(1, 8192)), spectrum(noise(1, 8192, seed=1))
    quiet = y.clone()
    quiet[:, 100:] = 0
    assert phase.instantaneous_frequency(x, quiet) == phase.instantaneous_frequency(x[:, :100], y[:, :100])


def test_terms_are_not_symmetric_and_take_the_estimate_first() -> None:
    """Half the level is 0.5 away from the target, the double is 1: the target is the unit."""
    target = spectrum(noise(1, 2, 8192))
    assert float(spectral.spectral_convergence(0.5 * target, target)) == pytest.approx(0.5, rel=1e-5)
    assert float(spectral.spectral_convergence(target, 0.5 * target)) == pytest.approx(1.0, rel=1e-5)
    audio = noise(1, 2, 100)
    assert float(spectral.waveform(0.5 * audio, audio)) == pytest.approx(0.5, rel=1e-5)
    assert float(spectral.waveform(audio, 0.5 * audio)) == pytest.approx(1.0, rel=1e-5)


def test_objective_passes_estimate_and_target_in_order(objective: ReconstructionObjective) -> None:
    quiet, loud = 0.5 * noise(1, 2, 8192), noise(1, 2, 8192)
    posterior = standard_normal(1)
    assert float(objective.terms(quiet, loud, posterior)["spectral_convergence"]) == pytest.approx(
        0.5, rel=1e-3
    )
    assert float(objective.terms(loud, quiet, posterior)["spectral_convergence"]) == pytest.approx(
        1.0, rel=1e-3
    )


def test_magnitudes_see_mid_and_side_phase_sees_left_and_right_only() -> None:
    """A mono target against a stereo estimate that has the same left and right magnitudes."""
    left = noise(1, 1, 16_384)
    target, estimate = torch.cat((left, left), 1), torch.cat((left, -left), 1)
    terms = ReconstructionObjective(RATE).terms(estimate, target, standard_normal(1))
    # Mid and side change places: of the pooled energy M² + L² + R² = 3 units, M and S are wrong by 2.
    assert float(terms["spectral_convergence"]) == pytest.approx(math.sqrt(2 / 3), rel=1e-3)
    assert float(terms["correlation"]) == pytest.approx(1, abs=1e-3)
    assert float(terms["group_delay"]) == pytest.approx(0, abs=1e-3)


def by_formula(estimate: Tensor, target: Tensor, channels: MagnitudeChannels) -> dict[str, Tensor]:
    """Each term as its docstring writes it, in complex numbers, with nothing shared."""
    values: dict[str, list[Tensor]] = {name: [] for name in RECONSTRUCTION_TERMS if name != "waveform"}
    stft = MultiResolutionSTFT(DEFAULT_WINDOW_SIZES)
    for size, left_right_x, left_right_y in zip(
        DEFAULT_WINDOW_SIZES, stft(estimate), stft(target), strict=True
    ):
        x, y = left_right_x, left_right_y
        cosine = (x * y.conj()).real / (x.abs().clamp(min=3e-5) * y.abs())
        items = [1 - cosine[i][y[i].abs() > 3e-5].mean() for i in range(len(x))]
        values["correlation"].append(torch.stack(items).mean())
        for name, dim in (("instantaneous_frequency", -1), ("group_delay", -2)):
            (x0, x1), (y0, y1) = (
                (z.narrow(dim, 0, z.shape[dim] - 1), z.narrow(dim, 1, z.shape[dim] - 1)) for z in (x, y)
            )
            difference = ((x1 * x0.conj()).angle() - (y1 * y0.conj()).angle() + math.pi) % (2 * math.pi)
            heard = torch.minimum((x1 * x0).abs(), (y1 * y0).abs()) > 9e-10
            items = [(difference[i] - math.pi)[heard[i]].abs().mean() for i in range(len(x))]
            values[name].append(torch.stack(items).mean())
        if channels == "mslr":
            x, y = mid_side_left_right(x, dim=1), mid_side_left_right(y, dim=1)
        convergence = [(a.abs() - b.abs()).norm() / b.abs().norm() for a, b in zip(x, y, strict=True)]
        values["spectral_convergence"].append(torch.stack(convergence).mean())
        logarithms = (x.abs().clamp(min=3e-5).log(), y.abs().clamp(min=3e-5).log())
        values["log_magnitude"].append((logarithms[0] - logarithms[1]).abs().mean())
        bands = mel_filters(size, RATE, max(1, (size // 2 + 1) // 16)).double()
        levels = [((bands / bands.sum(dim=0)).T @ z.abs().square()).log() / 2 for z in (x, y)]
        values["band_level"].append((levels[0] - levels[1]).abs().mean())
    terms = {name: torch.stack(each).mean() for name, each in values.items()}
    errors = [(a - b).norm() / b.norm() for a, b in zip(estimate, target, strict=True)]
    return terms | {"waveform": torch.stack(errors).mean()}


@pytest.mark.parametrize(("weighting", "channels"), [("k", "mslr"), ("a", "lr"), ("none", "lr")])
def test_what_is_shared_between_terms_changes_none(weighting: Weighting, channels: MagnitudeChannels) -> None:
    """Values and gradients are those of the formulas, in double precision, from scratch."""
    target = noise(2, 2, 8192)
    target[1] *= 10
    estimate = (0.8 * target + noise(2, 2, 8192, seed=1)).requires_grad_(True)
    objective = ReconstructionObjective(
        RATE,
        weights={"waveform": 1.0, "band_level": 1.0},
        weighting=weighting,
        magnitude_channels=channels,
    )
    terms = objective.terms(estimate, target, standard_normal(2))
    filtered = {"k": k_weight, "a": a_weight, "none": lambda audio, _: audio}[weighting]
    exact = estimate.detach().double().requires_grad_(True)
    expected = by_formula(filtered(exact, RATE), filtered(target.double(), RATE), channels)
    assert set(terms) - {"kl"} == set(expected) == set(RECONSTRUCTION_TERMS)
    for name, value in expected.items():
        assert float(terms[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4), name
        (found,) = torch.autograd.grad(terms[name], estimate, retain_graph=True)
        (gradient,) = torch.autograd.grad(value, exact, retain_graph=True)
        # In single precision the gradient of a bin of nearly no magnitude is off, whatever the formula.
        assert (found - gradient).norm() < 1e-2 * gradient.norm(), name


@pytest.mark.parametrize(
    ("weighting", "error_hz", "expected_db"),
    [("k", 10_000, 4.0 - 0.691), ("a", 500, -3.2), ("a", 4_000, 1.0), ("none", 10_000, 0.0)],
)
def test_an_error_counts_by_the_weight_of_its_frequency(
    weighting: Weighting, error_hz: float, expected_db: float
) -> None:
    """A tone that should not be there, beside one at 997 Hz: levels of BS.1770 and IEC 61672."""
    time = torch.arange(RATE, dtype=torch.float64) / RATE
    target = 0.5 * torch.sin(2 * math.pi * 997 * time).expand(1, 2, -1)
    estimate = target + 0.05 * torch.sin(2 * math.pi * error_hz * time)
    objective = ReconstructionObjective(RATE, weights={"waveform": 1.0}, weighting=weighting)
    error = objective.terms(estimate, target, standard_normal(1))["waveform"]
    assert 20 * math.log10(10 * float(error)) == pytest.approx(expected_db, abs=0.1)


def test_without_mid_and_side() -> None:
    """Left and right have the same magnitudes, mid and side change places."""
    left = noise(1, 1, 16_384)
    target, estimate = torch.cat((left, left), 1), torch.cat((left, -left), 1)
    objective = ReconstructionObjective(RATE, weights={"band_level": 1.0}, magnitude_channels="lr")
    terms = objective.terms(estimate, target, standard_normal(1))
    for name in ("spectral_convergence", "log_magnitude", "band_level"):
        assert float(terms[name]) == pytest.approx(0, abs=1e-5), name


@pytest.mark.parametrize("case", ["silence", "impulse", "identical", "silent estimate", "silent target"])
def test_gradients_are_finite(case: str, objective: ReconstructionObjective) -> None:
    target = noise(1, 2, 8192)
    if case in ("silence", "silent target"):
        target = torch.zeros(1, 2, 8192)
    elif case == "impulse":
        target = torch.zeros(1, 2, 8192)
        target[..., 4000] = 1
    estimate = noise(1, 2, 8192, seed=1) if case == "silent target" else target.clone()
    if case == "silent estimate":
        estimate = torch.zeros(1, 2, 8192)
    estimate.requires_grad_(True)
    terms = objective.terms(estimate, target, standard_normal(1))
    for name in RECONSTRUCTION_TERMS:
        (gradient,) = torch.autograd.grad(terms[name], estimate, retain_graph=True)
        assert terms[name].isfinite(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("name", RECONSTRUCTION_TERMS)
def test_following_the_gradient_lowers_the_term(name: str) -> None:
    objective = ReconstructionObjective(
        RATE, weights={**dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 0.0), name: 1.0}, window_sizes=(512,)
    )
    target = noise(1, 2, 4096)
    estimate = (target + 0.3 * noise(1, 2, 4096, seed=1)).requires_grad_(True)
    optimizer = torch.optim.Adam([estimate], lr=1e-3)
    values = []
    for _ in range(30):
        value = objective(estimate, target, standard_normal(1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.9 * values[0]


def test_total_is_the_weighted_sum() -> None:
    weights = {"spectral_convergence": 2.0, "log_magnitude": 0.0, "waveform": 3.0, "kl": 0.5}
    objective = ReconstructionObjective(RATE, weights=weights)
    posterior = Posterior(torch.ones(1, 64, 8), torch.ones(1, 64, 8))
    estimate, target = noise(1, 2, 8192), noise(1, 2, 8192, seed=1)
    terms = objective.terms(estimate, target, posterior)
    assert "log_magnitude" not in terms
    assert float(terms["kl"]) == pytest.approx(64, rel=1e-4)
    expected = sum((DEFAULT_LOSS_WEIGHTS | weights)[name] * float(value) for name, value in terms.items())
    assert float(objective(estimate, target, posterior)) == pytest.approx(expected, rel=1e-5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(EarVAEError, match=r"unknown loss terms \['phase'\].*log_magnitude"):
        ReconstructionObjective(RATE, weights={"phase": 1.0})
    with pytest.raises(EarVAEError, match="0 or more"):
        ReconstructionObjective(RATE, weights={"kl": -1.0})
    with pytest.raises(EarVAEError, match="0 or more"):
        ReconstructionObjective(RATE, weights={"kl": math.nan})
    with pytest.raises(EarVAEError, match="weighting must be one of k, a, none, got 'c'"):
        ReconstructionObjective(RATE, weighting="c")  # type: ignore[arg-type]
    with pytest.raises(EarVAEError, match="magnitude_channels must be one of mslr, lr, got 'ms'"):
        ReconstructionObjective(RATE, magnitude_channels="ms")  # type: ignore[arg-type]
    with pytest.raises(EarVAEError, match="multiples of 4"):
        ReconstructionObjective(RATE, window_sizes=(510,))
    with pytest.raises(EarVAEError, match="at least 1025"):
        ReconstructionObjective(RATE)(noise(1, 2, 1000), noise(1, 2, 1000), standard_normal(1))
    with pytest.raises(EarVAEError, match="must both be"):
        ReconstructionObjective(RATE)(noise(1, 2, 4000), noise(1, 2, 4001), standard_normal(1))
