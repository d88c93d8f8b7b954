"""The sines of the kernels of `ear_vae.network.snake_triton` by themselves; imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ear_vae.network.snake_triton import _sine_of_twice, _squared_sine

_BLOCK = 1 << 16


def sines(angle: torch.Tensor, sine: str) -> tuple[torch.Tensor, torch.Tensor]:
    """sin²(angle) and sin(2 angle) of float32 [N] in the way that `sine` names."""
    squares, twices = torch.empty_like(angle), torch.empty_like(angle)
    grid = (triton.cdiv(angle.numel(), _BLOCK),)
    _sines[grid](angle, squares, twices, angle.numel(), BLOCK=_BLOCK, SINE=sine)
    return squares, twices


@triton.jit
def _sines(angle, squares, twices, length, BLOCK: tl.constexpr, SINE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    given = tl.load(angle + offsets, mask=inside, other=0.0)
    tl.store(squares + offsets, _squared_sine(given, SINE), mask=inside)
    tl.store(twices + offsets, _sine_of_twice(given, SINE), mask=inside)
