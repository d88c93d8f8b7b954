"""Files of `torch.save`, of which only tensors and plain values are read."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ear_vae.errors import EarVAEError, first_line
from ear_vae.limits import shortened, shown

_LONGEST_REASON = 200
_DEEPEST = 8


def load_tensors(source: Path | IO[bytes], name: str) -> Any:
    """Reads a file of `torch.save` that holds tensors and plain values only, so that nothing in it can run.

    Args:
        source: The file.
        name: What messages call it.

    Raises:
        EarVAEError: The file is missing, damaged, holds anything else, or a tensor that claims more values
            than there are in the file.
    """
    try:
        with warnings.catch_warnings():
            # Of an odd pickle torch asks to be told; what is wrong with it is said below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EarVAEError(f"{name}: no such file, the weights are missing") from None
    except pickle.UnpicklingError as error:
        # Only this part of torch's text: the rest advises loading it all the same.
        found = re.search(r"GLOBAL (\S+)", str(error))
        held = f" ({shown(found[1])})" if found else ""
        raise EarVAEError(
            f"{name}: refused, the pickle is damaged or holds more than tensors{held}; get a plain file of "
            "tensors from where you trust it"
        ) from error
    except Exception as error:  # torch raises many kinds for files that are not its own
        reason = first_line(error)
        if "TorchScript" in reason:
            raise EarVAEError(
                f"{name}: refused, a TorchScript archive holds code; save tensors alone"
            ) from error
        reason = shortened(reason, _LONGEST_REASON)
        raise EarVAEError(f"{name}: not a readable PyTorch file: {reason}") from error
    for tensor in _tensors(content):
        # A view may repeat one value a million million times.
        if tensor.layout == torch.strided and not tensor.is_meta:
            held_bytes = tensor.untyped_storage().nbytes()
            if tensor.numel() * tensor.element_size() > held_bytes:
                shape = list(tensor.shape)
                raise EarVAEError(f"{name}: damaged: {held_bytes} bytes for a tensor of shape {shape}")
    return content


def _tensors(content: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (Mapping, list, tuple)) and depth < _DEEPEST:
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value, depth + 1)
