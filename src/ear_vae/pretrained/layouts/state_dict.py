"""The state dict of one autoencoder, out of what people save around it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.limits import shown

# What trainers put a state dict under; the averaged weights go first, beside which others may be a decoy.
_WRAPPERS = ("gen_ema", "gen", "state_dict", "model")
# What an averaging wrapper of a generator calls its copy, beside counters of its own.
_AVERAGED = "ema_model."
_DEEPEST = 3
# Of our own `ear-vae fit`.
_TRAINING_KEYS = {"pytorch-lightning_version", "ear_vae"}
# Every layout of the family has this bias, with weight norm or without.
_FIRST = re.compile(r"(?P<prefix>(?:[^.]+\.)*?)encoder\.(?P<first>layers\.0|conv_in|conv1)\.bias")
_OTHER_NETWORKS = {"refiner_window": "εar-VAE2, another network, which this package does not have"}


def autoencoder_state(path: Path | str, content: Any) -> dict[str, Tensor]:
    """The tensors of an autoencoder, without wrappers around the dict and prefixes before the names.

    Args:
        path: Where it came from, for messages.
        content: A state dict, or a dict that has one under `gen_ema`, `gen`, `state_dict` or `model`.

    Raises:
        EarVAEError: It is no state dict, a training checkpoint of this package, of another network, or of
            more than one autoencoder.
    """
    state = _flat(path, content)
    for name, network in _OTHER_NETWORKS.items():
        if name in state:
            raise EarVAEError(f"{path}: these are weights of {network}")
    prefixes = {match["prefix"] for name in state if (match := _FIRST.fullmatch(name))}
    if not prefixes:
        raise EarVAEError(
            f"{path}: has no tensors of an εar-VAE, but {shown(sorted(state)[:4])}; expected the state dict "
            "of an autoencoder, such as the authors' ear_vae_44k.pyt"
        )
    if len(prefixes) > 1:
        raise EarVAEError(
            f"{path}: holds several autoencoders, under {shown(sorted(prefixes))}; save the state dict of one"
        )
    (prefix,) = prefixes
    if others := sorted(name for name in state if not name.startswith(prefix)):
        raise EarVAEError(
            f"{path}: holds more than the autoencoder under {prefix!r}: {len(others)} tensors such as "
            f"{shown(others[:3])}; save the state dict of the autoencoder alone"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def first_convolution(state: Mapping[str, Tensor]) -> str:
    """Which name the encoder's first convolution has, by which layouts are told apart.

    Args:
        state: What `autoencoder_state` returned.

    Returns:
        `layers.0` (the authors', stable-audio-tools), `conv_in` (ours) or `conv1` (diffusers).
    """
    return next(match["first"] for name in state if (match := _FIRST.fullmatch(name)))


def _flat(path: Path | str, content: Any) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            raise EarVAEError(f"{path}: expected a state dict, found {_kind(content)}")
        if content.keys() >= _TRAINING_KEYS:
            raise EarVAEError(
                f"{path}: is a training checkpoint of ear-vae fit; ear-vae release makes a model of it"
            )
        name = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        content = content[name]
        if name == "gen_ema" and (averaged := [key for key in content if str(key).startswith(_AVERAGED)]):
            content = {str(key).removeprefix(_AVERAGED): content[key] for key in averaged}
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange or not content or not all(isinstance(name, str) for name in content):
        found = ", ".join(f"{name!s}: {_kind(content[name])}" for name in (strange or list(content))[:4])
        raise EarVAEError(
            f"{path}: expected a state dict, a dict of tensors by name, alone or under one of "
            f"{', '.join(_WRAPPERS)}; found {found or 'an empty dict'}"
        )
    return dict(content)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
