"""Frequency weightings, applied with their exact response."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ear_vae.errors import EarVAEError

# ITU-R BS.1770-4, stage 1 (high shelf) and stage 2 (high pass), as analogue prototypes that give the
# standard's 48 kHz coefficients and the same curve at any other rate.
_SHELF_HZ, _SHELF_GAIN_DB, _SHELF_Q = 1681.974450955533, 3.999843853973347, 0.7071752369554196
_SHELF_BAND_EXPONENT = 0.4996667741545416
_HIGH_PASS_HZ, _HIGH_PASS_Q = 38.13547087602444, 0.5003270373238773

# The slowest pole (38 Hz, Q 0.5) has decayed by 100 dB after 0.05 s; what would wrap around in the
# circular convolution is below single precision with this much padding.
_PADDING_SECONDS = 0.1

# IEC 61672 A-weighting: corner frequencies in Hz and the gain that makes 0 dB of 1 kHz.
_A_CORNERS_HZ = (20.598997, 107.65265, 737.86223, 12194.217)
_A_GAIN_DB = 1.9997
_A_TAPS, _A_DESIGN_POINTS = 101, 512
_A_BLOCK_SAMPLES = 2**16


def k_weighting_coefficients(sample_rate: int) -> tuple[tuple[list[float], list[float]], ...]:
    """The two biquads of K-weighting, each as (numerator, denominator) in powers of z⁻¹.

    Args:
        sample_rate: In Hz, above 4 kHz.

    Raises:
        EarVAEError: The rate is too low to hold the shelf.

    Reference: ITU-R BS.1770-4, annex 1, tables 1 and 2.
    """
    if sample_rate <= 4 * _SHELF_HZ / 2:
        raise EarVAEError(f"K-weighting needs a sample rate above {2 * _SHELF_HZ:.0f} Hz, got {sample_rate}")
    k = math.tan(math.pi * _SHELF_HZ / sample_rate)
    high = 10 ** (_SHELF_GAIN_DB / 20)
    band = high**_SHELF_BAND_EXPONENT
    norm = 1 + k / _SHELF_Q + k * k
    shelf = (
        [
            (high + band * k / _SHELF_Q + k * k) / norm,
            2 * (k * k - high) / norm,
            (high - band * k / _SHELF_Q + k * k) / norm,
        ],
        [1.0, 2 * (k * k - 1) / norm, (1 - k / _SHELF_Q + k * k) / norm],
    )
    k = math.tan(math.pi * _HIGH_PASS_HZ / sample_rate)
    norm = 1 + k / _HIGH_PASS_Q + k * k
    high_pass = ([1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / norm, (1 - k / _HIGH_PASS_Q + k * k) / norm])
    return shelf, high_pass


def k_weighting_response(frequencies_hz: Tensor, sample_rate: int) -> Tensor:
    """Complex response of K-weighting at the given frequencies, in double precision.

    Args:
        frequencies_hz: Any shape, from 0 to half the sample rate.
        sample_rate: In Hz.

    Returns:
        complex128 tensor of the same shape.

    Raises:
        EarVAEError: As `k_weighting_coefficients`.
    """
    delay = torch.exp(-2j * math.pi * frequencies_hz.double() / sample_rate)
    response = torch.ones_like(delay)
    for numerator, denominator in k_weighting_coefficients(sample_rate):
        response = response * _polynomial(numerator, delay) / _polynomial(denominator, delay)
    return response


def k_weight(audio: Tensor, sample_rate: int) -> Tensor:
    """Filters audio with K-weighting.

    The recursive filter is applied as its exact response in the frequency domain, with zero padding:
    differentiable and fast on every device, where a recursion over samples would take seconds a batch.

    Args:
        audio: [..., T], float32 or float64.
        sample_rate: In Hz.

    Returns:
        [..., T], the filter's causal output, truncated to the input's length.

    Raises:
        EarVAEError: As `k_weighting_coefficients`.
    """
    num_samples = audio.shape[-1]
    num_points = _fast_length(num_samples + int(_PADDING_SECONDS * sample_rate))
    response = _response_on_grid(sample_rate, num_points).to(audio.device)
    spectrum = torch.fft.rfft(audio, num_points) * response.to(
        torch.promote_types(audio.dtype, torch.complex64)
    )
    return torch.fft.irfft(spectrum, num_points)[..., :num_samples]


@lru_cache(maxsize=8)
def a_weighting_taps(sample_rate: int) -> Tensor:
    """The 101-tap filter that spectral distances of the field weight audio with.

    It approximates A-weighting by least squares on bands between 512 frequencies up to the Nyquist
    frequency, of the analogue curve warped by the bilinear transform. Short as it is, it does not follow
    the curve below some 200 Hz: figures are comparable with others' only with this very filter.

    Args:
        sample_rate: In Hz.

    Returns:
        [101] in float64, symmetric.

    Reference: IEC 61672-1, annex E, for the curve; Steinmetz and Reiss, "auraloss" (2020), and Wright and
    Välimäki, arXiv 1911.08922, for the filter.
    """
    position = np.arange(_A_DESIGN_POINTS) / _A_DESIGN_POINTS
    warped = 2j * sample_rate * np.tan(np.pi * position / 2)
    low, second, third, high = (2 * np.pi * corner for corner in _A_CORNERS_HZ)
    curve = np.abs(
        high**2
        * 10 ** (_A_GAIN_DB / 20)
        * warped**4
        / ((warped + low) ** 2 * (warped + high) ** 2 * (warped + second) * (warped + third))
    )
    return torch.from_numpy(_least_squares_taps(_A_TAPS, position.reshape(-1, 2), curve.reshape(-1, 2)))


def a_weight(audio: Tensor, sample_rate: int) -> Tensor:
    """Filters audio with `a_weighting_taps`, centred: no delay, zeros beyond both ends.

    Args:
        audio: [..., T], float32 or float64.
        sample_rate: In Hz.

    Returns:
        [..., T].
    """
    taps = a_weighting_taps(sample_rate)
    reach = taps.numel() // 2
    num_samples = audio.shape[-1]
    num_points = min(_A_BLOCK_SAMPLES, _fast_length(num_samples + 2 * reach))
    block = num_points - 2 * reach
    response = torch.fft.rfft(taps, num_points).to(
        audio.device, torch.promote_types(audio.dtype, torch.complex64)
    )
    weighted = torch.empty_like(audio)
    for start in range(0, num_samples, block):
        stop = min(num_samples, start + block)
        first = max(0, start - reach)
        piece = torch.fft.rfft(audio[..., first : stop + reach], num_points)
        filtered = torch.fft.irfft(piece * response, num_points)
        weighted[..., start:stop] = filtered[..., start - first + reach :][..., : stop - start]
    return weighted


def _least_squares_taps(num_taps: int, edges: np.ndarray, desired: np.ndarray) -> np.ndarray:
    """A symmetric filter whose response is nearest to straight lines over bands, in mean square.

    Args:
        num_taps: Odd.
        edges: [bands, 2], as fractions of the Nyquist frequency; between bands anything goes.
        desired: [bands, 2], the gain at the edges.
    """
    order = np.arange(num_taps)
    half = num_taps // 2 + 1
    # The response is a sum of cosines; these are the integrals of products of two of them, by their
    # difference and by their sum, and of their products with the desired lines.
    integrals = np.diff(np.sinc(edges * order[:, None, None]) * edges, axis=2).sum(axis=(1, 2))
    rows, columns = np.indices((half, half))
    gram = integrals[abs(rows - columns)] + integrals[rows + columns]
    slope = np.diff(desired, axis=1) / np.diff(edges, axis=1)
    line = desired[:, :1] + slope * (edges - edges[:, :1])
    waves = order[:half, None, None]
    primitive = edges * line * np.sinc(edges * waves)
    primitive[0] -= slope * edges**2 / 2
    primitive[1:] += slope * np.cos(np.pi * waves[1:] * edges) / (np.pi * waves[1:]) ** 2
    cosines = np.linalg.solve(gram, np.diff(primitive, axis=2).sum(axis=(1, 2)))
    return np.concatenate((cosines[:0:-1], 2 * cosines[:1], cosines[1:]))


@lru_cache(maxsize=8)
def _response_on_grid(sample_rate: int, num_points: int) -> Tensor:
    return k_weighting_response(
        torch.fft.rfftfreq(num_points, 1 / sample_rate, dtype=torch.float64), sample_rate
    )


def _polynomial(coefficients: list[float], delay: Tensor) -> Tensor:
    b0, b1, b2 = coefficients
    return b0 + delay * (b1 + delay * b2)


def _fast_length(at_least: int) -> int:
    """The smallest power of two, or three times one, that is not below `at_least`."""
    power = 1 << (at_least - 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= at_least else power
