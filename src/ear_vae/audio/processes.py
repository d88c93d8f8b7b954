"""A pool of processes that decode audio files ahead of their consumer; starting worker processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ear_vae.audio.decoding import AudioFileWarning
from ear_vae.audio.reading import AudioInfo, stream_audio
from ear_vae.audio.stream_layout import Part, PartReader
from ear_vae.dsp.resampling import resample_stream
from ear_vae.errors import EarVAEError, in_one_line

_HASHED_AT_ONCE = 2**20
# Of what the resampler or libsndfile gives in one piece, so that a pipe never holds more of a file.
_MOST_BLOCK_SAMPLES = 2**20


@dataclass(frozen=True)
class AudioLocation:
    """Where the bytes of an audio file lie.

    Attributes:
        path: Path of the file, or of the file that it is a part of, such as a tar.
        span: First byte of the part and the number of its bytes; None for the file as a whole.
    """

    path: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class AudioBlock:
    """The next samples of a file.

    Attributes:
        index: Number of the file.
        audio: [C, T] in float32.
    """

    index: int
    audio: Tensor


@dataclass(frozen=True)
class AudioEnd:
    """All samples of a file have come.

    Attributes:
        index: Number of the file.
        info: Facts of its header.
        num_samples: Samples per channel that it held, at its own rate.
        sha256: Hash of its bytes.
    """

    index: int
    info: AudioInfo
    num_samples: int
    sha256: str


@dataclass(frozen=True)
class AudioFailure:
    """A file could not be read to its end.

    Attributes:
        index: Number of the file.
        reason: Why, without the path.
        sha256: Hash of its bytes, None where they could not be read.
    """

    index: int
    reason: str
    sha256: str | None


@dataclass(frozen=True)
class AudioRestart:
    """The process that decoded a file was lost, and it comes again from its beginning.

    Attributes:
        index: Number of the file.
    """

    index: int


AudioMessage = AudioBlock | AudioEnd | AudioFailure | AudioRestart


class AudioProcesses:
    """Decodes and resamples files in several processes, each of which works one block ahead.

    A process waits until its block is taken, so that what is held in memory does not grow with the files or
    their number. Where one dies, another begins anew with its file; a file that two have died of has failed.

    Args:
        count: Number of processes; with 0 files are decoded by the caller's, when it asks for them.
        sample_rate: Rate that the audio is resampled to, in Hz.
    """

    def __init__(self, count: int, sample_rate: int) -> None:
        self._count, self._sample_rate = count, sample_rate
        self._idle: list[_Decoder] = []
        self._busy: dict[Connection, _Decoder] = {}

    def __enter__(self) -> AudioProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for decoder in (*self._idle, *self._busy.values()):
            decoder.end()
        self._idle, self._busy = [], {}

    def read(self, locations: Iterable[AudioLocation]) -> Iterator[AudioMessage]:
        """Decodes files, as many at a time as there are processes; they begin in the order given.

        Args:
            locations: Where the files lie.

        Yields:
            Of each file its blocks, in their order, and then its end or its failure; those of files that are
            decoded at the same time come mixed.
        """
        numbered = enumerate(locations)
        if self._count == 0:
            for index, location in numbered:
                yield from _decoded(index, location, self._sample_rate)
            return
        try:
            while self._start_next(numbered) or self._busy:
                for connection in wait(list(self._busy)):
                    decoder = self._busy.pop(connection)  # type: ignore[call-overload]
                    message = decoder.receive()
                    if isinstance(message, AudioRestart):
                        decoder.start_again()
                    if isinstance(message, AudioEnd | AudioFailure):
                        self._idle.append(decoder)
                    else:
                        self._busy[decoder.connection] = decoder
                    yield message
        finally:
            # Those that were left in the middle of a file have more to say, which nobody wants to hear.
            for decoder in self._busy.values():
                decoder.end()
            self._busy = {}

    def _start_next(self, numbered: Iterator[tuple[int, AudioLocation]]) -> bool:
        """Gives the next files to processes that are idle; returns whether there were any."""
        started = False
        while len(self._busy) < self._count and (following := next(numbered, None)) is not None:
            decoder = self._idle.pop() if self._idle else _Decoder(self._sample_rate)
            decoder.start(*following)
            self._busy[decoder.connection] = decoder
            started = True
        return started


class _Decoder:
    """A process that decodes one file at a time, and is replaced when it dies."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._task: tuple[int, AudioLocation] | None = None
        self._deaths = 0
        self._spawn()

    def start(self, index: int, location: AudioLocation) -> None:
        """Begins with a file."""
        self._task, self._deaths = (index, location), 0
        self._send()

    def start_again(self) -> None:
        """Begins anew with the file of a process that has died."""
        self._spawn()
        self._send()

    def receive(self) -> AudioMessage:
        """Waits for what it says next."""
        assert self._task is not None
        index, _ = self._task
        try:
            message: AudioMessage | tuple[int, ...] = self.connection.recv()
            if not isinstance(message, tuple):
                return message
            block = np.frombuffer(bytearray(self.connection.recv_bytes()), dtype=np.float32)
            return AudioBlock(index, torch.from_numpy(block.reshape(message)))
        except (EOFError, OSError):
            self._deaths += 1
            self.end()
            if self._deaths == 1:
                return AudioRestart(index)
            reason = f"the process that decoded it ended with {self._process.exitcode}, twice"
            self._spawn()
            return AudioFailure(index, reason, None)

    def end(self) -> None:
        """Ends the process."""
        self.connection.close()
        self._process.terminate()
        self._process.join()

    def _spawn(self) -> None:
        # A fork of a process that has used torch can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # It ends with this process, however that ends.
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self._sample_rate), daemon=True
        )
        with current_folder_off_the_path():
            self._process.start()
        theirs.close()

    def _send(self) -> None:
        with suppress(OSError):  # it has died, which `receive` finds out
            self.connection.send(self._task)


def _serve(connection: Connection, sample_rate: int) -> None:
    """Decodes what is asked for until nobody asks any more."""
    prepare_process(1)
    try:
        while True:
            index, location = connection.recv()
            for message in _decoded(index, location, sample_rate):
                if isinstance(message, AudioBlock):
                    # Without pickling: through torch it would go by shared memory, of which containers have
                    # little.
                    block = np.ascontiguousarray(message.audio.numpy())
                    connection.send(block.shape)
                    connection.send_bytes(block.data.cast("B"))
                else:
                    connection.send(message)
    except (EOFError, OSError):
        pass  # Nobody is left to hear.


def _decoded(index: int, location: AudioLocation, sample_rate: int) -> Iterator[AudioMessage]:
    sha256 = None
    try:
        with _opened(location) as source, warnings.catch_warnings():
            # There are too many files for remarks on those that can be read.
            warnings.simplefilter("ignore", AudioFileWarning)
            sha256 = _sha256(source)
            source.seek(0)
            num_samples = 0
            # By its path where it has one, of which ffmpeg needs no copy.
            with stream_audio(location.path if location.span is None else source) as (info, blocks):

                def counted() -> Iterator[Tensor]:
                    nonlocal num_samples
                    for block in blocks:
                        num_samples += block.shape[-1]
                        yield block

                for resampled in resample_stream(counted(), info.sample_rate, sample_rate):
                    for block in resampled.split(_MOST_BLOCK_SAMPLES, dim=-1):
                        yield AudioBlock(index, block)
    # Decoders meet every kind of damage; whatever happens with one file, the others are decoded.
    except Exception as error:
        reason = in_one_line(error).removeprefix(f"{location.path}: ")
        yield AudioFailure(index, reason, sha256)
    else:
        yield AudioEnd(index, info, num_samples, sha256)


@contextmanager
def _opened(location: AudioLocation) -> Iterator[IO[bytes]]:
    if not os.path.lexists(location.path):
        raise EarVAEError("no such file")
    # Opening a pipe would wait for a writer that may never come.
    if not stat.S_ISREG(os.stat(location.path).st_mode):
        raise EarVAEError("is no ordinary file")
    with ExitStack() as stack:
        file = stack.enter_context(open(location.path, "rb"))
        if location.span is None:
            yield file
            return
        first, size = location.span
        if os.fstat(file.fileno()).st_size < first + size:
            raise EarVAEError("truncated: the file that it is a part of ends before it does")
        part: Any = PartReader(file, Part(((first, first + size),)))
        part.name = location.path
        yield part


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_HASHED_AT_ONCE):
        digest.update(block)
    return digest.hexdigest()


def content_sha256(location: AudioLocation) -> str | None:
    """Computes the hash of a file's bytes; None where they cannot be read."""
    try:
        with _opened(location) as file:
            return _sha256(file)
    except (OSError, EarVAEError):
        return None


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def current_folder_off_the_path() -> Iterator[None]:
    """Keeps processes that are started in the block from importing what lies in the current folder.

    A spawned process looks there first for the modules that it starts with: a `pickle.py` among somebody's
    songs would run. Python heeds this from 3.11 on.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def prepare_process(threads: int) -> None:
    """Prepares a process that another one has started.

    Args:
        threads: Number of torch's threads.
    """
    # Ctrl-C and closing the terminal reach every process in it; the first one decides.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(threads)
