"""The file to resume training from elsewhere: last weights, discriminator, optimizers; without pickle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ear_vae._atomic import atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import read_safetensors
from ear_vae.training.checkpoint_reading import are_moments, require_state

TRAINING_STATE_FILE = "training_state.safetensors"
_FORMAT = "ear-vae-training-state"
_PARTS = ("vae", "discriminator", "balancer")
_ENCODER = "vae.encoder."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_training_state(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes the training state out of a checkpoint's content; an existing file is replaced.

    Raises:
        EarVAEError: The file cannot be written, an optimizer is not AdamW or has not taken a step yet.
    """
    metadata = {"format": _FORMAT, "step": str(checkpoint["global_step"])}
    with atomic_path(path, overwrite=True) as temporary:
        save_file(_tensors(checkpoint), temporary, metadata=metadata)


def load_training_state(module: nn.Module, path: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Loads the weights of a training state into a module.

    Args:
        module: An `EarVAEModule` of the same architecture.
        path: A file that `release` wrote.

    Returns:
        Moments of every parameter, by name of the optimizer, of the parameter and of the moment.

    Raises:
        EarVAEError: The file is unreadable, no training state, of another architecture, or holds values that
            are not finite.
    """
    tensors, _ = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise EarVAEError(f"{path}: is not a training state of ear-vae")
    own = {name: tensor for name, tensor in module.state_dict().items() if name.partition(".")[0] in _PARTS}
    found = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in _PARTS}
    different = [
        name
        for name in own.keys() | found.keys()
        if name not in own or name not in found or own[name].shape != found[name].shape
    ]
    if different:
        raise EarVAEError(f"{path}: {_why_different(different, own, found)}")
    require_state(path, found, own)
    module.load_state_dict(found, strict=False)
    moments: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        if rest:
            parameter, _, moment = rest.rpartition("/")
            moments.setdefault(part, {}).setdefault(parameter, {})[moment] = tensor
    return moments


def _why_different(different: Collection[str], own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Says why weights do not fit, and what to change where that can be told."""
    if all(name.startswith(_ENCODER) for name in different):
        # Only what is trained has its norm apart from its direction.
        trained_here, trained_there = (
            any(name.startswith(_ENCODER) and ".parametrizations." in name for name in state)
            for state in (own, found)
        )
        if trained_here != trained_there:
            whole = {True: "trained the encoder", False: "left the encoder as it was"}
            return (
                f"comes from a run that {whole[trained_there]}, and this run would not; set train_encoder to "
                f"{str(trained_there).lower()}, as that run did"
            )
    cure = ""
    if all(name.startswith("discriminator.") for name in different):
        cure = "; give the discriminator the settings that it was trained with"
    return f"is of another architecture: {len(different)} tensors do not fit, such as {min(different)}{cure}"


def restore_moments(
    optimizer: torch.optim.Optimizer, network: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Restores the moments of the optimizer of a network's trained parameters.

    Raises:
        EarVAEError: The optimizer is not AdamW, or the moments of a parameter are missing or do not fit it.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise EarVAEError(
            f"the training state holds the moments of AdamW, not of {type(optimizer).__name__}; leave out "
            "training_state, or the algorithm"
        )
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    missing = [name for name in names if name not in moments]
    if missing:
        raise EarVAEError(
            f"the training state has no moments of {len(missing)} weights, such as {missing[0]}"
        )
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    wrong = [name for name in names if not _fit(moments[name], shapes[name])]
    if wrong:
        raise EarVAEError(
            f"the training state is damaged: the moments of {len(wrong)} weights do not fit, "
            f"such as {wrong[0]}"
        )
    state = optimizer.state_dict()
    state["state"] = {index: dict(moments[name]) for index, name in enumerate(names)}
    optimizer.load_state_dict(state)


def _fit(moments: Mapping[str, Tensor], shape: torch.Size) -> bool:
    return set(moments) == set(_MOMENTS) and are_moments(moments, shape)


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = checkpoint["state_dict"]
    if others := set(checkpoint["ear_vae"]["optimizers"]) - {"AdamW"}:
        raise EarVAEError(
            f"a training state holds the moments of AdamW only, not of {', '.join(sorted(others))}"
        )
    kept = {key: v.contiguous() for key, v in state.items() if key.partition(".")[0] in _PARTS}
    trained = checkpoint["ear_vae"]["trained"]
    for (part, parameters), optimizer in zip(trained.items(), checkpoint["optimizer_states"], strict=True):
        if not optimizer["state"]:
            raise EarVAEError(
                f"the optimizer of the {part} has not taken a step, so it has no state to go on with"
            )
        for index, parameter in enumerate(parameters):
            for moment in _MOMENTS:
                kept[f"{part}/{parameter}/{moment}"] = optimizer["state"][index][moment].contiguous()
    return kept
