"""Where the streams of an mp3, Ogg, flac, wav or aiff file begin and end, whatever its headers say.

A file may hold several streams one after the other, or a header that understates its length. Decoders trust
the first header and stop where it says. Here the frames and pages themselves are followed, so that each
stream can be passed to libsndfile as a file of its own, with a correct header.
"""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

_CHUNK = 2**16
_LARGE_CHUNK = 2**20

_MP3_KILOBITS = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = (44_100, 48_000, 32_000)
# Some encoders count the frame that holds the count, or one that they never wrote.
MISSING_MP3_FRAMES = 3
_MP3_DECODER_DELAY = 529
# Of a frame's header: version and layer, then the sample rate; what stays the same within a stream.
_MP3_CONSTANT = (0x1E, 0x0C)
_MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")
_OGG_PAGE, _FLAC_MARK = re.compile(b"OggS"), re.compile(b"fLaC")
_LONGEST_PATTERN = 4
_CHUNK_NAME = re.compile(rb"[ -~]{4}")
# What begins a file of another kind that somebody put behind the audio.
_BEGINNINGS = re.compile(b"RIFF|RF64|FORM|fLaC|OggS")
_VORBIS_HEADERS = 3
# The last of them takes some kilobytes; of longer ones, with pictures, nothing is needed.
_LONGEST_VORBIS_HEADER, _MOST_VORBIS_MODES = 2**20, 64
_FIRST_OGG_PAGE = b"OggS\0\x02" + bytes(8)
_CAF_HEADER_SIZE, _CAF_CHUNK_HEADER_SIZE = 8, 12
# Of its header and its footer alike.
_APE_HEADER_SIZE = 32
_SHORTEST_AU_HEADER = 24

_FLAC_INFO_SIZE = 34
_FLAC_MARKERS = tuple(b"fLaC" + last + b"\0\0\x22" for last in (b"\0", b"\x80"))
# More than any frame of two channels: 65 535 samples of 32 bits in each.
_LARGEST_FLAC_FRAME = 2**20
# What looks like a frame and is none comes once in eight million bytes, unless somebody made it so.
_MOST_FLAC_FRAMES_TRIED = 16


@dataclass(frozen=True)
class Part:
    """One stream in a file.

    Attributes:
        extents: Ranges of bytes of the file that belong to it, as (start, end).
        head: Corrected header, which replaces the first bytes or precedes them.
        tail: Number of samples at the end in which libsndfile cannot seek.
        seekable: Whether the pages state the positions that their samples have, by which libsndfile seeks.
    """

    extents: tuple[tuple[int, int], ...]
    head: bytes = b""
    tail: int = 0
    seekable: bool = True


@dataclass(frozen=True)
class Layout:
    """The streams in a file.

    Attributes:
        parts: Streams in their order; None where libsndfile reads the file as it is.
        remark: What is odd about the file, though all of it can be read.
        cut: How it shows that one of the streams is cut off; empty where none is.
    """

    parts: tuple[Part, ...] | None = None
    remark: str = ""
    cut: str = ""


class Bytes:
    """Random access to the bytes of a stream through one buffer."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._start, self._chunk = 0, b""
        self.size = stream.seek(0, os.SEEK_END)

    def at(self, position: int, size: int) -> bytes:
        """Returns up to `size` bytes from a position, fewer at the end of the stream, and none past it."""
        if position >= self.size:
            return b""
        offset = position - self._start
        ends = offset + size <= len(self._chunk) or self._start + len(self._chunk) == self.size
        if offset < 0 or not ends:
            self._load(position, max(size, _CHUNK))
            offset = 0
        return self._chunk[offset : offset + size]

    def find(self, pattern: re.Pattern[bytes], position: int) -> int:
        """Returns where a pattern of up to four bytes occurs next, from `position` on; -1 if nowhere."""
        while position < self.size:
            # First what has been read already: where matches are dense, that is all it takes.
            if not self._start <= position <= self._start + len(self._chunk) - _LONGEST_PATTERN:
                self._load(position, _LARGE_CHUNK)
            if found := pattern.search(self._chunk, position - self._start):
                return self._start + found.start()
            end = self._start + len(self._chunk)
            if end >= self.size or not self._chunk:
                break
            position = end - _LONGEST_PATTERN + 1
        return -1

    def _load(self, position: int, size: int) -> None:
        self._stream.seek(position)
        self._start, self._chunk = position, self._stream.read(size)


class PartReader(io.RawIOBase):
    """Makes a part of a stream a file to read and seek in."""

    def __init__(self, stream: IO[bytes], part: Part) -> None:
        super().__init__()
        self._stream, self._head, self._extents = stream, part.head, part.extents
        # Where the head and then each extent begin.
        self._begins = [0, len(part.head)]
        for start, end in part.extents:
            self._begins.append(self._begins[-1] + end - start)
        self._position = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position, as `io.IOBase.seek`."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._begins[-1]}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, and returns how many bytes there were."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self._begins[-1]:
            index = bisect_right(self._begins, self._position) - 1
            offset = self._position - self._begins[index]
            size = min(len(view) - filled, self._begins[index + 1] - self._position)
            if index == 0:
                data = self._head[offset : offset + size]
            else:
                self._stream.seek(self._extents[index - 1][0] + offset)
                data = self._stream.read(size)
            if not data:
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
        return filled


def kind_of(data: Bytes) -> str:
    """Returns the kind of a file, if it is one that `layout_of` knows; else an empty text."""
    head = data.at(after_tags(data, 0), 4)
    if head == b"fLaC":
        return "flac"
    if head == b"OggS":
        return "ogg"
    if data.at(0, 4) == b"caff":
        return "caf"
    if _chunks_end(data, 0):
        return "chunks"
    return "mp3" if _is_mp3_frame(data, after_tags(data, 0)) else ""


def layout_of(kind: str, data: Bytes) -> Layout | None:
    """Finds the streams in a file of that kind; None where they cannot be told apart."""
    return {
        "flac": flac_layout,
        "ogg": ogg_layout,
        "caf": caf_layout,
        "chunks": chunks_layout,
        "mp3": mp3_layout,
    }[kind](data)


def _other_format(kind: str, data: Bytes, position: int) -> str:
    """Says how much of a file of another format lies behind flac, Ogg or mp3; empty where none does.

    Args:
        kind: What lies in front.
        data: The file.
        position: Where that ends, as far as is known.
    """
    while (position := data.find(_BEGINNINGS, position)) >= 0:
        head = data.at(position, 16)
        if (
            (kind != "flac" and head[:8] in _FLAC_MARKERS)
            or (kind != "ogg" and head[: len(_FIRST_OGG_PAGE)] == _FIRST_OGG_PAGE)
            or _chunks_end(data, position)
        ):
            return f"{data.size - position} bytes of another format follow the audio, and were left out"
        position += 1
    return ""


def after_tags(data: Bytes, position: int) -> int:
    """Finds the first byte after tags: ID3v2, which precede audio, and ID3v1 and APE, which follow it."""
    while True:
        tag = data.at(position, _APE_HEADER_SIZE)
        if tag[:3] == b"ID3" and len(tag) >= 10:
            size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=True))
            position += 10 + size + (10 if tag[5] & 0x10 else 0)
        elif tag[:3] == b"TAG":
            position += 128
        elif tag[:8] == b"APETAGEX" and len(tag) == _APE_HEADER_SIZE:
            # The size is that of items and footer, to which a header adds its own.
            size = max(int.from_bytes(tag[12:16], "little"), _APE_HEADER_SIZE)
            position += size + (_APE_HEADER_SIZE if tag[23] & 0x20 else 0)
        else:
            return min(position, data.size)


def chunks_layout(data: Bytes) -> Layout:
    """Finds the streams of wav, aiff and au, whose header says where the file ends and another may begin."""
    starts = [0]
    while (end := _chunks_end(data, starts[-1])) and _chunks_end(data, end):
        starts.append(end)
    if len(starts) == 1:
        return _single_container(data)
    return Layout(tuple(Part((extent,)) for extent in _between(starts, data.size)))


def _single_container(data: Bytes) -> Layout:
    """Of a file whose header may state less than there is, as where a recorder was interrupted."""
    start, end = _chunk_audio(data)
    is_aiff = data.at(0, 4) == b"FORM"
    position = end
    # Other chunks may follow, and tags.
    while _CHUNK_NAME.match(head := data.at(position, 8)):
        size = int.from_bytes(head[4:8], "big" if is_aiff else "little")
        if position + 8 + size > data.size:
            break
        position += 8 + _even(size)
    rest = data.size - after_tags(data, position)
    if not end or rest <= 0 or (rest <= _CHUNK and not any(data.at(data.size - rest, rest))):
        return Layout()
    if start == end:
        if is_aiff:  # of which libsndfile reads what is there
            return Layout()
        return Layout(cut=f"its header, which was never completed, states no audio, but {rest} bytes follow")
    return Layout(remark=f"{rest} bytes follow the audio that its header states, and were left out")


def _chunk_audio(data: Bytes) -> tuple[int, int]:
    """Where the audio of wav, aiff or au begins and ends by the header; zeros where that has none."""
    kind = data.at(0, 4)
    if kind == b".snd":
        start, size = (int.from_bytes(data.at(at, 4), "big") for at in (4, 8))
        return start, start + size
    order: Literal["big", "little"] = "big" if kind == b"FORM" else "little"
    position = 12
    while len(head := data.at(position, 8)) == 8:
        size = int.from_bytes(head[4:8], order)
        if head[:4] in (b"data", b"SSND"):
            if kind == b"RF64" and size == 2**32 - 1:
                size = int.from_bytes(data.at(28, 8), "little")
            return position + 8, position + 8 + _even(size)
        position += 8 + _even(size)
    return 0, 0


def caf_layout(data: Bytes) -> Layout:
    """Finds the audio of a CAF file, whose header need not say how much there is (Apple's specification)."""
    position = _CAF_HEADER_SIZE
    while len(head := data.at(position, _CAF_CHUNK_HEADER_SIZE)) == _CAF_CHUNK_HEADER_SIZE:
        size = int.from_bytes(head[4:], "big", signed=True)
        start = position + _CAF_CHUNK_HEADER_SIZE
        if head[:4] == b"data" and size == -1:
            # As a program leaves it that writes to a pipe: the rest of the file.
            known = data.at(0, position) + b"data" + (data.size - start).to_bytes(8, "big")
            return Layout((Part(((start, data.size),), known),))
        if head[:4] == b"data" and start + size > data.size:
            return Layout(cut=f"its header states {size} bytes of audio, {data.size - start} are there")
        if size < 0:
            break
        position = start + size
    return Layout()


def _even(size: int) -> int:
    """The size of a chunk in its file, where the next one begins at an even place."""
    return size + size % 2


def _chunks_end(data: Bytes, start: int) -> int:
    """Returns where the container that begins at `start` ends; 0 where none begins there."""
    head = data.at(start, 28)
    kind, form = head[:4], head[8:12]
    if len(head) < 28:
        return 0
    if kind == b"RIFF" and form == b"WAVE":
        size = 8 + int.from_bytes(head[4:8], "little")
    elif kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        size = 8 + int.from_bytes(head[4:8], "big")
    elif kind == b"RF64" and form == b"WAVE":
        size = 8 + int.from_bytes(head[20:28], "little")
    elif kind == b".snd" and int.from_bytes(head[4:8], "big") >= _SHORTEST_AU_HEADER:
        return start + int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")
    else:
        return 0
    return start + _even(size)


def _between(starts: list[int], end: int) -> Iterator[tuple[int, int]]:
    return zip(starts, [*starts[1:], end], strict=True)


def ogg_layout(data: Bytes) -> Layout:
    """Finds the links of a chain, which begin with pages flagged as first (RFC 3533, section 4).

    Whether the file is whole shows in its last page: a cut one hardly ever ends with a complete page. The
    end-of-stream mark is no help, as many encoders do not write it.

    Where Vorbis was cut without being encoded again, or an encoder has miscounted, the positions that the
    pages state are not those of their samples, of which one finds out by counting.
    """
    starts: list[int] = []
    # Of each link, the positions in samples at the ends of its pages, as stated and as counted.
    positions: list[list[int]] = []
    counted: list[list[int]] = []
    count = _VorbisCount()
    position, whole, in_beginning, cut, odd = 0, False, False, False, ""
    while position < data.size:
        page = data.at(position, 282)
        if page[:4] != b"OggS":
            # Lost pages, tags, or the start of one more page.
            found = data.find(_OGG_PAGE, position)
            if found < 0:
                whole = whole and not b"OggS".startswith(data.at(position, 4))
                odd = _other_format("ogg", data, position)
                break
            position = found
            continue
        begins = len(page) > 5 and bool(page[5] & 2)
        if begins and not in_beginning:
            starts.append(position)
            positions.append([])
            counted.append([])
            count = _VorbisCount()
        in_beginning = begins
        num_segments = page[26] if len(page) > 26 else 255
        lacing = page[27 : 27 + num_segments]
        end = position + 27 + num_segments + sum(lacing)
        granule = int.from_bytes(page[6:14], "little", signed=True)
        if count.samples is not None:
            count.add(lacing, data.at(end - sum(lacing), sum(lacing)))
        if positions and granule >= 0:
            positions[-1].append(granule)
            counted[-1].append(granule if count.samples is None else count.samples)
        whole = len(page) > 26 and len(lacing) == num_segments and end <= data.size
        if data.at(end, 4) != b"OggS":
            # A link that was cut before the next one was put behind it.
            inside = data.find(_OGG_PAGE, position + 4)
            if 0 <= inside < end:
                cut = cut or bool(data.at(inside, 6)[5:] and data.at(inside, 6)[5] & 2)
                end = inside
        position = end
    if not whole or cut:
        return Layout(cut="the last page of the ogg stream is cut off")
    # The last page is cut to the samples that there were, by which libsndfile misses its place in it.
    tails = [ends[-1] - ends[-2] if len(ends) > 1 else 0 for ends in positions]
    extents = _between(starts, data.size)
    seekable = [
        ends[:-1] == found[:-1] and ends[-1:] <= found[-1:]
        for ends, found in zip(positions, counted, strict=True)
    ]
    parts = tuple(
        Part((extent,), tail=tail, seekable=seeks)
        for extent, tail, seeks in zip(extents, tails, seekable, strict=True)
    )
    return Layout(parts, odd)


class _VorbisCount:
    """Counts the samples of a Vorbis stream by the sizes of its blocks (Vorbis I specification, section 4).

    Attributes:
        samples: Samples that the packets so far give; None where the stream is of another codec.
    """

    def __init__(self) -> None:
        self.samples: int | None = 0
        self._headers: list[bytes] = []
        self._packet = b""
        # Of each mode, the size of its blocks.
        self._sizes: list[int] = []
        self._previous = 0

    def add(self, lacing: bytes, body: bytes) -> None:
        """Takes what a page holds, with the sizes of its segments; packets may go on in the next page."""
        start = 0
        for size in lacing:
            # Of audio, the first byte of a packet tells its mode.
            longest = 1 if len(self._headers) == _VORBIS_HEADERS else _LONGEST_VORBIS_HEADER
            if len(self._packet) < longest:
                self._packet += body[start : start + size]
            start += size
            if size < 255:
                self._end_packet()

    def _end_packet(self) -> None:
        packet, self._packet = self._packet, b""
        if self.samples is None or not packet:
            return
        if len(self._headers) < _VORBIS_HEADERS:
            self._headers.append(packet)
            if packet[1:7] != b"vorbis":
                self.samples = None
            elif len(self._headers) == _VORBIS_HEADERS:
                # Of a header that was cut, none.
                for exponents in self._headers[0][28:29]:
                    short, long = 1 << (exponents & 15), 1 << (exponents >> 4)
                    self._sizes = [long if is_long else short for is_long in _long_modes(packet)]
            return
        mode = packet[0] >> 1 & ((1 << (len(self._sizes) - 1).bit_length()) - 1)
        size = self._sizes[mode] if mode < len(self._sizes) else 0
        if self._previous:
            self.samples += (self._previous + size) // 4
        self._previous = size


def _long_modes(setup: bytes) -> list[bool]:
    """Whether the blocks of each mode are long ones, from the end of the header that lists them.

    What stands before the modes tells its own length only by being read from the beginning. A mode has 41
    bits, 32 of which are 0; their number stands before them, and a set bit behind them.
    """
    bits = int.from_bytes(setup, "little")
    position = bits.bit_length() - 1
    modes: list[bool] = []
    found: list[bool] = []
    while position >= 41 + 6 and len(modes) < _MOST_VORBIS_MODES:
        position -= 41
        mode = bits >> position
        # Block flag, window type, transform type, mapping.
        if mode >> 1 & (2**32 - 1) or mode >> 33 & 255 > 63:
            break
        modes.insert(0, bool(mode & 1))
        if (bits >> (position - 6) & 63) + 1 == len(modes):
            found = list(modes)
    return found


@dataclass
class _Mp3Stream:
    """Frames as they were found: a header frame, if there is one, and what follows it."""

    header: bytes
    first: bytes
    extents: list[tuple[int, int]]
    num_frames: int = 0


def mp3_layout(data: Bytes) -> Layout | None:
    """Finds the streams of an mp3 by all its frames; None where there are none of layer III."""
    streams: list[_Mp3Stream] = []
    strange, gap = 0, -1
    position = after_tags(data, 0)
    constant: tuple[int, ...] | None = None
    while (start := _next_mp3_frame(data, position)) >= 0:
        head = data.at(start, 4)
        if streams and start > position:
            strange += start - position
            gap = position if gap < 0 else gap
        if _constant(head) != constant:
            constant = _constant(head)
            streams.append(_Mp3Stream(b"", head, []))
        position = extent = last = start
        while (frame := _mp3_frame(head)) and _constant(head) == constant:
            if position + frame[0] > data.size:
                break
            if _tag_offset(data.at(position, 48)):
                _add(streams[-1].extents, extent, position)
                streams.append(_Mp3Stream(data.at(position, frame[0]), head, []))
                extent = position + frame[0]
            else:
                streams[-1].num_frames += 1
            last = position
            position += frame[0]
            head = data.at(position, 4)
        if extent <= last < position < data.size and after_tags(data, position) == position:
            # Nothing that follows a frame: it may have been cut, and the next one begin within it.
            within = _next_mp3_frame(data, last + 1)
            if 0 <= within < position:
                streams[-1].num_frames -= 1
                position = last
        _add(streams[-1].extents, extent, position)
        position = after_tags(data, position) if position > last else last + 1
    streams = [stream for stream in streams if stream.num_frames or stream.header]
    if not streams:
        return None
    parts, odd = [], ""
    for stream in streams:
        head, stated = _true_header(stream)
        parts.append(Part(tuple(stream.extents), head))
        if stated is not None and stream.num_frames > stated + MISSING_MP3_FRAMES:
            odd = f"its header states {stated} frames, {stream.num_frames} are there; all of them are read"
    odd = odd or _other_format("mp3", data, position if gap < 0 else gap)
    if strange:
        odd = odd or f"{strange} bytes between its frames are not audio and were left out"
    as_it_is = len(streams) == 1 and streams[0].header == parts[0].head and len(parts[0].extents) == 1
    return Layout(None if as_it_is else tuple(parts), odd)


def _add(extents: list[tuple[int, int]], start: int, end: int) -> None:
    if end > start:
        extents.append((start, end))


def _constant(head: bytes) -> tuple[int, ...]:
    # And whether there is one channel.
    return (*(byte & mask for byte, mask in zip(head[1:3], _MP3_CONSTANT, strict=True)), head[3] >> 6 == 3)


def _next_mp3_frame(data: Bytes, position: int) -> int:
    """Returns where the next frame begins that another one or the end of the file follows; -1 if nowhere."""
    while (position := data.find(_MP3_SYNC, position)) >= 0 and not _is_mp3_frame(data, position):
        position += 1
    return position


def _is_mp3_frame(data: Bytes, position: int) -> bool:
    """Returns whether a frame begins there that another one, a tag or the end of the file follows."""
    frame = _mp3_frame(head := data.at(position, 4))
    if frame is None:
        return False
    end = position + frame[0]
    following = data.at(end, 4)
    return (
        end == data.size
        or (_mp3_frame(following) is not None and _constant(following) == _constant(head))
        or after_tags(data, end) > end
    )


def _mp3_frame(header: bytes) -> tuple[int, int] | None:
    """Returns the bytes and samples of the layer III frame with this header; None for another header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    # 3 is MPEG 1, 2 is MPEG 2 at half its rates, 0 is MPEG 2.5 at a quarter of them.
    version = header[1] >> 3 & 3
    bit_rate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return None
    kilobits = _MP3_KILOBITS[1 if version == 3 else 2][bit_rate - 1]
    samples = 1152 if version == 3 else 576
    sample_rate = _MP3_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    return samples * kilobits * 125 // sample_rate + (header[2] >> 1 & 1), samples


def _tag_offset(frame: bytes) -> int:
    """Returns where a frame that holds only the length has its tag; 0 for a frame of audio."""
    if frame[36:40] == b"VBRI":
        return 36
    # Behind the side information, and the checksum if there is one and the encoder has left room for it.
    offset = _side_information_end(frame)
    return next((at for at in (offset, offset + 2) if frame[at : at + 4] in (b"Xing", b"Info")), 0)


def _side_information_end(header: bytes) -> int:
    mono, first_version = header[3] >> 6 == 3, header[1] >> 3 & 3 == 3
    return 4 + ((17 if mono else 32) if first_version else (9 if mono else 17))


def _true_header(stream: _Mp3Stream) -> tuple[bytes, int | None]:
    """Makes a header frame with the true number of frames; also returns the number in the file's own header.

    Like the file's own header it says how many samples to leave out at both ends, but those at the end only
    where the file ends as that header says.
    """
    header = bytearray(stream.header)
    offset = _tag_offset(stream.header) if header else 0
    is_xing = stream.header[offset : offset + 4] in (b"Xing", b"Info")
    flags = header[offset + 7] if is_xing else 0
    if not flags & 1:
        return _made_header(stream), None
    size = sum(end - start for start, end in stream.extents)
    stated = int.from_bytes(header[offset + 8 : offset + 12], "big")
    missing = stated - stream.num_frames
    if missing > MISSING_MP3_FRAMES:
        # It is cut, which will show when it is read.
        return bytes(header), stated
    header[offset + 8 : offset + 12] = stream.num_frames.to_bytes(4, "big")
    after = offset + 12
    if flags & 2:
        header[after : after + 4] = ((len(header) + size) % 2**32).to_bytes(4, "big")
        after += 4
    after += (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    delays = int.from_bytes(header[after + 21 : after + 24], "big")
    frame = _mp3_frame(stream.first)
    if missing and frame and len(header) >= after + 24:
        padding = max(0, (delays & 0xFFF) - missing * frame[1]) if missing > 0 else 0
        header[after + 21 : after + 24] = (delays & 0xFFF000 | padding).to_bytes(3, "big")
    return bytes(header), stated


def _made_header(stream: _Mp3Stream) -> bytes:
    """Makes a header frame with the number of frames, and a silent frame that decoders leave out again.

    After a header frame, decoders leave out the encoder's delay, if it states one, and always their own. So
    that nothing is lost, both together are made as long as the silent frame.
    """
    second, third, fourth = stream.first[1] | 1, stream.first[2] & 0x0C, stream.first[3]
    offset = _side_information_end(stream.first)
    heads = [bytes([0xFF, second, bit_rate << 4 | third, fourth]) for bit_rate in range(1, 15)]
    frames = [(head, *frame) for head in heads if (frame := _mp3_frame(head))]
    head, size, num_samples = next(frame for frame in frames if frame[1] >= offset + 36)
    tag = b"Xing\0\0\0\x01" + (stream.num_frames + 1).to_bytes(4, "big")
    delay = b"LAME".ljust(21, b"\0") + (num_samples - _MP3_DECODER_DELAY << 12).to_bytes(3, "big")
    return (head.ljust(offset, b"\0") + tag + delay).ljust(size, b"\0") + head.ljust(size, b"\0")


def flac_layout(data: Bytes) -> Layout | None:
    """Finds the flac files in a file by the marks that they begin with, and their lengths by the last frame.

    A header without a length is given one. None where the last frame is not found.
    """
    starts = [after_tags(data, 0)]
    while (found := _next_flac(data, _flac_audio(data, starts[-1]))) >= 0:
        starts.append(found)
    parts, odd, as_they_are, present = [], "", len(starts) == 1, None
    for start, end in _between(starts, data.size):
        head = data.at(start, 8 + _FLAC_INFO_SIZE)
        info = int.from_bytes(head[18:26], "big")
        stated = info & (2**36 - 1)
        present = _flac_samples(data, start, end, head)
        if present is None and not stated:
            return None
        if present is not None and present > stated:
            as_they_are = False
            if stated:
                odd = f"its header states {stated} samples, {present} are there; all of them are read"
            # The checksum is of all samples, and may have been right.
            head = head[:18] + (info - stated + present).to_bytes(8, "big") + head[26:]
        parts.append(Part(((start + len(head), end),), head))
    if present is None:
        odd = odd or _other_format("flac", data, _flac_audio(data, starts[-1]))
    return Layout(None if as_they_are else tuple(parts), odd)


def _flac_audio(data: Bytes, start: int) -> int:
    """Returns where the frames of the file that begins at `start` begin."""
    position = start + 4
    while len(block := data.at(position, 4)) == 4:
        position += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            break
    return position


def _next_flac(data: Bytes, position: int) -> int:
    while (position := data.find(_FLAC_MARK, position)) >= 0:
        if data.at(position, 8) in _FLAC_MARKERS:
            return position
        position += 1
    return -1


def _flac_samples(data: Bytes, start: int, end: int, head: bytes) -> int | None:
    """Counts samples by the last frame; None if no frame ends where the file does."""
    largest = min(int.from_bytes(head[15:18], "big") or _LARGEST_FLAC_FRAME, _LARGEST_FLAC_FRAME)
    if data.at(end - 128, 3) == b"TAG":
        end -= 128
    first = max(_flac_audio(data, start), end - largest)
    tail = data.at(first, end - first) if end > first else b""
    offset, tried = len(tail), 0
    while (offset := tail.rfind(b"\xff", 0, offset)) >= 0 and tried < _MOST_FLAC_FRAMES_TRIED:
        frame = _flac_frame(tail[offset : offset + 16], int.from_bytes(head[10:12], "big"))
        if frame is None:
            continue
        if _crc(tail[offset:], _CRC16, 16) == 0:
            return sum(frame)
        tried += 1
    return None


def _flac_frame(head: bytes, block_size: int) -> tuple[int, int] | None:
    """Returns the number of a frame's first sample, and how many it has (RFC 9639, section 9.1)."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    block_code, rate_code = head[2] >> 4, head[2] & 0x0F
    ones = 8 - (head[4] ^ 0xFF).bit_length()
    if block_code == 0 or rate_code == 15 or ones in (1, 8):
        return None
    after = 5 + max(0, ones - 1)
    number = head[4] & (0x7F >> ones)
    for byte in head[5:after]:
        number = number << 6 | byte & 0x3F
    if block_code in (6, 7):
        size = block_code - 5
        samples = 1 + int.from_bytes(head[after : after + size], "big")
        after += size
    elif block_code == 1:
        samples = 192
    else:
        samples = 576 << block_code - 2 if block_code < 6 else 256 << block_code - 8
    after += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if len(head) <= after or _crc(head[:after], _CRC8, 8) != head[after]:
        return None
    return (number if head[1] & 1 else number * block_size), samples


def _crc_table(polynomial: int, bits: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return tuple(table)


_CRC8, _CRC16 = _crc_table(0x07, 8), _crc_table(0x8005, 16)


def _crc(data: bytes, table: tuple[int, ...], bits: int) -> int:
    value, mask, shift = 0, (1 << bits) - 1, bits - 8
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> shift ^ byte]
    return value
