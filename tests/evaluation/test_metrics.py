"""The metrics against closed forms, a plain second implementation, and themselves in blocks and batches."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import MetricCollection

from ear_vae import EarVAEError, evaluation
from ear_vae.dsp.resampling import resample
from ear_vae.dsp.weighting import a_weighting_taps
from ear_vae.evaluation import (
    METRICS,
    MelDistance,
    ReconstructionMetrics,
    SiSdr,
    StftDistance,
    ccpc,
    icpc,
    loudness_distance_lu,
    loudness_range_distance_lu,
    measure,
    mel_distance,
    si_sdr_db,
    stft_distance,
    true_peak_distance_db,
)

RATE = 44_100
LOUDNESS = (loudness_distance_lu, loudness_range_distance_lu)


def noise(*shape: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stereo(seconds: float = 2.0, seed: int = 0) -> torch.Tensor:
    return noise(2, int(seconds * RATE), seed=seed)


def band(audio: torch.Tensor, low: float, high: float, turn: complex = 1) -> torch.Tensor:
    """Frequencies from `low` to `high`, as fractions of the Nyquist frequency, turned in phase."""
    spectrum = torch.fft.rfft(audio)
    bins = spectrum.shape[-1]
    kept = torch.zeros_like(spectrum)
    kept[..., int(low * bins) : int(high * bins)] = spectrum[..., int(low * bins) : int(high * bins)] * turn
    return torch.fft.irfft(kept, audio.shape[-1])


def test_equal_signals_have_ideal_values() -> None:
    found = measure(stereo(), stereo(), sample_rate=RATE)
    assert tuple(found)[: len(METRICS)] == METRICS
    assert found["si_sdr_db"] > 100
    ideal = {name: 1.0 if name in ("icpc", "ccpc") else 0.0 for name in METRICS if name != "si_sdr_db"}
    assert {name: float(found[name]) for name in ideal} == pytest.approx(ideal, abs=1e-5)


@pytest.mark.parametrize("snr_db", [-10, 0, 20, 60])
def test_white_noise_at_a_level_is_that_si_sdr(snr_db: float) -> None:
    target, added = stereo(), stereo(seed=1)
    target, added = (x - x.mean(dim=-1, keepdim=True) for x in (target, added))
    # Orthogonal to the target, so that the ratio is exact.
    added = added - (added * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True) * target
    added *= (target.square().sum(-1, keepdim=True) / added.square().sum(-1, keepdim=True)).sqrt()
    estimate = 0.3 * (target + 10 ** (-snr_db / 20) * added) + 0.2
    assert float(si_sdr_db(estimate, target)) == pytest.approx(snr_db, abs=0.001)


def test_a_delayed_tone_has_the_si_sdr_of_its_angle() -> None:
    """An angle θ leaves cos θ of the target and sin θ of what is orthogonal to it."""
    angle, time = math.radians(20), torch.arange(RATE, dtype=torch.float64) / RATE
    target, estimate = (torch.sin(2 * math.pi * 100 * time - delay)[None] for delay in (0, angle))
    assert float(si_sdr_db(estimate, target)) == pytest.approx(-20 * math.log10(math.tan(angle)), abs=1e-3)


def test_a_gain_changes_level_and_nothing_else() -> None:
    target, gain = stereo(4), 0.8
    found = measure(gain * target, target, sample_rate=RATE)
    gain_db = -20 * math.log10(gain)
    assert found["si_sdr_db"] > 90
    # Spectral convergence |g - 1| and the logarithm of g in every bin.
    for name in ("mel_distance", "stft_distance"):
        assert float(found[name]) == pytest.approx(1 - gain - math.log(gain), abs=1e-3)
    for name in ("icpc", "ccpc"):
        assert float(found[name]) == pytest.approx(1, abs=1e-6)
    for name in ("true_peak_distance_db", "loudness_distance_lu"):
        assert float(found[name]) == pytest.approx(gain_db, abs=1e-3)
    assert float(found["loudness_range_distance_lu"]) == pytest.approx(0, abs=1e-3)
    assert float(found["lufs_target"] - found["lufs_estimate"]) == pytest.approx(gain_db, abs=1e-3)


def test_a_polarity_flip_is_no_difference() -> None:
    found = measure(-stereo(), stereo(), sample_rate=RATE)
    assert found["si_sdr_db"] > 90
    assert float(found["mel_distance"]) == pytest.approx(0, abs=1e-5)
    assert float(found["icpc"]) == pytest.approx(1, abs=1e-6)
    # One channel only turns all phase differences by the same half circle.
    flipped = stereo() * torch.tensor([[1.0], [-1.0]])
    assert float(ccpc(flipped, stereo())) == pytest.approx(1, abs=1e-6)


def test_coherence_of_a_delay() -> None:
    """One sample turns the phase of white noise evenly from 0 to π, whose mean is 2 / π long."""
    source = stereo(20)
    target, estimate = source[:, 1:], source[:, :-1]
    assert float(icpc(estimate, target)) == pytest.approx(2 / math.pi, abs=0.01)
    assert float(ccpc(estimate, target)) == pytest.approx(1, abs=0.01)
    one_side = torch.stack((estimate[0], target[1]))
    expected = (1 + 2 / math.pi) / 2
    assert float(icpc(one_side, target)) == pytest.approx(expected, abs=0.01)


def test_cross_coherence_of_a_delay_on_one_side() -> None:
    """With equal channels the products are |X|², their weights those of the channel's own delay."""
    source = noise(1, 20 * RATE).expand(2, -1)
    target, estimate = source[:, 1:], torch.stack((source[0, :-1], source[1, 1:]))
    assert float(ccpc(estimate, target)) == pytest.approx(2 / math.pi, abs=0.01)


def test_swapped_channels() -> None:
    """A quarter of the band in phase stays, three quarters at 90° turn by 180°: |1 - 3| / 4."""
    mono = noise(10 * RATE)
    low, high = band(mono, 0, 0.25), band(mono, 0.25, 1)
    target = torch.stack((low + high, low + band(mono, 0.25, 1, turn=1j)))
    assert float(ccpc(target.flip(0), target)) == pytest.approx(0.5, abs=0.02)
    assert float(ccpc(target, target)) == pytest.approx(1, abs=1e-6)
    independent = stereo(5)
    assert float(si_sdr_db(independent.flip(0), independent)) < -30
    assert float(icpc(independent.flip(0), independent)) < 0.1


def plain_distance(estimate: torch.Tensor, target: torch.Tensor, sizes: tuple[int, ...], mel: bool) -> float:
    """Spectrograms of the whole signal, as one would write it down."""
    import scipy.signal

    taps = a_weighting_taps(RATE).numpy()
    total = 0.0
    for size in sizes:
        magnitudes = []
        for audio in (estimate, target):
            filtered = torch.from_numpy(scipy.signal.fftconvolve(audio.double(), taps[None], mode="same"))
            spectrum = torch.stft(
                filtered, size, size // 4, window=torch.hann_window(size).double(), return_complex=True
            )
            magnitude = spectrum.abs().square().clamp(min=1e-8).sqrt()
            magnitudes.append(triangles(size) @ magnitude if mel else magnitude)
        x, y = magnitudes
        total += float((y - x).norm() / y.norm() + (x.log() - y.log()).abs().mean())
    return total / len(sizes)


def triangles(size: int) -> torch.Tensor:
    """64 Slaney mel filters: linear to 1 kHz (15 mel), then 27 steps to a factor of 6.4."""

    def hz(mel: torch.Tensor) -> torch.Tensor:
        return torch.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))

    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    corners = hz(torch.linspace(0, top, 66, dtype=torch.float64))
    bins = torch.arange(size // 2 + 1, dtype=torch.float64) * RATE / size
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


@pytest.mark.parametrize("num_samples", [2049, 4096, 32_768, 32_769, 70_000])
def test_distances_are_those_of_a_plain_implementation(num_samples: int) -> None:
    pytest.importorskip("scipy")
    target = band(noise(2, num_samples), 0, 0.5)
    estimate = target + noise(2, num_samples, seed=1, level=0.01)
    sizes = (4096, 2048, 1024, 512)
    expected = plain_distance(estimate, target, sizes, mel=True)
    assert float(mel_distance(estimate, target)) == pytest.approx(expected, abs=1e-4)
    expected = plain_distance(estimate, target, (*sizes, 256, 128), mel=False)
    assert float(stft_distance(estimate, target)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_samples", [2049, 3000, 16_384, 50_001])
def test_blocks_equal_the_whole(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, estimate = noise(2, num_samples), noise(2, num_samples) + noise(2, num_samples, seed=1)
    names = ("mel_distance", "stft_distance", "icpc", "ccpc")
    monkeypatch.setattr("ear_vae.evaluation.spectra._CPU_BLOCK", 2**20)
    whole = measure(estimate, target, sample_rate=RATE, names=names)
    monkeypatch.setattr("ear_vae.evaluation.spectra._CPU_BLOCK", 1024)
    blocks = measure(estimate, target, sample_rate=RATE, names=names)
    assert {n: float(blocks[n]) for n in names} == pytest.approx(
        {n: float(whole[n]) for n in names}, abs=1e-5
    )


def test_a_batch_is_its_pairs_and_the_order_counts() -> None:
    target = torch.stack([stereo(seed=seed) for seed in range(3)])
    estimate = 0.5 * target + torch.stack([0.01 * stereo(seed=9)] * 3)
    batch = measure(estimate, target, sample_rate=RATE)
    for index in range(3):
        single = measure(estimate[index], target[index], sample_rate=RATE)
        for name, value in single.items():
            assert float(batch[name][index]) == pytest.approx(float(value), abs=1e-5), name
    assert float(mel_distance(estimate[0], target[0])) < float(mel_distance(target[0], estimate[0])) - 0.3


def test_rates_and_lengths() -> None:
    """Band-limited audio keeps its figures at another rate; the longer signal is cut."""
    audio = band(noise(2, 4 * 48_000), 0.01, 0.4)
    halved = audio.clone()
    halved[..., 96_000:] *= 0.5
    found = measure(halved, audio[..., :96_000], sample_rate=48_000)
    assert found["si_sdr_db"] > 60
    assert float(found["loudness_distance_lu"]) == pytest.approx(0, abs=1e-3)
    other = resample(audio, 48_000, 32_000)
    found = measure(other, audio, sample_rate=48_000, estimate_sample_rate=32_000)
    assert found["si_sdr_db"] > 40
    assert float(found["lufs_estimate"]) == pytest.approx(float(found["lufs_target"]), abs=0.05)
    assert found["icpc"] > 0.99


def test_silence_and_constants() -> None:
    silence, music, constant = torch.zeros(2, RATE), stereo(1), torch.full((2, RATE), 0.3)
    for target in (silence, constant):
        with pytest.raises(EarVAEError, match="target is silent or constant"):
            si_sdr_db(music, target)
    assert float(si_sdr_db(silence, music)) == pytest.approx(-80)
    # A silent side has no ratio; the other one stands alone.
    left = music * torch.tensor([[1.0], [0.0]])
    estimate = left + 0.1 * stereo(1, seed=1)
    assert float(si_sdr_db(estimate, left)) == pytest.approx(float(si_sdr_db(estimate[:1], left[:1])))
    assert float(icpc(estimate, left)) == pytest.approx(float(icpc(estimate[:1], left[:1])), abs=1e-6)
    for metric in (icpc, ccpc):
        with pytest.raises(EarVAEError, match=r"filled .*items \[1\]"):
            metric(torch.stack((music, silence)), torch.stack((music, music)))
    with pytest.raises(EarVAEError, match="not two channels"):
        ccpc(music[:1], music[:1])
    assert float(mel_distance(silence, silence)) == 0
    assert float(mel_distance(silence, music)) > 1
    for metric in (mel_distance, stft_distance, ccpc):
        with pytest.raises(EarVAEError, match=r"silent|filled"):
            metric(music, silence)
    assert float(true_peak_distance_db(silence, silence)) == 0
    with pytest.raises(EarVAEError, match="one of the two signals is silent"):
        true_peak_distance_db(music, silence)
    found = measure(constant, silence, sample_rate=RATE)
    assert [name for name in METRICS if not found[name].isfinite()] == [
        *("si_sdr_db", "mel_distance", "stft_distance", "icpc", "ccpc"),
        *("true_peak_distance_db", "loudness_distance_lu"),
    ]


@pytest.mark.parametrize(
    ("estimate", "message"),
    [
        (torch.full((2, RATE), math.nan), "estimate holds NaN"),
        (torch.zeros(2, 2048), "too few for the largest window"),
        (torch.zeros(1, RATE), r"duplicate mono"),
        (torch.zeros(RATE), r"expected \[C, T\]"),
        (torch.zeros(2, 0), "with samples in it"),
        (torch.zeros(2, RATE, dtype=torch.int32), "expected floating point"),
    ],
)
def test_what_cannot_be_compared(estimate: torch.Tensor, message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        measure(estimate, stereo(1), sample_rate=RATE)


def test_unknown_names() -> None:
    with pytest.raises(EarVAEError, match="unknown metrics"):
        measure(stereo(), stereo(), sample_rate=RATE, names=("fad",))
    with pytest.raises(EarVAEError, match="unknown metrics"):
        ReconstructionMetrics(RATE, ["fad"])


def test_modules_give_the_means_of_the_functions() -> None:
    pairs = [(stereo(seed=seed) + 0.1 * stereo(seed=seed + 5), stereo(seed=seed)) for seed in range(3)]
    everything = ReconstructionMetrics(RATE)
    everything.update(torch.stack([pairs[0][0], pairs[1][0]]), torch.stack([pairs[0][1], pairs[1][1]]))
    everything.update(*pairs[2])
    found = everything.compute()
    for name in METRICS:
        function = getattr(evaluation, name)
        options = {} if name == "true_peak_distance_db" else {"sample_rate": RATE}
        expected = sum(float(function(*pair, **options)) for pair in pairs) / 3
        assert float(found[name]) == pytest.approx(expected, abs=1e-6), name
        single = "".join(part.capitalize() for part in name.replace("_db", "").replace("_lu", "").split("_"))
        metric = getattr(evaluation, {"Loudnessdistance": "LoudnessDistance"}.get(single, single))(RATE)
        for pair in pairs:
            metric.update(*pair)
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-6), name


def test_modules_say_what_they_leave_out() -> None:
    metric = SiSdr(RATE)
    metric.update(
        torch.stack((stereo(), stereo())), torch.stack((stereo() + 0.1 * stereo(seed=1), stereo() * 0))
    )
    assert float(metric.compute()) == pytest.approx(20, abs=0.2)
    assert metric.undefined == {"si_sdr_db": 1}
    metric.reset()
    metric.update(stereo(), stereo() * 0)
    with pytest.warns(UserWarning, match="si_sdr_db is NaN: the target is silent"):
        assert math.isnan(metric.compute())


def test_a_collection_keeps_metrics_apart_that_begin_alike() -> None:
    """Both are 0 for the first pair, by which a MetricCollection would take them for one."""
    collection = MetricCollection([MelDistance(RATE), StftDistance(RATE)])
    collection.update(stereo(), stereo())
    collection.update(0.1 * stereo(seed=1), stereo())
    found = collection.compute()
    assert float(found["MelDistance"]) != pytest.approx(float(found["StftDistance"]), abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    target = band(noise(2, 10 * 48_000), 0, 0.7)
    estimate = target + noise(2, 10 * 48_000, seed=1, level=0.01)
    expected = measure(estimate, target, sample_rate=48_000)
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", True)
    found = measure(estimate.cuda(), target.cuda(), sample_rate=48_000)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), abs=1e-4), name
