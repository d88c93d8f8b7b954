"""CUDA graphs: passes over shapes that come again, replayed without launching kernel by kernel.

A second of audio is less than a millisecond of arithmetic on a large GPU, and some hundred kernels; launching
them takes longer than running them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Each holds its input and output.
_MOST_SHAPES = 8

_graphs: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Graph | None]] = WeakKeyDictionary()


def replayed(network: nn.Module, x: Tensor) -> Tensor:
    """`network(x)` without gradients: as usual for a shape that is new, then recorded, then replayed.

    A recording reads the weights where they lie: changed in place they are followed, and moved elsewhere they
    make a new one. It keeps the settings of torch, such as TF32, that it was made under; see `forget`.
    """
    known = _graphs.setdefault(network, OrderedDict())
    weights = tuple(parameter.data_ptr() for parameter in network.parameters())
    key = (x.shape, x.stride(), x.dtype, x.device, weights)
    if key not in known:
        # Also the pass that has kernels chosen and compiled, which cannot be done while recording.
        known[key] = None
        while len(known) > _MOST_SHAPES:
            known.popitem(last=False)
        result: Tensor = network(x)
        return result
    known.move_to_end(key)
    if (graph := known[key]) is None:
        beside = next((other for other in known.values() if other and other.device == x.device), None)
        graph = known[key] = _Graph(network, x, beside)
    return graph.replay(x)


def forget(network: nn.Module) -> None:
    """Drops what has been recorded of a network."""
    _graphs.pop(network, None)


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
            pool = beside._graph.pool() if beside else None
            with torch.cuda.graph(self._graph, pool=pool, stream=self._stream):
                self._output: Tensor = network(self._input)

    def replay(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            self._input.copy_(x)
            self._graph.replay()
            return self._output.clone()
