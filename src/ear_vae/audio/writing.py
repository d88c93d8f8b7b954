"""Writing audio files: complete or not at all, and never clipped silently."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import soundfile
from torch import Tensor

from ear_vae._atomic import atomic_path, name_of, temporary_folder, write_all
from ear_vae.audio.formats import WRITTEN_FORMATS
from ear_vae.audio.reading import BLOCK_FRAMES, stream_audio
from ear_vae.errors import EarVAEError
from ear_vae.limits import integer

PeakPolicy = Literal["keep", "scale", "clip"]
_T = TypeVar("_T")

_UNBOUNDED_SUBTYPES = {"FLOAT", "DOUBLE"}
# The others that libsndfile offers, such as ADPCM, change the length, or cannot be written after all.
_SUBTYPES = _UNBOUNDED_SUBTYPES | {
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ULAW", "ALAW", "VORBIS", "OPUS", "MPEG_LAYER_III"),
}
# What blocks are kept in whose peak is not known yet, at a rate that can be read again; theirs may be any.
_SPOOL_RATE = 48_000
# A plain RIFF file counts its bytes in 32 bits.
_RIFF_BYTES = 2**32 - 2**16


class PeakWarning(UserWarning):
    """Audio above full scale was written to a format that cannot hold it."""


def write_audio(
    destination: str | os.PathLike[str] | IO[bytes],
    audio: Tensor,
    sample_rate: int,
    *,
    format: str | None = None,
    subtype: str | None = None,
    peak: PeakPolicy = "keep",
    overwrite: bool = False,
) -> None:
    """Writes audio; a file appears complete or not at all.

    Args:
        destination: Path, or an open binary file (then `format` is required).
        audio: [C, T] with C of 1 or 2.
        sample_rate: Sample rate in Hz.
        format: Audio format, one of `wav`, `flac`, `ogg`, `mp3` and `aiff`; by default that of the path's
            extension.
        subtype: Encoding, by libsndfile's name, such as `PCM_16`; by default float32 for wav, 24 bits
            for flac and aiff.
        peak: What to do with samples beyond full scale. `keep` writes them as they are, which in any
            format but float means that they are cut off, with a `PeakWarning`; `scale` lowers the whole file
            so that its peak is full scale; `clip` cuts them off.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: Unknown format or subtype, a rate that the format cannot hold, wrong shape, NaN or
            infinity in the audio, an existing or unwritable destination, a full disk.
    """
    name = name_of(destination)
    audio = audio.detach()
    if audio.ndim != 2 or audio.shape[0] not in (1, 2) or audio.shape[1] == 0:
        raise EarVAEError(
            f"{name}: audio to write must be [C, T] with 1 or 2 channels, got {list(audio.shape)}"
        )
    encoding = _encoding(destination, format, subtype, sample_rate, audio.shape[0], audio.shape[1], peak)
    blocks = audio.split(BLOCK_FRAMES, dim=1)
    highest = max(_finite_peak(block, name) for block in blocks)
    _write(destination, blocks, encoding, gain=encoding.gain(highest), overwrite=overwrite)


def write_audio_stream(
    destination: str | os.PathLike[str] | IO[bytes],
    blocks: Iterable[Tensor],
    sample_rate: int,
    *,
    channels: int,
    num_samples: int,
    format: str | None = None,
    subtype: str | None = None,
    peak: PeakPolicy = "keep",
    overwrite: bool = False,
) -> None:
    """Writes audio that comes in blocks, as `write_audio`; it is held in memory only for an open file.

    Args:
        destination: Path, or an open binary file (then `format` is required).
        blocks: Pieces of the audio, [C, T_i].
        sample_rate: Sample rate in Hz.
        channels: Number of channels C, 1 or 2.
        num_samples: Approximate number of samples, to choose a container that is large enough.
        format: Audio format, see `write_audio`.
        subtype: Encoding, see `write_audio`.
        peak: What to do with samples beyond full scale, see `write_audio`. For `scale` the blocks are kept
            in a temporary file until the peak is known.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: As for `write_audio`.
    """
    encoding = _encoding(destination, format, subtype, sample_rate, channels, num_samples, peak)
    if peak != "scale":
        _write(destination, blocks, encoding, gain=1.0, overwrite=overwrite)
        return
    folder = Path(destination).parent if isinstance(destination, (str, os.PathLike)) else None
    try:
        with temporary_folder(folder) as place:
            spool = place / "spool.wav"
            kept = _encoding(spool, "wav", "FLOAT", _SPOOL_RATE, channels, num_samples, "keep")
            highest = _write(spool, blocks, kept, gain=1.0, overwrite=True)
            with stream_audio(spool) as (_, again):
                _write(destination, again, encoding, gain=encoding.gain(highest), overwrite=overwrite)
    except FileNotFoundError:
        raise EarVAEError(f"{name_of(destination)}: the folder {folder} does not exist") from None
    except OSError as error:
        raise _unwritten(name_of(destination), error) from error


@dataclass(frozen=True)
class _Encoding:
    """How audio is written: what `soundfile` needs to know, and what happens to peaks."""

    name: str
    container: str
    subtype: str
    sample_rate: int
    channels: int
    peak: PeakPolicy

    @property
    def bounded(self) -> bool:
        """Whether it cannot hold samples beyond full scale."""
        return self.subtype not in _UNBOUNDED_SUBTYPES

    @property
    def limits(self) -> bool:
        """Whether samples beyond full scale are cut off."""
        return self.peak == "clip" or (self.peak == "keep" and self.bounded)

    def gain(self, highest: float) -> float:
        """Returns the gain for audio with this peak."""
        return 1 / highest if self.peak == "scale" and highest > 1 else 1.0


def _encoding(
    destination: str | os.PathLike[str] | IO[bytes],
    format: str | None,
    subtype: str | None,
    sample_rate: int,
    channels: int,
    num_samples: int,
    peak: PeakPolicy,
) -> _Encoding:
    """Checks the arguments of `write_audio`, and returns the encoding that they ask for.

    Raises:
        EarVAEError: As `write_audio`.
    """
    name = name_of(destination)
    rate = integer(sample_rate)
    if rate is None or rate < 1:
        raise EarVAEError(f"{name}: the sample rate must be a positive integer in Hz, got {sample_rate!r}")
    if integer(channels) not in (1, 2):
        raise EarVAEError(f"{name}: channels must be 1 or 2, got {channels!r}")
    if peak not in get_args(PeakPolicy):
        raise EarVAEError(f"{name}: peak must be keep, scale or clip, got {peak!r}")
    kind = (format or (Path(name).suffix[1:] if isinstance(destination, (str, os.PathLike)) else "")).lower()
    kind = {"aif": "aiff", "oga": "ogg"}.get(kind, kind)
    if kind not in WRITTEN_FORMATS:
        raise EarVAEError(f"{name}: cannot write format {kind!r}; choose one of {', '.join(WRITTEN_FORMATS)}")
    container, default = WRITTEN_FORMATS[kind]
    chosen = (subtype or default).upper()
    if container == "RF64" and channels * num_samples * 8 < _RIFF_BYTES:
        container = "WAV"
    offered = [subtype for subtype in soundfile.available_subtypes(container) if subtype in _SUBTYPES]
    if chosen not in offered:
        choices = ", ".join(offered)
        raise EarVAEError(f"{name}: {kind} cannot hold subtype {chosen!r}; choose one of {choices}")
    return _Encoding(name, container, chosen, rate, int(channels), peak)


def _unwritten(name: str, error: OSError) -> EarVAEError:
    return EarVAEError(f"{name}: could not be written: {error.strerror or error}")


def _finite_peak(block: Tensor, name: str) -> float:
    """Returns the highest absolute sample.

    Raises:
        EarVAEError: A sample is NaN or infinite.
    """
    highest = float(block.abs().max())
    if not math.isfinite(highest):
        raise EarVAEError(f"{name}: the audio to write holds NaN or infinite samples; nothing was written")
    return highest


class _Sink:
    """What libsndfile writes to: it is never told that a file takes no more.

    At the end of a flac, ogg or mp3 file it keeps silent about that, and in ogg it may crash.

    Attributes:
        error: Why the file takes no more; None as long as it does.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = self._size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of it, or what it can up to the first error."""
        if self.error is None:
            try:
                self._file.seek(self._position)
                write_all(self._file, data)
            except OSError as error:
                self.error = error
        self._position += len(data)
        self._size = max(self._size, self._position)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position, as `io.IOBase.seek`."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """Returns the position, in bytes."""
        return self._position


class _Encoder:
    """libsndfile, writing.

    It is called in a thread of its own: from there it calls back to write, and an exception that a signal
    raised on the way, such as KeyboardInterrupt, would be lost. Signals reach the main thread only.
    """

    def __init__(self, file: IO[bytes], encoding: _Encoding) -> None:
        self._sink, self._encoding = _Sink(file), encoding
        self._thread = ThreadPoolExecutor(1, "ear-vae-libsndfile")

    def __enter__(self) -> _Encoder:
        encoding = self._encoding
        try:
            self._file: Any = self._call(
                lambda: soundfile.SoundFile(
                    self._sink,
                    "w",
                    encoding.sample_rate,
                    encoding.channels,
                    subtype=encoding.subtype,
                    format=encoding.container,
                )
            )
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After an error the rest of the file does not matter, but libsndfile's memory does.
            self._call(self._file.close)
        except EarVAEError:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()

    def write(self, samples: Any) -> None:
        """Writes samples [T, C].

        Raises:
            EarVAEError: They cannot be written.
        """
        self._call(lambda: self._file.write(samples))

    def _call(self, function: Callable[[], _T]) -> _T:
        encoding = self._encoding
        try:
            result = self._thread.submit(function).result()
        except (soundfile.LibsndfileError, AssertionError) as error:
            if self._sink.error is None:
                kind = {"RF64": "wav"}.get(encoding.container, encoding.container.lower())
                why = str(getattr(error, "error_string", error)).strip().removeprefix("Error : ")
                raise EarVAEError(
                    f"{encoding.name}: cannot write {kind} at {encoding.sample_rate} Hz: {why} "
                    "Choose another format or resample first."
                ) from error
        if self._sink.error is not None:
            raise _unwritten(encoding.name, self._sink.error)
        return result


def _write(
    destination: str | os.PathLike[str] | IO[bytes],
    blocks: Iterable[Tensor],
    encoding: _Encoding,
    *,
    gain: float,
    overwrite: bool,
) -> float:
    """Writes the blocks and returns their peak before the gain."""
    name, highest = encoding.name, 0.0

    def write(target: IO[bytes]) -> None:
        nonlocal highest
        with _Encoder(target, encoding) as encoder:
            for block in blocks:
                highest = max(highest, _finite_peak(block, name))
                scaled = block.detach().float().cpu() * gain
                encoder.write((scaled.clamp(-1, 1) if encoding.limits else scaled).T.contiguous().numpy())

    try:
        if isinstance(destination, (str, os.PathLike)):
            with atomic_path(destination, overwrite) as temporary, temporary.open("xb", buffering=0) as file:
                write(file)
        else:
            buffer = io.BytesIO()
            write(buffer)
            write_all(destination, buffer.getbuffer())
    except OSError as error:
        raise _unwritten(name, error) from error
    if highest > 1 and encoding.bounded and encoding.peak == "keep":
        warnings.warn(
            f"{name}: peaks reach {20 * math.log10(highest):+.2f} dBFS and are cut off in this format; write "
            "float wav, or set peak (--peak) to scale, which lowers the whole file, or to clip, which cuts "
            "them off without this warning",
            PeakWarning,
            stacklevel=3,
        )
    return highest
