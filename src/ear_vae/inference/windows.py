"""Encoding many recordings at once: in windows of few lengths, side by side, each as if it were alone.

What `EarVAE.encode` gives of a whole is put together from windows of it. A frame depends on a finite stretch
of audio, so that the middle of a window is right wherever it lies, and its ends are where the recording
begins or ends:

       ├───────── window ─────────┤context│                    the first: its left edge is the recording's
                        │context├── window ──┤context│         those between
                                     │context├── window ──┤    the last: its right edge is the recording's

All but the last have one length, and the last is rounded up to one of few by reaching back further. Batches
have one shape for each length, whatever stands in them, so that the numbers of a recording do not depend on
which others stood beside it: kernels are chosen by shape, and round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ear_vae.dsp.stream_buffer import StreamBuffer
from ear_vae.inference.arguments import as_audio_batch
from ear_vae.inference.tiling import encoder_reach, tile_length
from ear_vae.network import Autoencoder
from ear_vae.posterior import Posterior

# Long enough that the context costs little. Wide networks have shorter ones, which fill the same memory.
_MOST_WINDOW_FRAMES = 1024
# Windows at the end of a recording have a multiple of this many frames.
_STEP_FRAMES = 16
# Rows of a batch. A CPU has enough to do with one, and rows that stay empty would cost as much as full ones.
_ROWS_ON_CPU, _ROWS = 1, 8


@dataclass(frozen=True)
class _Window:
    """A stretch of a recording.

    Attributes:
        key: The recording.
        audio: Its samples, [C, T], T a whole number of frames.
        first: Number of the first frame, in the recording, that is kept of it.
        skipped: Frames before that one in the window.
        kept: Frames that are kept.
    """

    key: Hashable
    audio: Tensor
    first: int
    skipped: int
    kept: int


@dataclass
class _Recording:
    """What has come in of a recording, and what has been made of it.

    Attributes:
        held: Samples that are still needed.
        planned: Frames that windows have been cut for.
        complete: Whether all of it has come in.
        waiting: Windows that are not encoded yet.
        pieces: Means and standard deviations [D, n] by number of the first frame.
    """

    held: StreamBuffer = field(default_factory=StreamBuffer)
    planned: int = 0
    complete: bool = False
    waiting: int = 0
    pieces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class BatchEncoder:
    """Encodes recordings that come in block by block, several at a time.

    Args:
        model: Model to encode with.
        encode: Its function from audio [B, C, T] to a posterior [B, D, N], `EarVAE.encode`.
        rows: Rows of a batch; by default 1 on a CPU and 8 elsewhere.
        few_lengths: Cut short recordings, too, into windows of few lengths, which costs up to half as much
            again. By default where batches have several rows; otherwise each is a window of its own length.
        window_frames: Frames of a window; by default as many as are fast, at most 1024.
    """

    def __init__(
        self,
        model: Autoencoder,
        encode: Callable[[Tensor], Posterior],
        *,
        rows: int | None = None,
        few_lengths: bool | None = None,
        window_frames: int | None = None,
    ) -> None:
        self._encode, self._channels = encode, model.config.audio_channels
        self._ratio = model.config.downsampling_ratio
        self._rows = rows or (_ROWS_ON_CPU if model.device.type == "cpu" else _ROWS)
        self._few_lengths = self._rows > 1 if few_lengths is None else few_lengths
        self._before, self._after = (
            -(-reach // self._ratio) for reach in encoder_reach(model.encoder, self._ratio)
        )
        # Of the model alone: on whichever device its windows are cut, they are the same.
        usual = min(_MOST_WINDOW_FRAMES, tile_length(model.config.channels, self._ratio, torch.device("cpu")))
        # With less, a window would be all context.
        least = 2 * (self._before + self._after) + _STEP_FRAMES
        self._window = max(window_frames or usual, least)
        self._recordings: dict[Hashable, _Recording] = {}
        self._batches: dict[int, list[_Window]] = {}

    def push(self, key: Hashable, audio: Tensor) -> None:
        """Takes the next block of a recording.

        Args:
            key: What the recording is called.
            audio: [C, T] at the model's rate, one or two channels, floating point.

        Raises:
            EarVAEError: The model does not take it.
        """
        recording = self._recordings.setdefault(key, _Recording())
        ratio, held = self._ratio, recording.held
        blocks = iter([as_audio_batch(audio, self._channels)[0][0]])
        held.fill(blocks, held.stop + audio.shape[-1])
        # As long as more follows: the recording may end right behind a window, whose right edge then counts.
        while held.stop > (self._start(recording) + self._window) * ratio:
            end = self._start(recording) + self._window
            self._cut(key, recording, self._window, end, end - self._after)
            held.discard((self._start(recording) - _STEP_FRAMES) * ratio)

    def finish(self, key: Hashable) -> None:
        """Says that a recording, of which there was at least one sample, has come in."""
        recording = self._recordings[key]
        ratio, held = self._ratio, recording.held
        num_frames = -(-held.stop // ratio)
        if missing := num_frames * ratio - held.stop:
            silence = torch.zeros(self._channels, missing)
            held.fill(iter([silence]), num_frames * ratio)
        recording.complete = True
        if recording.planned == 0:
            first = self._first_length(num_frames)
            self._cut(key, recording, first, first, first - (self._after if first < num_frames else 0))
        if recording.planned < num_frames:
            needed = num_frames - self._start(recording)
            length = min(-(-needed // _STEP_FRAMES) * _STEP_FRAMES, max(self._window, needed), num_frames)
            self._cut(key, recording, length, num_frames, num_frames)

    def drop(self, key: Hashable) -> None:
        """Forgets a recording."""
        self._recordings.pop(key, None)

    def flush(self) -> None:
        """Encodes the windows that wait for others to fill their batch."""
        for length in sorted(self._batches):
            self._run(length)

    def done(self) -> Iterator[tuple[Hashable, Posterior]]:
        """Yields the recordings that have become complete, each with its posterior [D, N] in float32."""
        ready = [key for key, item in self._recordings.items() if item.complete and not item.waiting]
        for key in ready:
            pieces = [piece for _, piece in sorted(self._recordings.pop(key).pieces.items())]
            yield key, Posterior(*(torch.cat(tensors, dim=1) for tensors in zip(*pieces, strict=True)))

    def _start(self, recording: _Recording) -> int:
        """Number of the frame with which the next window begins."""
        return max(0, recording.planned - self._before)

    def _first_length(self, num_frames: int) -> int:
        """Frames of the first window of a recording that one window could hold."""
        rounded = num_frames // _STEP_FRAMES * _STEP_FRAMES
        # What is left would be longer than the whole.
        if not self._few_lengths or rounded < self._before + self._after + _STEP_FRAMES:
            return num_frames
        return rounded

    def _cut(self, key: Hashable, recording: _Recording, length: int, end: int, kept_to: int) -> None:
        """Cuts the window that ends before frame `end`, of which the frames to `kept_to` are kept."""
        ratio, first = self._ratio, recording.planned
        # A copy, which the rest of a block does not stay in memory for.
        audio = recording.held.read((end - length) * ratio, end * ratio).clone()
        recording.planned = kept_to
        recording.waiting += 1
        batch = self._batches.setdefault(length, [])
        batch.append(_Window(key, audio, first, first - (end - length), kept_to - first))
        if len(batch) == self._rows:
            self._run(length)

    def _run(self, length: int) -> None:
        windows = self._batches.pop(length)
        batch = torch.zeros(self._rows, *windows[0].audio.shape)
        for row, window in enumerate(windows):
            batch[row] = window.audio
        with torch.inference_mode():
            posterior = self._encode(batch)
        for row, window in enumerate(windows):
            recording = self._recordings.get(window.key)
            if recording is None:
                continue
            frames = slice(window.skipped, window.skipped + window.kept)
            recording.waiting -= 1
            # Copies, for the rest of the batch is not needed.
            recording.pieces[window.first] = (
                posterior.mean[row, :, frames].clone(),
                posterior.std[row, :, frames].clone(),
            )
