"""Starting a narrow model as a linear codec.

A narrow network trained from random weights for an hour is worse than a low-pass filter. The same
network can be a lapped transform, because every part of it can be linear: residual branches that add
nothing yet, Snakes with a small α, strided convolutions that only sort samples into channels. What
training then adds comes on top of a codec that already passes the waveform.

    audio L, R ─ first convolution ─ M, S ─ half-band filter, every second sample ─ polyphase splits
      (each stride s moves s neighbouring samples into s channels) ─ last stride: MDCT with a sine window
      ─ the D most useful coefficients of M and S, scaled to unit variance, are the latents' means.

The decoder is the transpose: overlapping MDCT windows cancel their aliasing exactly. This start is
ours, not the paper's, and no part of the published architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.network.blocks import ResidualUnit, Snake
from ear_vae.network.decoder import DecoderBlock
from ear_vae.network.encoder import EncoderBlock
from ear_vae.network.transformer import TransformerLayer
from ear_vae.vae import EarVAE

# Linear-phase half-band filter: flat to -0.3 dB up to a third of the lower rate.
_HALF_BAND = (-1 / 16, 9 / 16, 9 / 16, -1 / 16)
# Orthonormal MDCT coefficients peak near 9 on loud music, where the Snakes bend them by several
# decibels; a tenth of that passes almost straight.
_COEFFICIENT_GAIN = 0.1
# A small α makes x + sin²(αx)/β nearly x, and still lets training bend it.
_CARRIER_LOG_ALPHA = -2.0
# Posterior std softplus(-4) = 0.018 beside means of unit variance: the noise does not drown the signal.
_SCALE_BIAS = -4.0
_SCALE_WEIGHT = 1e-3
_BRANCH_GAIN = 1e-2
_VARIANCE_FLOOR = 1e-12


@dataclass(frozen=True)
class FilterBankPlan:
    """The coefficients that become latents.

    Attributes:
        indices: Positions among the coefficients, [D]; those of M come first, then those of S.
        scales: Factors that bring them to unit variance, [D].
    """

    indices: Tensor
    scales: Tensor


def analyse(config: EarVAEConfig, audio: Tensor) -> Tensor:
    """Computes the filter bank's coefficients of audio, as the network's encoder will compute them.

    Args:
        config: Architecture of the model.
        audio: Stereo audio, [B, 2, T].

    Returns:
        [B, 2 K, N] with K coefficients of M, then K of S, for the whole frames of T; K is what the
        widest layer can carry.

    Raises:
        EarVAEError: The architecture cannot hold the filter bank.
    """
    num_phases, num_bins = _layout(config)
    mid_side = torch.stack((audio[:, 0] + audio[:, 1], audio[:, 0] - audio[:, 1]), dim=1) / 2
    taps = torch.tensor(_HALF_BAND, dtype=audio.dtype, device=audio.device).expand(2, 1, 4)
    half_rate = nn.functional.conv1d(mid_side, taps, stride=2, padding=1, groups=2)
    hop = num_phases * config.strides[-1]
    kernel = mdct(hop, num_bins).to(half_rate).unsqueeze(1).repeat(2, 1, 1)
    return nn.functional.conv1d(half_rate, kernel, stride=hop, padding=hop // 2, groups=2)


def choose_bands(config: EarVAEConfig, coefficients: Tensor) -> FilterBankPlan:
    """Chooses the coefficients that leave out the least of each item's signal.

    Greedily minimises the mean over items of the logarithm of the energy that is left out, which is the
    mean signal-to-distortion ratio in decibels: a loud item counts no more than a quiet one.

    Args:
        config: Architecture of the model.
        coefficients: Coefficients that `analyse` returned for representative music, [B, 2 K, N].

    Raises:
        EarVAEError: There are fewer coefficients than latents, or no signal in any item.
    """
    energy = coefficients.double().square().mean(dim=-1)
    energy = energy[energy.sum(dim=1) > _VARIANCE_FLOOR]
    if energy.shape[1] < config.latent_dim:
        raise EarVAEError(f"{energy.shape[1]} coefficients are too few for {config.latent_dim} latents")
    if not len(energy):
        raise EarVAEError("the filter bank needs music to choose its coefficients from, got silence only")
    left_out = energy.sum(dim=1, keepdim=True)
    chosen: list[int] = []
    for _ in range(config.latent_dim):
        remaining = (left_out - energy).clamp(min=left_out * 1e-6)
        scores = remaining.log().mean(dim=0)
        scores[chosen] = math.inf
        best = int(scores.argmin())
        chosen.append(best)
        left_out = remaining[:, best : best + 1]
    indices = torch.tensor(sorted(chosen))
    scales = energy.mean(dim=0)[indices].clamp(min=_VARIANCE_FLOOR).rsqrt()
    return FilterBankPlan(indices, scales.float())


@torch.no_grad()
def initialize(vae: EarVAE, choice: FilterBankPlan) -> None:
    """Rewrites the weights of a freshly built model so that it computes the filter bank.

    Args:
        vae: Model with plain (folded) weights and its usual random start, part of which is kept in the
            channels that carry nothing.
        choice: Coefficients that become latents.

    Raises:
        EarVAEError: The architecture cannot hold the filter bank.
    """
    config = vae.config
    num_phases, num_bins = _layout(config)
    for module in vae.modules():
        if isinstance(module, ResidualUnit):
            module.conv_pointwise.weight.mul_(_BRANCH_GAIN)
            _zero_bias(module.conv_pointwise)
        elif isinstance(module, Snake):
            module.log_alpha.fill_(_CARRIER_LOG_ALPHA)
            module.log_beta.zero_()
        elif isinstance(module, TransformerLayer):
            nn.init.zeros_(module.attention.out.weight)
            nn.init.zeros_(module.feed_forward.out.weight)
            nn.init.zeros_(module.feed_forward.out.bias)
    strided = [m.conv for m in vae.encoder.modules() if isinstance(m, EncoderBlock)]
    transposed = [m.conv for m in vae.decoder.modules() if isinstance(m, DecoderBlock)][::-1]

    mix = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    _carry(vae.encoder.conv_in, _centred(mix, 7))
    _carry(vae.decoder.conv_out, _centred(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 7))

    half_band = torch.zeros(2, 2, 4)
    half_band[[0, 1], [0, 1]] = torch.tensor(_HALF_BAND)
    _carry(strided[0], half_band)
    _carry(transposed[0], 2 * half_band)

    carried = 2
    for index, stride in enumerate(config.strides[1:-1], start=1):
        split = torch.zeros(carried * stride, carried, 2 * stride)
        for channel in range(carried):
            for phase in range(stride):
                split[channel * stride + phase, channel, stride // 2 + phase] = 1
        _carry(strided[index], split)
        _carry(transposed[index], split)
        carried *= stride

    # Channel c of one signal's phases holds sample `order[c]` of each run of num_phases samples.
    order = _phase_order(config.strides[1:-1])
    stride = config.strides[-1]
    windows = mdct(num_phases * stride, num_bins).unflatten(1, (2 * stride, num_phases))
    kernel = windows[..., order].transpose(1, 2)
    lapped = torch.zeros(2 * num_bins, 2 * num_phases, 2 * stride)
    lapped[:num_bins, :num_phases] = kernel
    lapped[num_bins:, num_phases:] = kernel
    _carry(strided[-1], _COEFFICIENT_GAIN * lapped)
    _carry(transposed[-1], lapped / _COEFFICIENT_GAIN)

    scales = choice.scales.to(lapped)
    selection = torch.zeros(config.latent_dim, 2 * num_bins)
    selection[torch.arange(config.latent_dim), choice.indices] = scales / _COEFFICIENT_GAIN
    conv_out = vae.encoder.conv_out
    conv_out.weight.mul_(_SCALE_WEIGHT)
    conv_out.weight[: config.latent_dim] = 0
    conv_out.weight[: config.latent_dim, : 2 * num_bins, 1] = selection
    assert conv_out.bias is not None
    conv_out.bias[: config.latent_dim] = 0
    conv_out.bias[config.latent_dim :] = _SCALE_BIAS
    back = torch.zeros(2 * num_bins, config.latent_dim, 7)
    back[choice.indices, torch.arange(config.latent_dim), 3] = _COEFFICIENT_GAIN / scales
    vae.decoder.conv_in.weight[: 2 * num_bins] = back
    _zero_bias(vae.decoder.conv_in)


def mdct(hop: int, num_bins: int) -> Tensor:
    """Returns the lowest `num_bins` basis functions of the orthonormal MDCT, sine window, [num_bins, 2 hop].

    Reference: Princen, Johnson and Bradley, "Subband/Transform Coding Using Filter Bank Designs Based
    on Time Domain Aliasing Cancellation" (1987).
    """
    samples = torch.arange(2 * hop, dtype=torch.float64) + 0.5
    bins = torch.arange(num_bins, dtype=torch.float64) + 0.5
    window = torch.sin(math.pi / (2 * hop) * samples)
    basis = torch.cos(math.pi / hop * torch.outer(bins, samples + hop / 2))
    return (math.sqrt(2 / hop) * window * basis).float()


def _layout(config: EarVAEConfig) -> tuple[int, int]:
    """Returns the phases that the middle strides split a signal into, and the coefficients of a signal."""
    num_phases = math.prod(config.strides[1:-1])
    widths = [low for _, low in config.block_widths]
    needed, carried = [2], 2
    for stride in config.strides[1:-1]:
        carried *= stride
        needed.append(carried)
    num_bins = min(num_phases * config.strides[-1], widths[-1] // 2)
    if config.audio_channels != 2 or config.strides[0] != 2 or len(config.strides) < 2:
        raise EarVAEError("the filter bank needs stereo audio, a first stride of 2 and at least two strides")
    if any(width < need for width, need in zip(widths, needed, strict=False)):
        raise EarVAEError(f"the filter bank needs blocks at least {needed} wide, these are {widths}")
    return num_phases, num_bins


def _phase_order(strides: tuple[int, ...]) -> Tensor:
    """Returns, for each channel after the polyphase splits, which sample of the run of phases it holds."""
    order = torch.zeros(1, dtype=torch.long)
    step = 1
    for stride in strides:
        # A split sends phase p of a channel that held sample o to o + p · (samples each value spans).
        order = (order[:, None] + step * torch.arange(stride)).flatten()
        step *= stride
    return order


def _centred(matrix: Tensor, kernel_size: int) -> Tensor:
    kernel = torch.zeros(*matrix.shape, kernel_size)
    kernel[..., kernel_size // 2] = matrix
    return kernel


def _carry(conv: nn.Conv1d | nn.ConvTranspose1d, kernel: Tensor) -> None:
    """Puts `kernel` on the first channels of a convolution, and keeps them apart from all others.

    `kernel` is [out, in, taps] of the encoder's convolution; the decoder's transposed one holds the same
    array, since its dimension 0 is its input.
    """
    first, second, _ = kernel.shape
    if isinstance(conv, nn.ConvTranspose1d):
        conv.weight[:, :second] = 0
        conv.weight[:first] = 0
    else:
        conv.weight[:first] = 0
    conv.weight[:first, :second] = kernel
    _zero_bias(conv)


def _zero_bias(conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
