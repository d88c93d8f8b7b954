"""Audio files to tensors and back."""

from ear_vae.audio.decoding import AudioFileWarning
from ear_vae.audio.formats import AUDIO_EXTENSIONS
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
