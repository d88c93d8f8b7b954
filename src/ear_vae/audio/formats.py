"""Names of audio formats, without the libraries that read and write them."""

from __future__ import annotations

# What libsndfile reads, and what takes ffmpeg.
AUDIO_EXTENSIONS = frozenset(
    f".{extension}"
    for extension in (
        *("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "caf", "w64", "rf64"),
        *("m4a", "aac", "wma", "mp4", "m4v", "mov", "mkv", "mka", "webm", "avi", "ac3", "ape", "wv", "mp2"),
    )
)

# The formats that are written, by extension: libsndfile's container and the subtype by default.
WRITTEN_FORMATS = {
    "wav": ("RF64", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_24"),
}
