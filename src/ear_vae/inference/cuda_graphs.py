"""CUDA graphs: passes over shapes that come again, run without launching kernel by kernel.

A second of audio is less than a millisecond of arithmetic on a large GPU, and some hundred kernels; launching
them takes longer than running them. Beyond some ten seconds it is the other way round, and a recording costs
more than it gives: files have tiles of many lengths, and few of them come again.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

MOST_GRAPH_FRAMES = 400
"""Latent frames of all items of a batch together beyond which a pass is not worth recording."""

# Each holds its input and output.
_MOST_SHAPES = 8


class _Recordings:
    """What is known of each input shape of one network. None: seen once; `_PLAIN`: cannot be recorded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shapes: OrderedDict[Hashable, _Graph | object | None] = OrderedDict()

    def graphs(self) -> list[_Graph]:
        return [found for found in self.shapes.values() if found is not None and found is not _PLAIN]  # type: ignore[misc]


_PLAIN = object()
_networks: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()
_lock = threading.Lock()


def run_graph(network: nn.Module, x: Tensor) -> Tensor:
    """Runs `network(x)` without gradients: as usual for a new shape, recorded the second time, then replayed.

    A recording reads the weights where they lie: changed in place they are followed, and moved elsewhere they
    make a new one, as do other settings of autocast, TF32 and determinism. A shape that cannot be recorded
    is computed as usual, after a warning. Threads take turns.
    """
    with _lock:
        recordings = _networks.setdefault(network, _Recordings())
    weights = tuple(parameter.data_ptr() for parameter in network.parameters())
    key = (x.shape, x.stride(), x.dtype, x.device, weights, _settings(x.device.type))
    with recordings.lock:
        known = recordings.shapes
        if key in known:
            known.move_to_end(key)
            if known[key] is None:
                known[key] = _recorded(network, x, recordings.graphs())
            if isinstance(graph := known[key], _Graph):
                return graph.replay(x)
        else:
            # The pass below also has kernels chosen and compiled, which cannot be done while recording.
            known[key] = None
            while len(known) > _MOST_SHAPES:
                known.popitem(last=False)
    result: Tensor = network(x)
    return result


def clear_graphs(network: nn.Module) -> None:
    """Drops the graphs that have been recorded of a network."""
    with _lock:
        _networks.pop(network, None)


def _settings(device_type: str) -> Hashable:
    """What decides which kernels a pass has, beside its input."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # Newer torch has a setting by operator, and raises on questions for the old one once that has been used.
    tf32 = (
        (cudnn.conv.fp32_precision, matmul.fp32_precision)  # type: ignore[attr-defined]
        if hasattr(matmul, "fp32_precision")
        else (cudnn.allow_tf32, matmul.allow_tf32)
    )
    return autocast, tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()


def _recorded(network: nn.Module, x: Tensor, others: list[_Graph]) -> _Graph | object:
    beside = next((other for other in others if other.device == x.device), None)
    try:
        return _Graph(network, x, beside)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"input of shape {list(x.shape)} cannot be recorded as a CUDA graph and is computed as usual: "
            f"{reason}",
            stacklevel=3,
        )
        return _PLAIN


class _Graph:
    """A recording, with the memory that it reads and writes.

    Args:
        network: What to record.
        x: Input of the shape, dtype and device to record it for.
        beside: A recording on that device, never replayed at the same time, whose memory between input and
            output this one uses too. With eight of their own, a network would fill the GPU.
    """

    def __init__(self, network: nn.Module, x: Tensor, beside: _Graph | None) -> None:
        self.device = x.device
        # Outside of inference mode, whose tensors could not be written to in another mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            self._input = x.clone()
            self._graph = torch.cuda.CUDAGraph()
            # Memory is shared on one stream only. torch's own is on the device that it first recorded on.
            self._stream: torch.cuda.Stream = beside._stream if beside else torch.cuda.Stream()
            # When the last replay of any of them has been read.
            self._read: torch.cuda.Event = beside._read if beside else torch.cuda.Event()
            pool = beside._graph.pool() if beside else None
            recording = torch.cuda.graph(
                self._graph,
                pool=pool,
                stream=self._stream,
                # Other threads may go on with what they do, such as pinning memory for a loader.
                capture_error_mode="thread_local",
            )
            # A recording that fails leaves its stream as the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), _uncached(x.device.type), recording:
                self._output: Tensor = network(self._input)

    def replay(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            # Another thread may have another stream.
            stream.wait_event(self._read)
            self._input.copy_(x)
            self._graph.replay()
            result = self._output.clone()
            self._read.record(stream)
            return result


def _uncached(device_type: str) -> AbstractContextManager[None]:
    """Autocast as it is, without its cache of cast weights: they would be gone at the replay."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
