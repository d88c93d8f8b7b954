"""Tensors on their way between the host and a GPU, while both go on working."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`x` there, in that dtype. The host does not wait for a copy to CUDA."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True).to(dtype)
    return x.to(device=device, dtype=dtype)


def begin_delivery(x: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Begins a copy of `x` to a device, and gives a function that waits for it.

    From CUDA to the host the copy runs beside what is computed next.
    """
    if not x.is_cuda or device.type != "cpu":
        moved = x.to(device)
        return lambda: moved
    copies, arrived = _copy_stream(x.device), torch.cuda.Event()
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copies.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(copies):
        pinned.copy_(x, non_blocking=True)
        arrived.record()
    x.record_stream(copies)

    def wait() -> Tensor:
        arrived.synchronize()
        # Pinned memory is scarce: it is not given away.
        return pinned.clone()

    return wait


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
