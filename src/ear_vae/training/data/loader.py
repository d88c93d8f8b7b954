"""Batches of segments whose order is one sequence, over epochs, processes and interruptions."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ear_vae.errors import EarVAEError
from ear_vae.limits import integer, shown

# How long a worker goes on after SIGTERM, for the step that is under way: on one core some take minutes.
_GRACE_SECONDS = 300


class SegmentSampler(DistributedSampler[int]):
    """Yields numbers of segments that continue over the epochs: each starts where the one before ended.

    Of W processes, process r takes the numbers r, r + W, r + 2 W and so on, so that the segments of a step do
    not depend on how many processes share them.

    It is a `DistributedSampler` so that Lightning, which puts its own around any other, leaves it alone.

    Args:
        dataset: Dataset of the segments, of which every number stands for one.
        per_epoch: Segments per epoch over all processes; a multiple of the number of processes.
        rank: Number of this process, from 0.
        processes: Number of processes.
    """

    def __init__(self, dataset: Dataset[Any], *, per_epoch: int, rank: int, processes: int) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)
        self.per_epoch = per_epoch
        self.position = 0

    def __len__(self) -> int:
        return self.per_epoch // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Yields from the position, which `SegmentLoader` moves on, to the end of its epoch."""
        end = (self.position // self.per_epoch + 1) * self.per_epoch
        return iter(range(self.position + self.rank, end, self.num_replicas))


class SegmentLoader(DataLoader[Any]):
    """Loads batches of segments, of audio or of latents; its state is the number of segments that were taken.

    Resuming therefore reads the batches that would have come next, also in the middle of an epoch, and
    none of those before.

    Args:
        dataset: Dataset of the segments, of which every number stands for one.
        batch_size: Segments in a batch of one process.
        segments_per_epoch: Segments per epoch over all processes; those that do not fill a step are left out.
        rank: Number of this process, from 0.
        processes: Number of processes.
        settings: Further arguments of `torch.utils.data.DataLoader`.

    Raises:
        EarVAEError: An epoch that holds less than one step.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        segments_per_epoch: int,
        rank: int = 0,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        self.step_segments = batch_size * processes
        per_epoch = segments_per_epoch // self.step_segments * self.step_segments
        if per_epoch == 0:
            shared = f" of {processes} processes" if processes > 1 else ""
            raise EarVAEError(
                f"an epoch has {segments_per_epoch} segments, but one step{shared} takes "
                f"{self.step_segments}; lower batch_size, or draw more per epoch (segments_per_epoch, for "
                "latents crops_per_epoch)"
            )
        self.segments = SegmentSampler(dataset, per_epoch=per_epoch, rank=rank, processes=processes)
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=self.segments,
            worker_init_fn=_leave_signals_to_the_first_process,
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the remaining batches of the epoch."""
        for batch in super().__iter__():
            # Before the batch is used: a checkpoint is written after that, but before the next is asked for.
            self.segments.position += self.step_segments
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns the number of segments that were taken, over all processes."""
        return {"segments": self.segments.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the segments of a state.

        With another batch size or number of processes, it continues from the start of the step it is in.

        Raises:
            EarVAEError: The state does not say how many segments were taken.
        """
        position = integer(state.get("segments")) if isinstance(state, dict) else None
        if position is None or position < 0:
            raise EarVAEError(f"the checkpoint is damaged: its place in the data is {shown(state)}")
        self.segments.position = position // self.step_segments * self.step_segments


def _leave_signals_to_the_first_process(worker: int) -> None:
    # Ctrl-C, a closed terminal and a job scheduler's SIGTERM reach every process of the run. A worker that
    # dies of one takes the run with it, before its checkpoint is written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # With SIGTERM a first process also ends a worker that hangs.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
