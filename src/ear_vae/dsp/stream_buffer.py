"""A buffer for a sequence that comes in blocks and is needed in overlapping pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class StreamBuffer:
    """The part of a stream that has come in and is still needed.

    Attributes:
        start: Position of the first sample held.
        stop: Position after the last sample held.
    """

    def __init__(self) -> None:
        self.start = self.stop = 0
        self._blocks: list[Tensor] = []

    def fill(self, source: Iterator[Tensor], stop: int) -> bool:
        """Takes blocks [..., T] until `stop` is reached; returns False where the source ends before."""
        while self.stop < stop:
            block = next(source, None)
            if block is None:
                return False
            self._blocks.append(block)
            self.stop += block.shape[-1]
        return True

    def read(self, start: int, stop: int) -> Tensor:
        """Returns what lies between two positions, [..., stop - start]; it stays in the buffer."""
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, dim=-1)]
        return self._blocks[0][..., start - self.start : stop - self.start]

    def discard(self, start: int) -> None:
        """Removes what lies before a position."""
        while self._blocks and self.start + self._blocks[0].shape[-1] <= start:
            self.start += self._blocks.pop(0).shape[-1]
        if self._blocks and self.start < start:
            # A copy, or the view would keep all of the block in memory.
            self._blocks[0] = self._blocks[0][..., start - self.start :].clone()
            self.start = start
