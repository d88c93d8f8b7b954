"""How large files that ffmpeg reads say they are.

Of cut ones it decodes what is left without a word; in other containers, such as mp4, it notices by itself.
"""

from __future__ import annotations

from ear_vae.audio.stream_layout import Bytes

_EBML, _SEGMENT, _VOID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\xec"
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_OBJECT_SIZE = 24
# Of no file so many.
_MOST_ELEMENTS = 1000


def stated_size(data: Bytes) -> int | None:
    """Bytes of a Matroska, WebM or ASF (wma) file, as its header states them; None where none does."""
    if data.at(0, 4) == _EBML:
        return _matroska_size(data)
    if data.at(0, 16) == _ASF_HEADER:
        return _asf_size(data)
    return None


def _matroska_size(data: Bytes) -> int | None:
    """The end of the segment, which is the rest of the file (RFC 8794, section 6; RFC 9559, section 5.1)."""
    position = 0
    for _ in range(_MOST_ELEMENTS):
        head = data.at(position, 12)
        identifier = next((known for known in (_EBML, _SEGMENT, _VOID) if head.startswith(known)), None)
        if identifier is None:
            return None
        length = 9 - (head[len(identifier) :] + b"\0")[0].bit_length()
        field = head[len(identifier) :][:length]
        if length > 8 or len(field) < length:
            return None
        bits = 7 * length
        size = int.from_bytes(field, "big") & (1 << bits) - 1
        position += len(identifier) + length + size
        if identifier == _SEGMENT:
            # All ones are written where the size is not known, as by a program that writes to a pipe.
            return None if size == (1 << bits) - 1 else position
    return None


def _asf_size(data: Bytes) -> int | None:
    """The size in the file properties (Advanced Systems Format specification, section 3.2)."""
    position = 30
    for _ in range(_MOST_ELEMENTS):
        head = data.at(position, 92)
        size = int.from_bytes(head[16:24], "little")
        if size < _ASF_OBJECT_SIZE:
            return None
        if head.startswith(_ASF_FILE_PROPERTIES):
            is_live = bool(int.from_bytes(head[88:92], "little") & 1)
            return None if is_live else int.from_bytes(head[40:48], "little")
        position += size
    return None
