"""Audio files to tensors and back.

The exports are loaded on first use, so that the command line can name the formats without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ear_vae.audio.formats import AUDIO_EXTENSIONS

if TYPE_CHECKING:
    from ear_vae.audio.decoding import AudioFileWarning
    from ear_vae.audio.reading import AudioInfo, audio_info, find_audio_files, read_audio, stream_audio
    from ear_vae.audio.writing import PeakPolicy, PeakWarning, write_audio, write_audio_stream
    from ear_vae.dsp.resampling import resample

__all__ = [
    "AUDIO_EXTENSIONS",
    "AudioFileWarning",
    "AudioInfo",
    "PeakPolicy",
    "PeakWarning",
    "audio_info",
    "find_audio_files",
    "read_audio",
    "resample",
    "stream_audio",
    "write_audio",
    "write_audio_stream",
]

_EXPORTS = {
    "ear_vae.audio.decoding": ("AudioFileWarning",),
    "ear_vae.audio.reading": ("AudioInfo", "audio_info", "find_audio_files", "read_audio", "stream_audio"),
    "ear_vae.audio.writing": ("PeakPolicy", "PeakWarning", "write_audio", "write_audio_stream"),
    "ear_vae.dsp.resampling": ("resample",),
}


def __getattr__(name: str) -> Any:
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'ear_vae.audio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
