"""The small transformer over latent frames that stands before the convolutional decoder."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ear_vae.config import EarVAEConfig

ROTARY_BASE = 10_000.0
FEED_FORWARD_MULTIPLE = 4
_FRAMES_AT_ONCE = 8192


class LatentTransformer(nn.Module):
    """Pre-norm transformer layers over the frames of [B, D, N]; the shape is kept.

    Attention is full and not causal: every frame sees every other, so this module runs once over a
    whole sequence and is never tiled.
    """

    def __init__(self, config: EarVAEConfig) -> None:
        super().__init__()
        self.head_dim = config.transformer_head_dim
        self.layers = nn.ModuleList(
            TransformerLayer(config.latent_dim, config.transformer_head_dim)
            for _ in range(config.transformer_depth)
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Transforms latents [B, D, N] to the same shape."""
        x = rearrange(latents, "b d n -> b n d")
        cos, sin = rotary_table(x.shape[1], self.head_dim, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return rearrange(x, "b n d -> b d n")


class TransformerLayer(nn.Module):
    """Attention and a SwiGLU feed-forward, each behind a norm and added to its input."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.attention = Attention(dim, head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim, bias=False)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps frames [B, N, D] to the same shape, with the rotary tables [N, head_dim]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Attention(nn.Module):
    """Multi-head attention with rotary positions over all channels of a head; no biases."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps frames [B, N, D] to the same shape, with the rotary tables [N, head_dim]."""
        # Thirds in the order q, k, v; each third is head-major.
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, d=self.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        try:
            attended = functional.scaled_dot_product_attention(q, k, v)
        except NotImplementedError:
            # The fused kernels have no forward-mode derivative, which torch.func.jvp asks for.
            with sdpa_kernel(SDPBackend.MATH):
                attended = functional.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: one projection split in value ‖ gate, value · silu(gate), and a projection back.

    Reference: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value_gate = nn.Linear(dim, 2 * FEED_FORWARD_MULTIPLE * dim)
        self.out = nn.Linear(FEED_FORWARD_MULTIPLE * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each frame of [B, N, D] on its own."""
        # A graph that is exported or compiled would hold as many pieces as its example had.
        if torch.compiler.is_compiling():
            return self._of_some(x)
        # Every frame goes through alone. Together those of hours would take gigabytes in the wide middle.
        return torch.cat([self._of_some(frames) for frames in x.split(_FRAMES_AT_ONCE, dim=1)], dim=1)

    def _of_some(self, x: Tensor) -> Tensor:
        value, gate = self.value_gate(x).chunk(2, dim=-1)
        return self.out(value * functional.silu(gate))


def rotary_table(num_frames: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, head_dim] of the rotary angles, in the dtype and on the device of `like`.

    The angles are computed in float32 at least: in bfloat16 positions beyond 256 would collide.

    Reference: Su et al., "RoFormer" (2021), equation 34, with the halves of a head as the pairs.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    positions = torch.arange(num_frames, device=like.device, dtype=dtype)
    angles = torch.outer(positions, ROTARY_BASE**-exponents).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (first half, second half) of the channels of [B, heads, N, head_dim] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
