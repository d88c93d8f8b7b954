"""Dtypes and devices: which a caller may name, and which the network may run in."""

from __future__ import annotations

import torch
from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.limits import shown

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Dtypes that the network runs in."""
STORED_DTYPES = (*SUPPORTED_DTYPES, torch.float16)
"""Dtypes that files of weights and of latents may hold."""
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}


def supported_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """One of `SUPPORTED_DTYPES`, given as it is or by its name.

    Raises:
        EarVAEError: It is another one, such as float16.
    """
    found = _BY_NAME.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if (found is None and dtype is None) or found in SUPPORTED_DTYPES:
        return found
    why = "float16 overflows in the decoder" if "float16" in str(dtype) or "half" in str(dtype) else "unknown"
    raise EarVAEError(f"dtype {shown(dtype)} is not supported ({why}); use {', '.join(_BY_NAME)}")


def available_device(device: torch.device | str | int | None) -> torch.device | None:
    """A device that this machine and this torch have.

    Raises:
        EarVAEError: There is none of that name.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise EarVAEError(
            f"device {shown(device)} is not available; this machine and this torch have {', '.join(here)} "
            "(an NVIDIA or AMD GPU is called 'cuda', an Apple one 'mps')"
        ) from error
    return found


def require_runnable(dtypes: set[torch.dtype], device: torch.device) -> None:
    """Refuses what the network would overflow in, however it came to be in it.

    Args:
        dtypes: Dtypes of all weights that are about to run.
        device: Device that the weights lie on.

    Raises:
        EarVAEError: Weights are in float16 or another dtype that is not supported, or in several, or
            torch.autocast would have them used in float16.
    """
    cure = "it overflows in the decoder and gives NaN or silence: use bfloat16 or float32"
    if unsupported := sorted(str(dtype) for dtype in dtypes.difference(SUPPORTED_DTYPES)):
        raise EarVAEError(
            f"the weights are in {', '.join(unsupported)}, which is not supported: {cure}, for this model or "
            "for what it is a part of; weights that have been in float16 are to be loaded again"
        )
    if len(dtypes) > 1:
        raise EarVAEError(f"the weights are in {', '.join(sorted(map(str, dtypes)))}; move all to one dtype")
    kind = device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and torch.get_autocast_dtype(kind) == torch.float16:
        raise EarVAEError(f"torch.autocast is set to float16, which is not supported: {cure}")


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 at least; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
