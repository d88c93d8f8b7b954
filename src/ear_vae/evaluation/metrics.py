"""The metrics of the paper, each a function of (estimate, target), or all at once.

Both signals are cut to the length of the shorter. SI-SDR and the spectral figures are computed at 44.1 kHz
after torchaudio's default resampling, as published figures are; loudness and true peak at the signal's own
rate.
Tensors are [C, T] for one pair, with scalar results, or [B, C, T] for a batch, with results [B].
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from ear_vae.dsp import loudness
from ear_vae.dsp.resampling import resample_briefly
from ear_vae.dsp.si_sdr import scale_invariant_sdr_db
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.spectra import SPECTRAL_RATE, compare_spectra
from ear_vae.limits import sample_rate_of

METRICS = (
    "si_sdr_db",
    "mel_distance",
    "stft_distance",
    "icpc",
    "ccpc",
    "true_peak_distance_db",
    "loudness_distance_lu",
    "loudness_range_distance_lu",
)
_DISTANCES, _COHERENCES = {"mel_distance", "stft_distance"}, {"icpc", "ccpc"}
_AT_44K = {"si_sdr_db", *_DISTANCES, *_COHERENCES}
_LOUDNESSES = ("lufs", "loudness_range_lu", "true_peak_dbtp")
_WHY_UNDEFINED = {
    "si_sdr_db": "the target is silent or constant",
    "mel_distance": "the target is silent",
    "stft_distance": "the target is silent",
    "icpc": "no channel is filled in both signals",
    "ccpc": "there are not two channels that are filled in both signals",
    "true_peak_distance_db": "one of the two signals is silent",
    "loudness_distance_lu": "one of the two signals is silent",
}


def si_sdr_db(estimate: Tensor, target: Tensor, *, sample_rate: int = SPECTRAL_RATE) -> Tensor:
    """Computes the scale-invariant signal-to-distortion ratio in dB, averaged over channels.

    Higher is better.

    Args:
        estimate: [C, T] or [B, C, T].
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Returns:
        See `ear_vae.dsp.si_sdr.scale_invariant_sdr_db`: finite also for equal signals and for a silent
        estimate.

    Raises:
        EarVAEError: Wrong or different shapes, NaN or infinity in a signal, or a target that is silent or
            constant in all channels.

    Examples:
        >>> import torch
        >>> from ear_vae.evaluation import si_sdr_db
        >>> angle = 2 * torch.pi * 441 * torch.arange(44_100) / 44_100
        >>> target, error = torch.sin(angle)[None], 0.1 * torch.cos(angle)[None]
        >>> round(si_sdr_db(target + error, target).item(), 2)  # a tenth of the amplitude
        20.0
    """
    return _one("si_sdr_db", estimate, target, sample_rate)


def mel_distance(estimate: Tensor, target: Tensor, *, sample_rate: int = SPECTRAL_RATE) -> Tensor:
    """Computes the multi-resolution mel distance: spectral convergence plus L1 of log magnitudes.

    It is 0 for equal signals. A-weighted, 64 mel bands, window sizes 4096 to 512. Not symmetric. Magnitudes
    below 1e-4 count as 1e-4, so that two silent signals are equal and a silent estimate has a distance.

    Args:
        estimate: [C, T] or [B, C, T], at least 47 ms.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: Wrong or different shapes, NaN or infinity in a signal, too few samples, or a silent
            target for an estimate that is not.

    Reference: Steinmetz and Reiss, "auraloss" (2020), MultiResolutionSTFTLoss.
    """
    return _one("mel_distance", estimate, target, sample_rate)


def stft_distance(estimate: Tensor, target: Tensor, *, sample_rate: int = SPECTRAL_RATE) -> Tensor:
    """Computes the same distance as `mel_distance`, over all bins of window sizes 4096 to 128.

    Args:
        estimate: [C, T] or [B, C, T], at least 47 ms.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: As `mel_distance`.
    """
    return _one("stft_distance", estimate, target, sample_rate)


def icpc(estimate: Tensor, target: Tensor, *, sample_rate: int = SPECTRAL_RATE) -> Tensor:
    """Computes ICPC, the intra-channel phase coherence with the original, from 0 to 1 (equal).

    |Σ_f w exp(jΔφ)| / Σ_f w per frame, with w = |X||Y|, averaged over frames by Σ_f w, then over window
    sizes 4096 to 512 and over the channels that are not silent. A gain, a polarity flip and a rotation of
    all phases by one angle leave it at 1.

    Args:
        estimate: [C, T] or [B, C, T], at least 47 ms.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: As `mel_distance`, and where no channel is filled in both signals.
    """
    return _one("icpc", estimate, target, sample_rate)


def ccpc(estimate: Tensor, target: Tensor, *, sample_rate: int = SPECTRAL_RATE) -> Tensor:
    """Computes CCPC, the cross-channel phase coherence between left and right, from 0 to 1 (equal).

    As `icpc`, with the difference of estimate and target in angle(L R*) as Δφ, and w = |L||R| of the
    estimate. A bin that is silent in the target counts as having been in phase there.

    Args:
        estimate: [2, T] or [B, 2, T], at least 47 ms.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: As `mel_distance`, for mono, and where a channel of the estimate is silent.
    """
    return _one("ccpc", estimate, target, sample_rate)


def true_peak_distance_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Computes the absolute difference of the true peaks in dB; 0 where both signals are silent.

    Args:
        estimate: [C, T] or [B, C, T].
        target: Same shape but for T.

    Raises:
        EarVAEError: Wrong or different shapes, NaN or infinity in a signal, or just one silent signal.
    """
    return _one("true_peak_distance_db", estimate, target, SPECTRAL_RATE)


def loudness_distance_lu(estimate: Tensor, target: Tensor, *, sample_rate: int) -> Tensor:
    """Computes the absolute difference of integrated loudness in LU; 0 where both signals are silent.

    Args:
        estimate: [C, T] or [B, C, T], at least 0.4 s.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: As `ear_vae.dsp.loudness.integrated_loudness`, or just one silent signal.
    """
    return _one("loudness_distance_lu", estimate, target, sample_rate)


def loudness_range_distance_lu(estimate: Tensor, target: Tensor, *, sample_rate: int) -> Tensor:
    """Computes the absolute difference of the loudness ranges in LU.

    Args:
        estimate: [C, T] or [B, C, T], at least 0.4 s.
        target: Same shape but for T.
        sample_rate: Sample rate of both in Hz.

    Raises:
        EarVAEError: As `ear_vae.dsp.loudness.loudness_range`.
    """
    return _one("loudness_range_distance_lu", estimate, target, sample_rate)


def measure(
    estimate: Tensor,
    target: Tensor,
    *,
    sample_rate: int,
    estimate_sample_rate: int | None = None,
    names: Collection[str] = METRICS,
) -> dict[str, Tensor]:
    """Computes several metrics of the same signals, faster than one by one.

    Args:
        estimate: [C, T] or [B, C, T].
        target: Same shape but for T.
        sample_rate: Sample rate of the target in Hz.
        estimate_sample_rate: Sample rate of the estimate in Hz, where it differs from that of the target.
        names: Names of metrics, out of `METRICS`.

    Returns:
        The metrics in float64, NaN where one is undefined (see each function and `why_undefined`);
        with a metric of loudness or peak also the two values that it compares: `lufs_estimate`,
        `lufs_target`, `loudness_range_lu_...` and `true_peak_dbtp_...`, -infinite for silence.

    Raises:
        EarVAEError: An unknown name, wrong or different shapes, NaN or infinity in a signal, too few
            samples for one of the metrics, or an unusable rate.
    """
    wanted = set(names)
    if unknown := wanted - set(METRICS):
        raise EarVAEError(f"unknown metrics {sorted(unknown)}; choose from {', '.join(METRICS)}")
    _require_pair(estimate, target)
    rate = sample_rate_of(sample_rate)
    estimate_rate = (
        rate if estimate_sample_rate is None else sample_rate_of(estimate_sample_rate, "estimate_sample_rate")
    )
    pair = ((estimate, estimate_rate), (target, rate))
    results: dict[str, Tensor] = {}
    if wanted & _AT_44K:
        x, y = (_at_44k(audio, rate) for audio, rate in pair)
        num_samples = min(x.shape[-1], y.shape[-1])
        results |= _compare_at_44k(x[..., :num_samples], y[..., :num_samples], wanted)
        del x, y
    seconds = min(Fraction(audio.shape[-1], rate) for audio, rate in pair)
    results |= _compare_loudness([(audio[..., : ceil(seconds * rate)], rate) for audio, rate in pair], wanted)
    return {name: results[name] for name in (*METRICS, *results) if name in results}


def why_undefined(name: str) -> str:
    """Returns in words why a metric has no value."""
    return _WHY_UNDEFINED.get(name, "it has no finite value for these signals")


def _one(name: str, estimate: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    value = measure(estimate, target, sample_rate=sample_rate, names=(name,))[name]
    if not bool(torch.isfinite(value).all()):
        which = "" if value.ndim == 0 else f" (items {(~value.isfinite()).nonzero().flatten().tolist()})"
        raise EarVAEError(f"{name} is undefined: {why_undefined(name)}{which}")
    return value


def _compare_at_44k(estimate: Tensor, target: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    results = {}
    if "si_sdr_db" in wanted:
        results["si_sdr_db"] = scale_invariant_sdr_db(estimate, target).double()
    if wanted & (_DISTANCES | _COHERENCES):
        pair = (estimate, target) if target.ndim == 3 else (estimate.unsqueeze(0), target.unsqueeze(0))
        figures = compare_spectra(
            *pair, distances=bool(wanted & _DISTANCES), coherences=bool(wanted & _COHERENCES)
        )
        for name, value in figures._asdict().items():
            if name in wanted:
                results[name] = value if target.ndim == 3 else value[0]
    return results


def _compare_loudness(pair: list[tuple[Tensor, int]], wanted: set[str]) -> dict[str, Tensor]:
    measured: dict[str, list[Tensor]] = {name: [] for name in _LOUDNESSES}
    for audio, rate in pair:
        if wanted & {"loudness_distance_lu", "loudness_range_distance_lu"}:
            powers = loudness.Loudness(audio, rate)
            measured["lufs"].append(powers.integrated)
            measured["loudness_range_lu"].append(powers.range)
        if "true_peak_distance_db" in wanted:
            measured["true_peak_dbtp"].append(loudness.true_peak_dbtp(audio))
    results = {}
    names = ("loudness_distance_lu", "loudness_range_distance_lu", "true_peak_distance_db")
    for name, quantity in zip(names, _LOUDNESSES, strict=True):
        if name in wanted:
            estimate, target = measured[quantity]
            both_silent = estimate.isneginf() & target.isneginf()
            results[name] = (estimate - target).abs().masked_fill(both_silent, 0)
            results[f"{quantity}_estimate"], results[f"{quantity}_target"] = estimate, target
    return results


def _at_44k(audio: Tensor, sample_rate: int) -> Tensor:
    # On a GPU single-precision convolutions may be rounded to 10 bits, as a setting that is the user's;
    # double ones never are.
    exact = audio.float() if audio.device.type == "cpu" else audio.double()
    return resample_briefly(exact, sample_rate, SPECTRAL_RATE).float()


def _require_pair(estimate: Tensor, target: Tensor) -> None:
    for name, audio in (("estimate", estimate), ("target", target)):
        if not isinstance(audio, Tensor):
            raise EarVAEError(f"the {name} is a {type(audio).__name__}; expected a tensor: torch.as_tensor")
        if audio.ndim not in (2, 3) or audio.numel() == 0:
            raise EarVAEError(
                f"the {name} has shape {list(audio.shape)}; expected [C, T] or [B, C, T] with samples in it"
            )
        if not audio.is_floating_point():
            raise EarVAEError(f"the {name} is {audio.dtype}; expected floating point, full scale at 1")
        if not bool(torch.isfinite(audio).all()):
            raise EarVAEError(f"the {name} holds NaN or infinite samples; repair it first")
    if estimate.shape[:-1] != target.shape[:-1]:
        raise EarVAEError(
            f"the estimate has shape {list(estimate.shape)}, the target {list(target.shape)}; "
            "all but the length must be equal: duplicate mono with .expand(2, -1)"
        )
