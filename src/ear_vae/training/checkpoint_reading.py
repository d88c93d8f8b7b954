"""Reading the checkpoints of `ear-vae fit`: nothing in them is run, and damaged ones are refused."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ear_vae.errors import EarVAEError
from ear_vae.limits import escaped, finite_number
from ear_vae.pretrained.folder import require_fit

# What our module adds to Lightning's content.
FACTS = "ear_vae"
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "hyper_parameters": dict,
    FACTS: dict,
}
_FACTS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "discriminator": (dict, type(None)),
    "train_encoder": bool,
    "skipped": list,
    "skipped in a row": list,
    "accumulated": dict,
    "optimizers": list,
    "trained": dict,
    "settings": dict,
    "validation": dict,
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: A `.ckpt` file that `ear-vae fit` wrote.

    Raises:
        EarVAEError: There is no such file, it is cut off or damaged, holds objects that only running
            code could restore, or is not a checkpoint of `ear-vae fit`.
    """
    if not path.is_file():
        raise EarVAEError(
            f"{path}: {'not a file' if path.exists() else 'no such file'}; expected a checkpoint"
        )
    try:
        with warnings.catch_warnings():
            # Of an odd pickle torch asks to be told; what is wrong with it is said below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds, and some texts advise running what is there
        raise EarVAEError(f"{path}: {_what_it_is(path, error)}") from error
    require_content(path, content)
    return dict(content)


def require_content(path: Path | str, content: Any) -> None:
    """Refuses what `ear-vae fit` does not write.

    Args:
        path: Path of the checkpoint, for messages.
        content: Content of the checkpoint.

    Raises:
        EarVAEError: Something is missing, of another type, or names a class.
    """
    if (
        not _has(content, _CONTENT)
        or not _has(content[FACTS], _FACTS)
        # Older ones Lightning would rewrite, which ours are not made for.
        or not re.fullmatch(r"[2-9]\d*\.\d+[\w.+]*", content["pytorch-lightning_version"])
    ):
        raise EarVAEError(f"{path}: is not a checkpoint of ear-vae fit")
    facts = content[FACTS]
    data = content.get("AudioDataModule", {})
    if named := _named_class(content["hyper_parameters"]):
        raise EarVAEError(
            f"{path}: its hyper-parameters name something to import ({named}), which is never done; "
            "ear-vae fit writes plain values only"
        )
    counts = [*facts["skipped"], *facts["skipped in a row"]]
    listed = [content["state_dict"].values(), counts, facts["validation"].values()]
    if (
        not isinstance(data, dict)
        or not isinstance(content["loops"].get("fit_loop"), dict)
        or not _is_accumulation(facts["accumulated"])
        or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in facts["trained"].values()
        )
        or not all(
            isinstance(value, kind)
            for values, kind in zip(listed, (Tensor, int, float), strict=True)
            for value in values
        )
    ):
        raise EarVAEError(f"{path}: damaged: its values are not of the types that ear-vae fit writes")


def require_moments(path: Path | str, content: Mapping[str, Any]) -> None:
    """Refuses states of optimizers that do not fit the trained parameters.

    Args:
        path: Path of the checkpoint, for messages.
        content: Content of the checkpoint.

    Raises:
        EarVAEError: An optimizer lacks a parameter, has one too many, or its moments are of another shape or
            not finite.
    """
    trained, states = content[FACTS]["trained"], content["optimizer_states"]
    kinds, weights = content[FACTS]["optimizers"], content["state_dict"]
    fits = len(trained) == len(states) == len(kinds) == len(content["lr_schedulers"]) and all(
        _fits_optimizer([weights.get(f"{network}.{name}") for name in names], state, kind)
        for (network, names), state, kind in zip(trained.items(), states, kinds, strict=True)
    )
    if not fits:
        raise EarVAEError(f"{path}: damaged: the states of its optimizers are not those of its weights")


def require_state(path: Path | str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses tensors of other names, shapes or kinds than the expected ones, and floats that are not finite.

    Args:
        path: Path of the checkpoint, for messages.
        state: Tensors in the checkpoint.
        expected: Tensors that should be there; only their names, shapes and dtypes are read.

    Raises:
        EarVAEError: Lists what is wrong.
    """
    counters = {name for name, tensor in expected.items() if not tensor.is_floating_point()}
    floats = {name: tensor for name, tensor in state.items() if name not in counters}
    require_fit(Path(path), floats, {name: t.shape for name, t in expected.items() if name not in counters})
    for name in sorted(counters):
        if name not in state or (state[name].shape, state[name].dtype) != (
            expected[name].shape,
            expected[name].dtype,
        ):
            raise EarVAEError(f"{path}: the weights do not fit the config: {name} is missing or no counter")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes which values differ, for people to read; values that only one side has are left out.

    Args:
        before: Values by name, as in a checkpoint.
        now: Values by name, as they are now.
    """
    return escaped(
        "; ".join(
            f"{name}: {before[name]} there, {value} here"
            for name, value in now.items()
            if name in before and before[name] != value
        )
    )


def require_own_files(
    path: Path | str, callbacks: Mapping[str, Any], folders: Collection[str | os.PathLike[str] | None]
) -> None:
    """Refuses names of earlier checkpoints that are not where this run writes its own.

    Lightning removes the earlier ones when better ones come, whatever stands there. Of a run in another
    folder it only remembers the best one; that is forgotten here.

    Args:
        path: Path of the checkpoint, for messages.
        callbacks: States of the callbacks in it.
        folders: Folders in which the callbacks of this run write checkpoints.

    Raises:
        EarVAEError: The state of a callback is damaged, or names something outside of its folder.
    """
    damaged = EarVAEError(
        f"{path}: damaged: it names earlier checkpoints outside of its folder, which training would remove"
    )
    if not isinstance(callbacks, Mapping):
        raise damaged
    for state in callbacks.values():
        if not isinstance(state, dict) or "best_model_path" not in state:
            continue
        best, others = state["best_model_path"], state.get("best_k_models", {})
        names = [best, state.get("kth_best_model_path", ""), state.get("last_model_path", "")]
        if not isinstance(others, dict) or not all(isinstance(name, str) for name in (*names, *others)):
            raise damaged
        if state.get("dirpath") not in folders:
            state["best_model_path"] = ""
        elif not all(name == "" or _lies_in(state["dirpath"], name) for name in (*names, *others)):
            raise damaged


def require_like(path: Path | str, state: Any, schedule: LRScheduler) -> None:
    """Refuses the state of another kind of schedule, with values missing or with some that replace methods.

    Args:
        path: Path of the checkpoint, for messages.
        state: State of a schedule in the checkpoint.
        schedule: Schedule of this run.

    Raises:
        EarVAEError: The state is not one of such a schedule.
    """
    if not _is_like(state, schedule.state_dict(), type(schedule)):
        raise EarVAEError(
            f"{path}: its learning-rate schedule is of another kind than this run's, or damaged; resume with "
            "the schedule it was made with, or start from the model it exported"
        )


def _has(content: Any, fields: Mapping[str, type | tuple[type, ...]]) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(name, ...), kind) for name, kind in fields.items()
    )


def _what_it_is(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "is empty (0 bytes)"
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if not is_archive:
        return "is not a checkpoint"
    if isinstance(error, pickle.UnpicklingError):
        return (
            "holds objects that only running code from the file could restore, which is never done; "
            "ear-vae fit writes none"
        )
    return "is cut off or damaged; take the checkpoint before it, or copy it again"


def _fits_optimizer(weights: Sequence[Tensor | None], state: Any, kind: str) -> bool:
    """Whether a state belongs to an optimizer of these weights; before its first step it has no moments.

    Only the moments of AdamW are checked; what other optimizers keep is not known.
    """
    try:
        groups, moments = state["param_groups"], state["state"]
        if [index for group in groups for index in group["params"]] != list(range(len(weights))):
            return False
        if kind != "AdamW":
            return moments.keys() <= set(range(len(weights)))
        rates = [group[name] for group in groups for name in ("lr", "eps", "weight_decay")]
        rates += [beta for group in groups for beta in group["betas"]]
        if not all(map(finite_number, rates)):
            return False
        return not moments or (
            moments.keys() == set(range(len(weights)))
            and all(
                weight is not None and are_moments(moments[index], weight.shape)
                for index, weight in enumerate(weights)
            )
        )
    except (TypeError, KeyError, AttributeError):
        return False


def are_moments(moments: Mapping[str, Tensor], shape: torch.Size) -> bool:
    """Whether AdamW can go on with these as the moments of a weight.

    Raises:
        TypeError, KeyError, AttributeError: They are nothing like it.
    """
    step, first, second = (moments[name] for name in ("step", "exp_avg", "exp_avg_sq"))
    return (
        step.numel() == 1
        and first.shape == second.shape == shape
        and all(bool(x.is_floating_point() and x.isfinite().all()) for x in (step, first, second))
        and float(step) >= 0
        and bool((second >= 0).all())
    )


def _lies_in(folder: str, name: str) -> bool:
    """Whether a path names a checkpoint in a folder itself, without looking at what is there."""
    return (
        "://" not in name
        and "::" not in name
        and (os.path.dirname(os.path.abspath(name)) == os.path.abspath(folder) and name.endswith(".ckpt"))
    )


def _is_like(state: Any, like: Any, owner: type = object) -> bool:
    """Whether plain values have the structure of others; of other versions, switches may be more or fewer."""
    if type(like) is dict:
        return (
            isinstance(state, dict)
            and all(
                _is_like(state[name], value) if name in state else isinstance(value, (bool, type(None)))
                for name, value in like.items()
            )
            and not any(hasattr(owner, str(name)) for name in state.keys() - like.keys())
        )
    if isinstance(like, (list, tuple)):
        if not isinstance(state, (list, tuple)):
            return False
        return len(state) != len(like) or all(map(_is_like, state, like))
    if isinstance(like, (int, float)) and not isinstance(like, bool):
        return finite_number(state)
    return True


def _named_class(values: Any) -> str:
    """Returns the first name in hyper-parameters that would make Lightning import something, else nothing."""
    if isinstance(values, dict):
        for name, value in values.items():
            if not isinstance(name, str) or name.startswith("_") or name in ("class_path", "init_args"):
                return str(name)
            if found := _named_class(value):
                return found
    elif isinstance(values, list):
        return next(filter(None, map(_named_class, values)), "")
    elif not isinstance(values, (str, int, float, bool, type(None))):
        return type(values).__name__
    return ""


def _is_accumulation(saved: Mapping[str, Any]) -> bool:
    """Whether this is an accumulation within a step: nothing, or some batches, values and gradients."""
    if not saved:
        return True
    batches, values, gradients = (saved.get(name) for name in ("batches", "values", "gradients"))
    return (
        isinstance(batches, list)
        and isinstance(values, dict)
        and isinstance(gradients, dict)
        and bool(batches)
        and all(isinstance(batch, Tensor) and batch.ndim == 4 for batch in batches)
        and all(isinstance(tensor, Tensor) for tensor in (*values.values(), *gradients.values()))
    )
