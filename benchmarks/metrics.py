"""How long the metrics take beside the straightforward implementation.

    pip install auraloss==0.4.0 librosa scipy pyloudnorm
    python benchmarks/metrics.py [ESTIMATE TARGET] [--repeats 3] [--threads N]

Times all metrics of one pair (two files, or 30 s of generated stereo at 48 kHz), once with
`ear_vae.evaluation` and once written down with auraloss, torch and pyloudnorm, in turns in the same
process, and prints both results, the best times and their ratio. auraloss has its mel filters from librosa;
where that is missing, torchaudio's equal ones are used.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ear_vae.audio import read_audio
from ear_vae.dsp._torchaudio import functional
from ear_vae.evaluation import measure

RATE = 44_100
MEL_SIZES = (4096, 2048, 1024, 512)
STFT_SIZES = (*MEL_SIZES, 256, 128)


def provide_librosa() -> None:
    """A stand-in for the one function of librosa that auraloss calls."""
    try:
        import librosa.filters  # noqa: F401
    except ImportError:

        def mel(sr: int, n_fft: int, n_mels: int) -> object:
            filters = functional().melscale_fbanks(
                n_fft // 2 + 1, 0.0, sr / 2, n_mels, sr, norm="slaney", mel_scale="slaney"
            )
            return filters.T.numpy()

        package, module = types.ModuleType("librosa"), types.ModuleType("librosa.filters")
        module.mel = mel  # type: ignore[attr-defined]
        package.filters = module  # type: ignore[attr-defined]
        sys.modules |= {"librosa": package, "librosa.filters": module}


def straightforward() -> Callable[[Tensor, Tensor, int], dict[str, float]]:
    """The metrics as their definitions read."""
    import auraloss
    import pyloudnorm

    def multi_resolution(sizes: tuple[int, ...], **options: object) -> torch.nn.Module:
        return auraloss.freq.MultiResolutionSTFTLoss(
            fft_sizes=list(sizes),
            hop_sizes=[size // 4 for size in sizes],
            win_lengths=list(sizes),
            sample_rate=RATE,
            perceptual_weighting=True,
            **options,
        )

    si_sdr = auraloss.time.SISDRLoss()
    mel, stft = multi_resolution(MEL_SIZES, scale="mel", n_bins=64), multi_resolution(STFT_SIZES)

    def measure_plainly(estimate: Tensor, target: Tensor, sample_rate: int) -> dict[str, float]:
        x, y = (functional().resample(audio, sample_rate, RATE)[None] for audio in (estimate, target))
        icpc, ccpc = coherences(x[0], y[0])
        found = {
            "si_sdr_db": -float(si_sdr(x, y)),
            "mel_distance": float(mel(x, y)),
            "stft_distance": float(stft(x, y)),
            "icpc": icpc,
            "ccpc": ccpc,
        }
        meter = pyloudnorm.Meter(sample_rate, filter_class="DeMan")
        for side, audio in (("estimate", estimate), ("target", target)):
            samples = audio.T.double().numpy()
            found[f"lufs_{side}"] = meter.integrated_loudness(samples)
            found[f"loudness_range_lu_{side}"] = meter.loudness_range(samples)
            oversampled = functional().resample(audio, 1, 4)
            found[f"true_peak_dbtp_{side}"] = float(20 * oversampled.abs().max().log10())
        return found

    return measure_plainly


def coherences(x: Tensor, y: Tensor) -> tuple[float, float]:
    each, between = [], []
    for size in MEL_SIZES:
        window = torch.hann_window(size)
        spectra = [torch.stft(a, size, size // 4, window=window, return_complex=True) for a in (x, y)]
        (x_size, y_size), (x_angle, y_angle) = [s.abs() for s in spectra], [s.angle() for s in spectra]
        each.append([coherence(x_size[c] * y_size[c], x_angle[c] - y_angle[c]) for c in range(2)])
        difference = (x_angle[0] - x_angle[1]) - (y_angle[0] - y_angle[1])
        between.append(coherence(x_size[0] * x_size[1], difference))
    return float(torch.tensor(each).mean()), float(torch.tensor(between).mean())


def coherence(weights: Tensor, angles: Tensor) -> float:
    weights = torch.where(weights > 1e-6, weights, 0)
    total = weights.sum(dim=0)
    frames = (weights * torch.exp(1j * angles)).sum(dim=0).abs() / total.clamp(min=1e-12)
    return float((frames * total).sum() / total.sum())


def generated() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    target, added = 0.1 * torch.randn(2, 2, 30 * 48_000, generator=generator)
    return target + 0.3 * added, target, 48_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="ESTIMATE TARGET")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    provide_librosa()
    if arguments.files:
        (estimate, rate), (target, other_rate) = map(read_audio, arguments.files)
        if rate != other_rate:
            parser.error(f"the files have different rates: {rate} and {other_rate} Hz")
        length = min(estimate.shape[1], target.shape[1])
        pair = (estimate[:, :length], target[:, :length], rate)
    else:
        pair = generated()
    plain = straightforward()
    ours = lambda x, y, rate: {n: float(v) for n, v in measure(x, y, sample_rate=rate).items()}  # noqa: E731
    best = {"ours": float("inf"), "plain": float("inf")}
    for _ in range(arguments.repeats):
        results = {}
        for name, function in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            results[name] = function(*pair)
            best[name] = min(best[name], time.perf_counter() - started)
    for name, value in results["plain"].items():
        print(f"{name:26} ear_vae {results['ours'][name]:10.5f}   plain {value:10.5f}")
    print(f"threads {torch.get_num_threads()}   ear_vae {best['ours']:.2f} s   plain {best['plain']:.2f} s")
    print(f"ratio {best['ours'] / best['plain']:.3f}")


if __name__ == "__main__":
    main()
