"""Weights on disk in our own layout: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ear_vae._atomic import atomic_path, signals_held
from ear_vae._dtype import STORED_DTYPES
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import pack_facts, shown, unpack_facts
from ear_vae.network import Autoencoder
from ear_vae.pretrained.card import ModelCardFacts, model_card

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
CARD_IS_THERE = "a card is there already, and stays; remove it, or leave out card and edit it"
_FORMAT, _FORMAT_VERSION = "ear-vae", 1


@dataclass(frozen=True)
class Checkpoint:
    """A folder in our own layout with a model.

    Attributes:
        folder: Path of the folder.
        name: Name of the model.
    """

    folder: Path
    name: str


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Computes the sha256 of the names, shapes and values of a state dict, in the order of the names.

    The values are rounded to bfloat16, so that a model has one fingerprint in every dtype that it runs in.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        rounded = state[name].detach().to(torch.float32).to(torch.bfloat16).to("cpu").contiguous()
        digest.update(f"{name}{list(rounded.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy().reshape(-1).data)
    return digest.hexdigest()


def read_folder(folder: Path) -> tuple[EarVAEConfig, dict[str, Tensor]]:
    """Reads the config and the state dict, in float32, of a folder in our layout.

    Raises:
        EarVAEError: A file is missing or damaged, the tensors do not fit the config, or are not those that
            the file was written with.
    """
    config = EarVAEConfig.from_json(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    # Tensors made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        stored, facts = read_safetensors(path)
        # Both go through all weights, which for the published model takes half a second each.
        with ThreadPoolExecutor(1, "ear-vae-fingerprint") as thread:
            stated = thread.submit(require_stated, path, stored, facts)
            require_fit(path, stored, expected_shapes(config, path=path))
        stated.result()
        state = {name: tensor.float().contiguous() for name, tensor in stored.items()}
    return config, state


def require_stated(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Refuses weights that are not those that their file was written with.

    Args:
        path: The file, for messages.
        state: Our state dict.
        facts: What the file states; one that another program wrote may state no fingerprint.

    Raises:
        EarVAEError: The weights have another fingerprint.
    """
    stated = facts.get("weights_sha256")
    if stated is not None and stated != (found := fingerprint(state)):
        raise EarVAEError(
            f"{path}: its weights have the fingerprint {found}, the file states {shown(stated)}: it is "
            "damaged, or was changed after it was written; write changed weights with "
            "EarVAE.save_pretrained, or fetch the file again",
            argument="force_download",
        )


def write_folder(
    directory: str | os.PathLike[str],
    config: EarVAEConfig,
    state: Mapping[str, Tensor],
    *,
    name: str,
    dtype: torch.dtype | None = None,
    card: ModelCardFacts | None = None,
) -> None:
    """Writes a folder in our layout; weights and config that are there are replaced, both or neither.

    A card that is there stays.

    Args:
        directory: Folder to write, made if needed.
        config: Architecture of the model.
        state: State dict that fits the config.
        name: Name of the model in its card.
        dtype: Dtype to store the weights in; by default that of each tensor. The file states the fingerprint
            of the stored values.
        card: What the author adds to the card, for a folder without one.

    Raises:
        EarVAEError: The tensors are not those of the config, as of a network with weight norm or one that
            torch.compile has wrapped; they are not finite, or not in this dtype; the dtype is none that
            weights are stored in; there is a card, which these facts would not get into; or the folder cannot
            be written to.
    """
    directory = Path(directory)
    if dtype not in (None, *STORED_DTYPES):
        names = ", ".join(str(known).removeprefix("torch.") for known in STORED_DTYPES)
        raise EarVAEError(f"weights cannot be stored as {shown(dtype)}; choose one of torch's {names}")
    shapes = expected_shapes(config, path=directory)
    # What could not be loaded again is not written.
    _require_writable(directory, state, shapes)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in state.items():
        stored[key] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        # Tied weights are stored twice: safetensors refuses to write one memory under two names.
        if (storage := stored[key].untyped_storage().data_ptr()) in storages:
            stored[key] = stored[key].clone()
        storages.add(storage)
    if dtype is not None:
        _require_writable(directory, stored, shapes)
    if card is not None and (directory / CARD_FILE).exists():
        raise EarVAEError(f"{directory / CARD_FILE}: {CARD_IS_THERE}")
    text = model_card(config, name, num_parameters=num_parameters(state), facts=card)
    facts = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "weights_sha256": fingerprint(stored),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Both are moved into place at once, so that a model that was there is not left with one of the two.
        with (
            signals_held(),
            atomic_path(directory / WEIGHTS_FILE, overwrite=True) as new_weights,
            atomic_path(directory / CONFIG_FILE, overwrite=True) as new_config,
        ):
            save_file(stored, new_weights, metadata=pack_facts(facts))
            new_config.write_text(config.to_json(), encoding="utf-8")
        _write_card(directory / CARD_FILE, text)
    except (OSError, SafetensorError) as error:
        raise EarVAEError(f"{directory}: cannot write the model: {error}") from error


def num_parameters(state: Mapping[str, Tensor]) -> int:
    """Returns the number of values in a state dict: networks of this family have no buffers."""
    return sum(tensor.numel() for tensor in state.values())


def statistics_of(folder: str | os.PathLike[str]) -> tuple[Sequence[float], Sequence[float]] | None:
    """Returns mean and standard deviation of each latent channel that a model's folder has; None without.

    Args:
        folder: Folder in our layout.

    Raises:
        EarVAEError: It is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise EarVAEError(
            f"{folder}: is no folder; give that of a model; ear-vae convert NAME FOLDER makes one"
        )
    config = EarVAEConfig.from_json(path / CONFIG_FILE)
    if config.latents_mean is None or config.latents_std is None:
        return None
    return config.latents_mean, config.latents_std


def write_statistics(
    folder: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Writes the statistics of its latents into the `config.json` of a model, in the place of others.

    Args:
        folder: Folder in our layout.
        mean: Mean of each latent channel.
        std: Standard deviation of each latent channel.

    Raises:
        EarVAEError: The folder is none of a model, or cannot be written to; the model has another number
            of channels, or a standard deviation is not above 0.
    """
    path = Path(folder) / CONFIG_FILE
    config = EarVAEConfig.from_json(path)
    try:
        config = replace(config, latents_mean=tuple(mean), latents_std=tuple(std))
    except EarVAEError as error:
        raise EarVAEError(f"{folder}: {error}") from error
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def _write_card(path: Path, card: str) -> None:
    """Writes a card unless there is one, which stays, also one that another process writes meanwhile."""
    try:
        with atomic_path(path, overwrite=False) as temporary:
            temporary.write_text(card, encoding="utf-8")
    except EarVAEError:
        if not path.is_file():
            raise


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads all tensors of a safetensors file, and what `write_folder` stated about them.

    Raises:
        EarVAEError: The file is missing, truncated, not a safetensors file, of a dtype that torch does not
            have, or written by a later version of this package.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = unpack_facts(file.metadata())
            if facts and (facts.get("format"), facts.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
                found = f"{shown(facts.get('format'))} of version {shown(facts.get('format_version'))}"
                raise EarVAEError(
                    f"{path}: is {found}, this ear-vae reads {_FORMAT!r} of version {_FORMAT_VERSION}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise EarVAEError(f"{path}: the weights file is missing") from None
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        # The last two from dtypes that this torch has not.
        raise EarVAEError(f"{path}: not a readable safetensors file: {error}") from error


def require_fit(path: Path | str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuses a state dict whose names, shapes or dtypes are not those of the network.

    Raises:
        EarVAEError: Lists missing, unexpected, misshapen, non-floating, non-dense and non-finite tensors, and
            those beyond the range of float32, in which the network runs.
    """
    problems = [f"missing {name}" for name in shapes if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in shapes]
    for name in sorted(shapes.keys() & state.keys()):
        tensor = state[name]
        if tensor.shape != shapes[name]:
            problems.append(f"{name} is {list(tensor.shape)} instead of {list(shapes[name])}")
        elif problem := unusable(tensor):
            problems.append(f"{name} {problem}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise EarVAEError(f"{path}: the weights do not fit the config: {shown}")


def unusable(tensor: Tensor) -> str | None:
    """Says what keeps a tensor from being a weight, whatever its shape; None if nothing does."""
    if tensor.dtype not in STORED_DTYPES:
        return f"is {tensor.dtype} instead of float32 or another floating dtype"
    if tensor.layout != torch.strided:
        return f"is {tensor.layout} instead of dense"
    if tensor.is_meta:
        return "has no values (it lies on the meta device)"
    if not tensor.isfinite().all():
        return "holds NaN or infinity"
    # Only float64 goes beyond it.
    if tensor.dtype == torch.float64 and not tensor.float().isfinite().all():
        return "holds values beyond the range of float32"
    return None


def _require_writable(directory: Path, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    try:
        require_fit(directory, state, shapes)
    except EarVAEError as error:
        raise EarVAEError(
            f"{error}; nothing was written: a model in training is written by EarVAEModule.export, any other "
            "needs plain, finite weights"
        ) from None


def expected_shapes(config: EarVAEConfig, *, path: Path | str) -> dict[str, torch.Size]:
    """Returns the name and shape of every tensor of our state dict.

    Args:
        config: Architecture of the model.
        path: Path that the config came from, for messages.

    Raises:
        EarVAEError: The config names an unknown architecture, or asks for tensors beyond any memory.
    """
    try:
        with torch.device("meta"):
            network = Autoencoder(config)
    except EarVAEError as error:
        raise EarVAEError(f"{path}: {error}") from None
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise EarVAEError(f"{path}: its config asks for impossibly large tensors: {config}") from error
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
