"""Copies between the host and a GPU while both go on computing.

A copy runs beside the computing where the host's end of it is pinned memory and it has a stream of its own.
Each direction has one: on a shared stream the next tile would wait behind the result of this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def copy_to_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copies `x` to a device and a dtype; to CUDA, neither the host nor the GPU's computing waits for it."""
    if device.type == "cuda" and x.device.type == "cpu":
        return _upload(_pinned_copy(x), device).to(dtype)
    return x.to(device=device, dtype=dtype)


def start_copy(x: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Starts a copy of `x` to a device, and returns a function that waits for it.

    From CUDA to the host the copy runs beside what is computed next.
    """
    if not x.is_cuda or device.type != "cpu":
        moved = x.to(device)
        return lambda: moved
    copies, arrived = _copy_stream(x.device, "from"), torch.cuda.Event()
    pinned = _pinned_buffer(x.shape, x.dtype)
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


def _pinned_copy(x: Tensor) -> Tensor:
    """`x` in pinned memory of its own size.

    `Tensor.pin_memory` pins all that the strides span, which for a tile of an hour is most of the hour, and
    fails on the overlapping ones of expanded mono.
    """
    return _pinned_buffer(x.shape, x.dtype).copy_(x)


def _pinned_buffer(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _upload(pinned: Tensor, device: torch.device) -> Tensor:
    """A copy on the GPU that what is computed from now on waits for, and nothing before."""
    copies = _copy_stream(device, "to")
    with torch.cuda.stream(copies):
        moved = pinned.to(device, non_blocking=True)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(copies)
    moved.record_stream(computing)
    return moved


@functools.cache
def _copy_stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
