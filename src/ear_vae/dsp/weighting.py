"""Frequency weightings, applied with their exact response."""

from __future__ import annotations

import math
from functools import lru_cache

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
