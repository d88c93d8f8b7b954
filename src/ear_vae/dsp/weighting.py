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

# The first 51 of the 101 taps of the A-weighting filter by sample rate in Hz; the last is the middle one, and
# the others mirror them. They are the least-squares fit (scipy.signal.firls) to the analogue curve of
# IEC 61672 through the bilinear transform; tests/dsp/test_weighting.py derives them.
_A_HALVES = {
    44_100: (
        -0.0019269367981295026,
        -0.0020061424608776965,
        -0.002098770642883687,
        -0.002188603198654123,
        -0.002292656421033436,
        -0.0023947911006595517,
        -0.0025120879945326998,
        -0.002628499482177309,
        -0.0027611856025559723,
        -0.0028942056079810353,
        -0.0030448165231045364,
        -0.0031972029314514126,
        -0.003368740031144507,
        -0.003543760027942462,
        -0.003739781689801527,
        -0.003941311765683477,
        -0.004166043076323081,
        -0.0043986894313239565,
        -0.0046571543382050665,
        -0.004926397953182744,
        -0.005224578546700784,
        -0.005536950097984585,
        -0.005881978725207418,
        -0.006245269623072902,
        -0.006645660752440407,
        -0.00706917792707741,
        -0.007535108164543076,
        -0.008029981856801552,
        -0.008573628315803116,
        -0.00915318411765181,
        -0.009789133537936248,
        -0.010469342346502859,
        -0.011215086025650115,
        -0.012015108519416276,
        -0.012891641370163524,
        -0.013834487201399438,
        -0.014867033204705374,
        -0.015980359469124107,
        -0.01719925061256384,
        -0.018516329476104775,
        -0.019958071127441992,
        -0.021518962804627253,
        -0.023227523243077197,
        -0.025080464506817262,
        -0.02710835239459557,
        -0.02930451133150747,
        -0.03161545725535354,
        -0.03279896769905805,
        -0.015174574464082784,
        0.2734031648902889,
        0.5443199248815196,
    ),
    48_000: (
        -0.0021327337845472513,
        -0.002217941928058757,
        -0.002317664975180794,
        -0.0024138956188870272,
        -0.002525424520193777,
        -0.0026343188568420666,
        -0.0027594261529199017,
        -0.002882898699300127,
        -0.003023653504083492,
        -0.0031639406559340897,
        -0.0033227615058809994,
        -0.0034824790705583037,
        -0.0036621965661595697,
        -0.003844407977393901,
        -0.004048339078740755,
        -0.004256636327329065,
        -0.004488672525800904,
        -0.004727272234133506,
        -0.004991984253253254,
        -0.005265841792979995,
        -0.005568603987100846,
        -0.0058835491032658,
        -0.006230687339772895,
        -0.006593585419783633,
        -0.00699255296906559,
        -0.0074114969029654846,
        -0.007871083744620701,
        -0.008355622290707704,
        -0.008886204303332123,
        -0.009447614032015265,
        -0.010061449802195706,
        -0.010713059079100263,
        -0.011424643584653196,
        -0.012182218717203732,
        -0.013008704960373516,
        -0.013890910625187798,
        -0.014852612473432924,
        -0.015881560929830854,
        -0.01700255302845878,
        -0.018204459406864798,
        -0.01951329244679283,
        -0.020919250448796185,
        -0.022449746953994463,
        -0.024096136808902237,
        -0.025883724887023354,
        -0.027771581452924188,
        -0.02948268288736719,
        -0.028267291187946648,
        0.0002951942049023123,
        0.27400676054111783,
        0.5210934534587274,
    ),
}
_A_BLOCK_SAMPLES = 2**16


def k_weighting_coefficients(sample_rate: int) -> tuple[tuple[list[float], list[float]], ...]:
    """The two biquads of K-weighting, each as (numerator, denominator) in powers of z⁻¹.

    Args:
        sample_rate: Sample rate of the audio in Hz, above 4 kHz.

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
        sample_rate: Sample rate of the audio in Hz.

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
        sample_rate: Sample rate of the audio in Hz.

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
    """Returns the 101-tap A-weighting filter that is customary ahead of spectral distances.

    It approximates A-weighting by least squares on bands between 512 frequencies up to the Nyquist
    frequency, of the analogue curve warped by the bilinear transform. Short as it is, it does not follow
    the curve below some 200 Hz: figures are comparable with others' only with this very filter.

    Args:
        sample_rate: Sample rate of the audio in Hz, 44100 or 48000.

    Returns:
        [101] in float64, symmetric.

    Raises:
        EarVAEError: There is no filter for the rate.

    Reference: IEC 61672-1, annex E, for the curve; Steinmetz and Reiss, "auraloss" (2020), and Wright and
    Välimäki, arXiv 1911.08922, for the filter.
    """
    half = _A_HALVES.get(sample_rate)
    if half is None:
        rates = " or ".join(map(str, _A_HALVES))
        raise EarVAEError(f"A-weighting needs audio at {rates} Hz, got {sample_rate} Hz; resample it first")
    return torch.tensor((*half, *half[-2::-1]), dtype=torch.float64)


def a_weight(audio: Tensor, sample_rate: int) -> Tensor:
    """Filters audio with `a_weighting_taps`, centred: no delay, zeros beyond both ends.

    Args:
        audio: [..., T], float32 or float64.
        sample_rate: Sample rate of `audio` in Hz, 44100 or 48000.

    Returns:
        [..., T].

    Raises:
        EarVAEError: As `a_weighting_taps`.
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
