"""Converting official state dicts and configs to ours, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_vae._torch_files import load_tensors
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import shown
from ear_vae.network.transformer import ROTARY_BASE
from ear_vae.pretrained.folder import expected_shapes, require_fit
from ear_vae.pretrained.layouts.weight_norm import folded

OFFICIAL_LAYERS = "transformers.layers."
"""Prefix of the names of the transformer's layers."""
_LONGEST_REASON = 200
_ROTARY_KEY = "transformers.rotary_pos_emb.inv_freq"
# Of constants in files that were stored in bfloat16.
_ROUNDING = 5e-3


def read_official(path: Path) -> dict[str, Tensor]:
    """Reads the state dict of an official `.pyt`; only tensors are unpickled, so nothing in it can run.

    Raises:
        EarVAEError: The file is missing, damaged, or holds anything but a flat dict of tensors.
    """
    state = load_tensors(path, str(path))
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise EarVAEError(f"{path}: expected a flat dict of tensors, as the official weights are")
    return dict(state)


def official_config(
    values: Any, *, sample_rate: int, transformer_depth: int, transformer_head_dim: int | None = None
) -> EarVAEConfig:
    """Returns our config for an official one.

    Args:
        values: The parsed config.
        sample_rate: Rate of the audio in Hz, which it does not tell.
        transformer_depth: Layers of the transformer; the weights decide, whatever the config lists.
        transformer_head_dim: Channels of one attention head, where the weights tell.

    Raises:
        EarVAEError: A field is missing or asks for something the published networks do not have.
    """
    try:
        encoder, decoder = values["encoder"]["config"], values["decoder"]["config"]
        unsupported = [
            name
            for name, found in {
                "encoder.use_snake": encoder.get("use_snake", True) is True,
                "decoder.use_snake": decoder.get("use_snake", True) is True,
                "decoder.use_nearest_upsample": decoder.get("use_nearest_upsample", False) is False,
                "decoder.final_tanh": decoder.get("final_tanh", False) is False,
                "encoder.latent_dim": encoder["latent_dim"] == 2 * values["latent_dim"],
                "decoder.latent_dim": decoder["latent_dim"] == values["latent_dim"],
                "encoder.in_channels": encoder["in_channels"] == values["io_channels"],
                "decoder.out_channels": decoder["out_channels"] == values["io_channels"],
                **{f"decoder.{n}": decoder[n] == encoder[n] for n in ("channels", "c_mults", "strides")},
            }.items()
            if not found
        ]
        transformer = values.get("transformer", {}).get("config", {})
        config = EarVAEConfig(
            sample_rate=sample_rate,
            audio_channels=values["io_channels"],
            channels=encoder["channels"],
            channel_multipliers=encoder["c_mults"],
            strides=encoder["strides"],
            latent_dim=values["latent_dim"],
            transformer_depth=transformer_depth,
            transformer_head_dim=transformer_head_dim
            or transformer.get("dim_heads", EarVAEConfig.transformer_head_dim),
        )
        if values["downsampling_ratio"] != config.downsampling_ratio:
            unsupported.append("downsampling_ratio")
    except (KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(f"official config: field missing or of the wrong type: {shown(error)}") from error
    if unsupported:
        raise EarVAEError(f"official config: unsupported or inconsistent values of {', '.join(unsupported)}")
    return config


def to_official_config(config: EarVAEConfig) -> dict[str, Any]:
    """Returns the official config of the same architecture."""
    shared = {
        "channels": config.channels,
        "c_mults": list(config.channel_multipliers),
        "strides": list(config.strides),
        "use_snake": True,
    }
    encoder = {"in_channels": config.audio_channels, "latent_dim": 2 * config.latent_dim, **shared}
    decoder = {
        "out_channels": config.audio_channels,
        "latent_dim": config.latent_dim,
        "use_nearest_upsample": False,
        "final_tanh": False,
        **shared,
    }
    transformer = {
        "depth": config.transformer_depth,
        "config": {"rotary_pos_emb": True, "dim_heads": config.transformer_head_dim},
    }
    return {
        **({"transformer": transformer} if config.transformer_depth else {}),
        "encoder": {"config": encoder},
        "decoder": {"config": decoder},
        "latent_dim": config.latent_dim,
        "downsampling_ratio": config.downsampling_ratio,
        "io_channels": config.audio_channels,
    }


def from_official(path: Path | str, state: Mapping[str, Tensor], config: EarVAEConfig) -> dict[str, Tensor]:
    """Returns our state dict for an official one, or for an Oobleck's of stable-audio-tools.

    Args:
        path: Path that `state` came from, for messages.
        state: The tensors, with weight norm or without.
        config: Config that the tensors must fit.

    Raises:
        EarVAEError: Tensors are missing, unexpected or misshapen; a norm has a bias, or the transformer other
            frequencies, than the published network; or a residual unit has two Snakes and the config one.
    """
    plain = folded(path, state)
    shapes = expected_shapes(config, path=path)
    names = list(plain_names(config))
    constants = _constants(config)
    expected = {theirs: shapes[ours] for ours, theirs in names}
    require_fit(path, plain, {**expected, **{name: tensor.shape for name, tensor in constants.items()}})
    ours_state: dict[str, Tensor] = {}
    for ours, theirs in names:
        tensor = plain[theirs].float()
        if ours in ours_state and not torch.equal(ours_state[ours], tensor):
            raise EarVAEError(
                f"{path}: {theirs} is another Snake than the one before it: these are the weights of an "
                "Oobleck of stable-audio-tools, with two in a residual unit; give its model_config.json"
            )
        ours_state[ours] = tensor
    for name, constant in constants.items():
        if not torch.allclose(plain[name].float(), constant, rtol=_ROUNDING, atol=0):
            what = "frequencies" if name == _ROTARY_KEY else "a norm with a bias"
            raise EarVAEError(
                f"{path}: the transformer has {what} that the published network has not: {name}"
            )
    return ours_state


def plain_names(config: EarVAEConfig) -> Iterator[tuple[str, str]]:
    """Our name and the official one, which stable-audio-tools' Oobleck has too, of every plain tensor."""
    for ours, official, kind in official_names(config):
        if kind == "weight_norm":
            yield f"{ours}.weight", f"{official}.weight"
        else:
            yield ours, official


def transformer_fields(state: Mapping[str, Tensor], layers: str = OFFICIAL_LAYERS) -> dict[str, Any]:
    """The fields of our config that tell of the transformer, as far as the tensors tell them.

    Args:
        state: The tensors; official ones tell the channels of an attention head as well.
        layers: Prefix of the names of the transformer's layers.
    """
    fields = {"transformer_depth": len({name.split(".")[2] for name in state if name.startswith(layers)})}
    if (frequencies := state.get(_ROTARY_KEY)) is not None and frequencies.ndim == 1:
        fields["transformer_head_dim"] = 2 * len(frequencies)
    return fields


def _constants(config: EarVAEConfig) -> dict[str, Tensor]:
    """What the official network stores though it never changes: biases of norms, rotary frequencies."""
    if not config.transformer_depth:
        return {}
    exponents = torch.arange(0, config.transformer_head_dim, 2) / config.transformer_head_dim
    biases = {
        official.replace("gamma", "beta"): torch.zeros(config.latent_dim)
        for _, official, _ in official_names(config)
        if official.endswith("norm.gamma")
    }
    return {**biases, _ROTARY_KEY: ROTARY_BASE**-exponents}


def to_official(state: Mapping[str, Tensor], config: EarVAEConfig) -> dict[str, Tensor]:
    """Returns the official state dict of our tensors, with weight norm (v the weight itself, g its norm).

    Raises:
        EarVAEError: The network is one that the official code cannot build.
    """
    if config.snakes_per_residual_unit != 1 or config.min_std:
        raise EarVAEError(
            "the official network has one Snake in a residual unit and no min_std: this model is an Oobleck; "
            "write it as a folder or for diffusers"
        )
    official_state: dict[str, Tensor] = {}
    for name, official, kind in official_names(config):
        if kind == "weight_norm":
            weight = state[f"{name}.weight"]
            norm = weight.norm(dim=(1, 2), keepdim=True)
            official_state[f"{official}.weight_g"] = norm
            # An all-zero kernel has no direction: with any other one, g = 0 still gives zeros, not 0/0.
            official_state[f"{official}.weight_v"] = torch.where(norm == 0, torch.ones_like(weight), weight)
        else:
            official_state[official] = state[name]
    device = next(iter(state.values())).device
    official_state |= {name: constant.to(device) for name, constant in _constants(config).items()}
    return official_state


def official_names(config: EarVAEConfig) -> Iterator[tuple[str, str, str]]:
    """Yields the names of every tensor in the official layout, which stable-audio-tools' Oobleck has too.

    Args:
        config: The architecture.

    Yields:
        Our name, the official name, and `plain`; or two prefixes and `weight_norm`.
    """

    def conv(ours: str, official: str, *, bias: bool = True) -> Iterator[tuple[str, str, str]]:
        yield ours, official, "weight_norm"
        if bias:
            yield f"{ours}.bias", f"{official}.bias", "plain"

    def snake(ours: str, official: str) -> Iterator[tuple[str, str, str]]:
        yield f"{ours}.log_alpha", f"{official}.alpha", "plain"
        yield f"{ours}.log_beta", f"{official}.beta", "plain"

    def residual(ours: str, official: str) -> Iterator[tuple[str, str, str]]:
        yield from snake(f"{ours}.snake", f"{official}.layers.0")
        # A shared Snake is stored twice; the second copy is written, and read, like the first.
        yield from snake(second_snake.format(ours), f"{official}.layers.2")
        yield from conv(f"{ours}.conv_dilated", f"{official}.layers.1")
        yield from conv(f"{ours}.conv_pointwise", f"{official}.layers.3")

    second_snake = "{}.snake2" if config.snakes_per_residual_unit == 2 else "{}.snake"
    blocks = len(config.strides)
    for half in ("encoder", "decoder"):
        yield from conv(f"{half}.conv_in", f"{half}.layers.0")
        for index in range(blocks):
            ours, official = f"{half}.blocks.{index}", f"{half}.layers.{index + 1}.layers"
            first_residual, first_conv = (0, 3) if half == "encoder" else (2, 0)
            for unit in range(3):
                yield from residual(f"{ours}.residual_units.{unit}", f"{official}.{first_residual + unit}")
            yield from snake(f"{ours}.snake", f"{official}.{first_conv}")
            yield from conv(f"{ours}.conv", f"{official}.{first_conv + 1}")
        yield from snake(f"{half}.snake_out", f"{half}.layers.{blocks + 1}")
        yield from conv(f"{half}.conv_out", f"{half}.layers.{blocks + 2}", bias=half == "encoder")
    for index in range(config.transformer_depth):
        ours, official = f"transformer.layers.{index}", f"transformers.layers.{index}"
        for our_part, official_part in (
            ("attention_norm.weight", "pre_norm.gamma"),
            ("attention.qkv.weight", "self_attn.to_qkv.weight"),
            ("attention.out.weight", "self_attn.to_out.weight"),
            ("feed_forward_norm.weight", "ff_norm.gamma"),
            ("feed_forward.value_gate.weight", "ff.ff.0.proj.weight"),
            ("feed_forward.value_gate.bias", "ff.ff.0.proj.bias"),
            ("feed_forward.out.weight", "ff.ff.2.weight"),
            ("feed_forward.out.bias", "ff.ff.2.bias"),
        ):
            yield f"{ours}.{our_part}", f"{official}.{official_part}", "plain"
