"""Turning a training checkpoint into files for others: a model, and what it takes to train it further."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.evaluation import METRICS
from ear_vae.pretrained import Figures, ModelCardFacts, bundled_checkpoints
from ear_vae.pretrained.card import model_card
from ear_vae.pretrained.folder import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    expected_shapes,
    num_parameters,
    require_fit,
)
from ear_vae.pretrained.resolve import PUBLISHED_NAMES, PUBLISHED_REPOSITORY
from ear_vae.training.checkpoint_reading import FACTS, read_checkpoint, require_moments, require_state
from ear_vae.training.training_state import TRAINING_STATE_FILE, save_training_state
from ear_vae.training.weight_norm import apply_weight_norm, plain_weights
from ear_vae.vae import EarVAE


def release_model(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    averaged: bool = True,
    training_state: bool = False,
    overwrite: bool = False,
    card: ModelCardFacts | None = None,
) -> Path:
    """Turns a training checkpoint into a folder for `EarVAE.from_pretrained` and the Hub.

    A new folder appears only once everything is written, and the model in it could be loaded.

    Args:
        checkpoint: A `.ckpt` file that `ear-vae fit` wrote.
        directory: Folder for the weights, the config, and a card with the facts of the run.
        name: Name of the model; that of the directory by default.
        averaged: Take the average of the weights, where there is one, instead of the last ones.
        training_state: Also write `training_state.safetensors`: the last weights, the discriminator and both
            optimizers, for `EarVAEModule(training_state=...)`.
        overwrite: Replace a model that is there, its card and training state included.
        card: What to add to the card: licence, data, base model, figures. The training, its last validation
            and a start from the published weights are in it anyway.

    Returns:
        The directory.

    Raises:
        EarVAEError: The checkpoint is unreadable, damaged or of another program, its weights are not finite,
            the directory holds one of the files already or cannot be written to.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    written = [WEIGHTS_FILE, CARD_FILE, CONFIG_FILE]
    written += [TRAINING_STATE_FILE] if training_state else []
    if not overwrite and (there := [file for file in sorted(written) if (directory / file).exists()]):
        raise EarVAEError(
            f"{directory}: holds {'a model' if CONFIG_FILE in there else there[0]} already; "
            "remove it, or overwrite it",
            argument="overwrite",
        )
    content = read_checkpoint(checkpoint)
    averaged = averaged and any(key.startswith("ema.") for key in content["state_dict"])
    vae = _model(checkpoint, content, averaged=averaged, name=name or directory.resolve().name)
    require_moments(checkpoint, content)
    stale = [] if training_state else [TRAINING_STATE_FILE]
    with _complete_folder(directory, last=CONFIG_FILE, stale=stale) as folder:
        text = model_card(
            vae.config,
            vae.name,
            num_parameters=num_parameters(vae.state_dict()),
            facts=_with_run(card or ModelCardFacts(), content),
            training=_training(content, "average of the" if averaged else "last"),
        )
        (folder / CARD_FILE).write_text(text, encoding="utf-8")
        vae.save_pretrained(folder)
        if training_state:
            save_training_state(content, folder / TRAINING_STATE_FILE)
        loaded = EarVAE.from_pretrained(folder).state_dict()
        if not all(torch.equal(loaded[key], tensor) for key, tensor in vae.state_dict().items()):
            raise EarVAEError(
                f"{directory}: the model that was written does not load as it was; is the disk damaged?"
            )
    return directory


def _model(path: Path, content: Mapping[str, Any], *, averaged: bool, name: str) -> EarVAE:
    """Builds the model in a checkpoint.

    Raises:
        EarVAEError: Its weights are not those of its config, or not finite.
    """
    try:
        config = EarVAEConfig.from_dict(content[FACTS]["config"])
    except EarVAEError as error:
        raise EarVAEError(f"{path}: {error}") from error
    prefix = "ema.network." if averaged else "vae."
    state = {
        key.removeprefix(prefix): tensor
        for key, tensor in content["state_dict"].items()
        if key.startswith(prefix)
    }
    shapes = expected_shapes(config, path=path)
    if averaged:
        require_fit(path, state, shapes)
    else:
        # Takes memory only once the tensors turn out to be those of the config.
        with torch.device("meta"):
            network = EarVAE(config)
            apply_weight_norm(network if content[FACTS]["train_encoder"] else network.decoder)
        require_state(path, state, network.state_dict())
        network.load_state_dict(state, assign=True)
        state = plain_weights(network, shapes)
        require_fit(path, state, shapes)
    vae = EarVAE(config, name=name)
    vae.load_state_dict(state)
    return vae


@contextmanager
def _complete_folder(directory: Path, *, last: str, stale: Sequence[str]) -> Iterator[Path]:
    """Gives an empty folder beside `directory`, whose files are moved there once all of them are written.

    A new directory appears with all of them at once; in one that is there, the `stale` files are removed, and
    the new ones replace those of the same names one by one, `last` last.

    Raises:
        EarVAEError: The directory cannot be written to.
    """
    try:
        target = directory.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ear-vae-", dir=target.parent) as temporary:
            # One level below, with the permissions of any new folder; that of `tempfile` is private.
            folder = Path(temporary) / "folder"
            folder.mkdir()
            yield folder
            if not target.exists():
                folder.rename(target)
                return
            for name in stale:
                (target / name).unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
                os.replace(file, target / file.name)
    except OSError as error:
        raise EarVAEError(f"{directory}: cannot be written to: {error.strerror or error}") from error


def _training(content: Mapping[str, Any], which: str) -> dict[str, str]:
    """How the weights came to be, by name; a checkpoint may come from anywhere, and holds any text."""
    facts = content[FACTS]
    discriminator = facts["discriminator"]
    start = _public_start(content)
    rows = {
        "steps": content["global_step"],
        "weights": f"{which} weights",
        **({} if start is None else {"start": f"the weights of {start}"}),
        "discriminator": "none"
        if discriminator is None
        else ", ".join(f"{k} {v}" for k, v in discriminator.items()),
        "encoder trained": "yes" if facts["train_encoder"] else "no",
        "steps left out": sum(facts["skipped"]),
        **facts["settings"],
    }
    return {str(name): str(value) for name, value in rows.items()}


def _public_start(content: Mapping[str, Any]) -> str | None:
    """The model that the run started from, if others know its name: folders are the user's own."""
    start = content["hyper_parameters"].get("pretrained")
    public = (*PUBLISHED_NAMES, *bundled_checkpoints())
    return start if isinstance(start, str) and start in public else None


def _with_run(facts: ModelCardFacts, content: Mapping[str, Any]) -> ModelCardFacts:
    """Adds the last validation of the run and the published weights it started from to what is given."""
    validation = content[FACTS]["validation"]
    figures = list(facts.figures)
    if validation:
        metrics = [name for name in METRICS if f"validation/{name}" in validation]
        figures.append(
            Figures(
                description="The last validation of the run, as `ear-vae fit … --data.validation_folder "
                "MUSIC` logs it:",
                rows=(("", "mean"), *((name, f"{value:.4g}") for name, value in validation.items())),
                metrics=tuple(metrics),
            )
        )
    base_model = facts.base_model
    if base_model is None and _public_start(content) in PUBLISHED_NAMES:
        base_model = PUBLISHED_REPOSITORY
    return replace(facts, figures=figures, base_model=base_model)
