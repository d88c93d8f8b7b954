"""From a training checkpoint to files for others: a model to use, and all it takes to train it further."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ear_vae._files import atomic_path
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.official import load_tensors
from ear_vae.training.training_state import TRAINING_STATE_FILE, save_training_state
from ear_vae.training.weight_norm import apply_weight_norm, plain_weights
from ear_vae.vae import EarVAE
from ear_vae.weights import CARD_FILE, CONFIG_FILE, model_card


def release(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    averaged: bool = True,
    training_state: bool = False,
    overwrite: bool = False,
) -> Path:
    """Turns a training checkpoint into a folder for `EarVAE.from_pretrained` and the Hub.

    Args:
        checkpoint: A `.ckpt` file that `ear-vae fit` wrote.
        directory: Of the model: weights, config, and a card with the facts of the run.
        name: Of the model, the directory's by default.
        averaged: Take the average of the weights, where there is one, instead of the last ones.
        training_state: Also write `training_state.safetensors`: the last weights, the discriminator and both
            optimizers, for `EarVAEModule(training_state=...)`.
        overwrite: Replace a model that is there.

    Returns:
        The directory.

    Raises:
        EarVAEError: The checkpoint is unreadable or of another program, the directory holds a model already
            or cannot be written to.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    content = _read(checkpoint)
    if (directory / CONFIG_FILE).exists() and not overwrite:
        raise EarVAEError(f"{directory}: holds a model already; remove it, or overwrite it (--force)")
    state: dict[str, Tensor] = content["state_dict"]
    config = EarVAEConfig.from_dict(content["ear_vae"]["config"])
    vae = EarVAE(config, name=name or directory.name)
    average = {
        key: state[f"average.network.{key}"] for key in vae.state_dict() if averaged and _has_average(state)
    }
    vae.load_state_dict(
        average or _folded(config, state, frozen_encoder=not content["ear_vae"]["train_encoder"])
    )
    vae.save_pretrained(directory)
    with atomic_path(directory / CARD_FILE, overwrite=True) as temporary:
        temporary.write_text(_card(vae, content, "average of the" if average else "last"), encoding="utf-8")
    if training_state:
        save_training_state(content, directory / TRAINING_STATE_FILE)
    return directory


def _read(path: Path) -> dict[str, Any]:
    content = load_tensors(path)
    if not isinstance(content, dict) or not {"state_dict", "ear_vae", "optimizer_states"} <= content.keys():
        raise EarVAEError(f"{path}: not a checkpoint of ear-vae fit")
    return content


def _has_average(state: Mapping[str, Tensor]) -> bool:
    return "average.updates" in state


def _folded(config: EarVAEConfig, state: Mapping[str, Tensor], *, frozen_encoder: bool) -> dict[str, Tensor]:
    network = EarVAE(config)
    names = list(network.state_dict())
    apply_weight_norm(network.decoder if frozen_encoder else network)
    network.load_state_dict(
        {key.removeprefix("vae."): v for key, v in state.items() if key.startswith("vae.")}
    )
    return plain_weights(network, names)


def _card(vae: EarVAE, content: Mapping[str, Any], which: str) -> str:
    facts = content["ear_vae"]
    discriminator = facts["discriminator"]
    rows = {
        "steps": content["global_step"],
        "weights": f"{which} weights",
        "parameters": f"{sum(p.numel() for p in vae.parameters()):,}",
        "discriminator": "none"
        if discriminator is None
        else ", ".join(f"{k} {v}" for k, v in discriminator.items()),
        "encoder trained": "yes" if facts["train_encoder"] else "no",
        "steps left out": sum(facts["skipped"]),
        **facts["settings"],
        **{f"`{name}`": f"{value:.4g}" for name, value in facts["validation"].items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{model_card(vae)}\n## Training\n\n| | |\n|---|---|\n{table}\n"
