"""Changing the sample rate, differentiably and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ear_vae._dtype import upcast
from ear_vae.dsp._torchaudio import functional
from ear_vae.dsp.stream_buffer import StreamBuffer
from ear_vae.errors import EarVAEError
from ear_vae.limits import integer

# A Kaiser window of 64 zero crossings with its transition band just below the lower Nyquist frequency:
# over 120 dB of rejection, flat to 0.946 of it.
_ZERO_CROSSINGS = 64
_ROLLOFF = 0.9475937167399596
_KAISER_BETA = 14.769656459379492
# torchaudio's defaults.
_BRIEF_ZERO_CROSSINGS, _BRIEF_ROLLOFF = 6, 0.99
# Rates with no common factor need one filter per output phase; past this many taps that is too much
# memory, and the exact method in the frequency domain takes over.
_MOST_TAPS = 2**23
_BLOCK_SECONDS = 20


def resample(audio: Tensor, original_rate: int, target_rate: int) -> Tensor:
    """Audio at another sample rate, aligned in time with the original.

    Long audio is filtered in blocks with the neighbours that the filter needs, so that memory does not
    grow beyond input and output.

    Args:
        audio: [..., T], floating point.
        original_rate: Rate of `audio` in Hz.
        target_rate: Rate wanted in Hz.

    Returns:
        [..., ceil(T * target_rate / original_rate)] in float32 at least; `audio` itself when the rates are
        equal.

    Raises:
        EarVAEError: A rate is not a positive integer, or the audio is not floating point.

    Examples:
        >>> import torch
        >>> from ear_vae.audio import resample
        >>> resample(torch.zeros(2, 44_100), 44_100, 48_000).shape
        torch.Size([2, 48000])
    """
    if audio.shape[-1] == 0 or _ratio(original_rate, target_rate) == (1, 1):
        return audio
    return _resampler(original_rate, target_rate).whole(_precise(audio))


def resample_stream(blocks: Iterable[Tensor], original_rate: int, target_rate: int) -> Iterator[Tensor]:
    """`resample` on audio that comes in pieces, with the same result to the bit.

    Some 20 s are held at a time.

    Args:
        blocks: Pieces of the audio, [..., T_i], floating point.
        original_rate: Their rate in Hz.
        target_rate: Rate wanted in Hz.

    Yields:
        Pieces [..., T_j], together of ceil(T * target_rate / original_rate) samples.

    Raises:
        EarVAEError: As `resample`.
    """
    if _ratio(original_rate, target_rate) == (1, 1):
        yield from blocks
    else:
        yield from _resampler(original_rate, target_rate).stream(map(_precise, blocks))


def resample_briefly(audio: Tensor, original_rate: int, target_rate: int) -> Tensor:
    """Audio at another sample rate by torchaudio's default filter, which rings for 6 zero crossings only.

    Published figures were taken with it, and the top octave of spectral metrics shows which filter it was.
    For listening and for models `resample` is better.

    Args:
        audio: [..., T], floating point.
        original_rate: Rate of `audio` in Hz.
        target_rate: Rate wanted in Hz.

    Returns:
        As `resample`.

    Raises:
        EarVAEError: As `resample`.
    """
    old, new = _ratio(original_rate, target_rate)
    if old == new or audio.shape[-1] == 0:
        return audio
    context = math.ceil(_BRIEF_ZERO_CROSSINGS * old / (min(old, new) * _BRIEF_ROLLOFF))
    if new * (2 * context + old) > _MOST_TAPS:
        return resample(audio, original_rate, target_rate)
    return _Resampler(_by_brief_filter, old, new, original_rate, context).whole(_precise(audio))


def _precise(audio: Tensor) -> Tensor:
    """In float32 at least: in a shorter dtype the filter itself would be wrong, or NaN."""
    if not audio.is_floating_point():
        raise EarVAEError(
            f"audio to resample must be floating point, got {audio.dtype}; divide 16-bit samples by 32768"
        )
    return upcast(audio)


def _ratio(original_rate: int, target_rate: int) -> tuple[int, int]:
    """The two rates without their common factor."""
    for rate in (original_rate, target_rate):
        if (integer(rate) or 0) < 1:
            raise EarVAEError(f"sample rates must be positive integers in Hz, got {rate!r}")
    old, new = int(original_rate), int(target_rate)
    divisor = math.gcd(old, new)
    return old // divisor, new // divisor


def _resampler(original_rate: int, target_rate: int) -> _Resampler:
    old, new = _ratio(original_rate, target_rate)
    original_rate = int(original_rate)
    width = math.ceil(_ZERO_CROSSINGS * old / (min(old, new) * _ROLLOFF))
    if new * (2 * width + old) <= _MOST_TAPS:
        return _Resampler(_by_filter, old, new, original_rate, width)
    # The filter has an end; the ideal low-pass of the spectrum dies away like 1 / t.
    return _Resampler(_by_spectrum, old, new, original_rate, original_rate)


class _Resampler:
    """A conversion that is done block by block, with `context` samples on either side of each.

    Args:
        convert: Makes audio of `old` samples per period to audio of `new`.
        old: Samples of a period at the original rate.
        new: Samples of a period at the target rate.
        original_rate: Sample rate of the blocks in Hz.
        context: Samples around a block that its conversion depends on.
    """

    def __init__(
        self,
        convert: Callable[[Tensor, int, int], Tensor],
        old: int,
        new: int,
        original_rate: int,
        context: int,
    ) -> None:
        self._convert, self._old, self._new = convert, old, new
        # Whole periods, so that every block starts on a sample of both rates.
        self._block = max(1, _BLOCK_SECONDS * original_rate // old) * old
        self._context = -(-context // old) * old

    def whole(self, audio: Tensor) -> Tensor:
        """[..., T] to [..., ceil(T * new / old)]."""
        length = self._length(audio.shape[-1])
        if audio.shape[-1] <= self._block + 2 * self._context:
            return self._convert(audio, self._old, self._new)[..., :length]
        resampled = audio.new_empty(*audio.shape[:-1], length)
        for start in range(0, audio.shape[-1], self._block):
            first = max(0, start - self._context)
            piece = self._piece(audio[..., first : start + self._block + self._context], start - first)
            target = resampled[..., self._length(start) :][..., : self._length(self._block)]
            target.copy_(piece[..., : target.shape[-1]])
        return resampled

    def stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same, piece by piece."""
        held = StreamBuffer()
        source = iter(blocks)
        if not held.fill(source, self._block + 2 * self._context + 1):
            if held.stop:
                yield self.whole(held.read(0, held.stop))
            return
        start, more = 0, True
        while more or start < held.stop:
            more = more and held.fill(source, start + self._block + self._context)
            first = max(0, start - self._context)
            last = min(held.stop, start + self._block + self._context)
            wanted = min(self._length(held.stop) - self._length(start), self._length(self._block))
            if wanted > 0:
                yield self._piece(held.read(first, last), start - first)[..., :wanted]
            start += self._block
            held.discard(max(0, start - self._context))

    def _piece(self, audio: Tensor, skipped: int) -> Tensor:
        return self._convert(audio, self._old, self._new)[..., skipped // self._old * self._new :]

    def _length(self, num_samples: int) -> int:
        return -(-num_samples * self._new // self._old)


def _by_filter(audio: Tensor, old: int, new: int) -> Tensor:
    return functional().resample(
        audio,
        old,
        new,
        lowpass_filter_width=_ZERO_CROSSINGS,
        rolloff=_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=_KAISER_BETA,
    )


def _by_brief_filter(audio: Tensor, old: int, new: int) -> Tensor:
    return functional().resample(
        audio, old, new, lowpass_filter_width=_BRIEF_ZERO_CROSSINGS, rolloff=_BRIEF_ROLLOFF
    )


def _by_spectrum(audio: Tensor, old: int, new: int) -> Tensor:
    """Cuts or extends the spectrum; zero padding to whole periods keeps the ratio of lengths exact."""
    periods = -(-audio.shape[-1] // old) + 1
    spectrum = torch.fft.rfft(audio, periods * old)
    num_bins = periods * new // 2 + 1
    kept = spectrum[..., :num_bins]
    kept = kept * _taper(kept.shape[-1], periods * min(old, new)).to(audio.device, audio.dtype)
    padded = torch.nn.functional.pad(kept, (0, num_bins - kept.shape[-1]))
    return torch.fft.irfft(padded, periods * new) * (new / old)


@lru_cache(maxsize=4)
def _taper(num_bins: int, num_points: int) -> Tensor:
    """1 up to the roll-off of the filter method, then a raised cosine to 0, which rings less than a cliff."""
    position = torch.arange(num_bins, dtype=torch.float64) / (num_points / 2)
    ramp = ((position - _ROLLOFF) / (1 - _ROLLOFF)).clamp(0, 1)
    return 0.5 * (1 + torch.cos(math.pi * ramp))
