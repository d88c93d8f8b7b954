"""Weights on disk: our own folder, the official state dicts, and the way from one to the other."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError

if TYPE_CHECKING:
    from ear_vae.vae import EarVAE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
_FORMAT = "ear-vae"
_ROTARY_KEY = "transformers.rotary_pos_emb.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A folder in our own layout, and the name its model goes by."""

    folder: Path
    name: str


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(memoryview(values.numpy()).cast("B") if values.numel() else b"")
    return digest.hexdigest()


def load_pretrained(cls: type[EarVAE], checkpoint: Checkpoint) -> EarVAE:
    """Builds the model of a folder in our layout, in evaluation mode, frozen, in float32.

    Raises:
        EarVAEError: A file is missing or damaged, or the tensors do not fit the config.
    """
    config = EarVAEConfig.from_json(checkpoint.folder / CONFIG_FILE)
    path = checkpoint.folder / WEIGHTS_FILE
    state, metadata = read_safetensors(path)
    with torch.device("meta"):
        vae = cls(config, name=checkpoint.name)
    require_fit(path, state, {name: tensor.shape for name, tensor in vae.state_dict().items()})
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    vae.eval().requires_grad_(False)
    if "weights_sha256" in metadata:
        vae._fingerprint = (metadata["weights_sha256"], sum(p._version for p in vae.parameters()))
    return vae


def save_pretrained(vae: EarVAE, directory: Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a folder in our layout; existing files of the same names are replaced one by one.

    Args:
        vae: The model.
        directory: The folder, made if needed.
        dtype: Dtype to store, the model's own by default; the fingerprint is that of the stored values.

    Raises:
        EarVAEError: The folder cannot be written to.
    """
    from ear_vae._files import atomic_path

    state = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in vae.state_dict().items()
    }
    sha256 = vae.weights_sha256 if dtype in (None, vae.dtype) else fingerprint(state)
    metadata = {"format": _FORMAT, "weights_sha256": sha256}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(directory / WEIGHTS_FILE, overwrite=True) as temporary:
            save_file(state, temporary, metadata=metadata)
        with atomic_path(directory / CONFIG_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(vae.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if not (directory / CARD_FILE).exists():
            with atomic_path(directory / CARD_FILE, overwrite=False) as temporary:
                temporary.write_text(model_card(vae), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise EarVAEError(f"{directory}: cannot write the model: {error}") from error


def model_card(vae: EarVAE) -> str:
    """A minimal card for the Hub: what the folder holds and how to load it."""
    config = vae.config
    return (
        "---\nlibrary_name: ear-vae\ntags:\n- audio\n- music\n- vae\n---\n\n"
        f"# {vae.name}\n\nεar-VAE weights for the `ear-vae` package: {config.sample_rate} Hz, "
        f"{config.audio_channels} channels, {config.latent_dim} latent channels at "
        f"{config.latent_rate:.2f} Hz.\n\n```python\nfrom ear_vae import EarVAE\n\n"
        'vae = EarVAE.from_pretrained("path/to/this/folder")\n```\n'
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata.

    Raises:
        EarVAEError: The file is missing, truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise EarVAEError(f"{path}: the weights file is missing") from None
    except (OSError, SafetensorError) as error:
        raise EarVAEError(f"{path}: not a readable safetensors file: {error}") from error


def require_fit(path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuses a state dict whose names, shapes or dtypes are not those of the network.

    Raises:
        EarVAEError: Lists missing, unexpected, misshapen and non-floating tensors.
    """
    problems = [f"missing {name}" for name in shapes if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in shapes]
    for name in shapes.keys() & state.keys():
        if state[name].shape != shapes[name]:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(shapes[name])}")
        elif not state[name].is_floating_point():
            problems.append(f"{name} is {state[name].dtype} instead of a floating dtype")
        elif not state[name].isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise EarVAEError(f"{path}: the weights do not fit the config: {shown}")


def read_official(path: Path) -> dict[str, Tensor]:
    """The state dict of an official `.pyt`, unpickled with tensors only: nothing in it can run.

    Raises:
        EarVAEError: The file is missing, damaged, or holds anything but a flat dict of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EarVAEError(f"{path}: the weights file is missing") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise EarVAEError(f"{path}: refused, the pickle is damaged or holds more than tensors: {reason}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise EarVAEError(f"{path}: not a readable PyTorch file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EarVAEError(f"{path}: expected a flat dict of tensors, as the official weights are")
    return dict(state)


def official_config(values: Any, *, sample_rate: int, state: Mapping[str, Tensor]) -> EarVAEConfig:
    """Our config for an official one; whether there is a transformer is decided by the weights.

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
        depth = len({key.split(".")[2] for key in state if key.startswith("transformers.layers.")})
        config = EarVAEConfig(
            sample_rate=sample_rate,
            audio_channels=values["io_channels"],
            channels=encoder["channels"],
            channel_multipliers=encoder["c_mults"],
            strides=encoder["strides"],
            latent_dim=values["latent_dim"],
            transformer_depth=depth,
            transformer_head_dim=transformer.get("dim_heads", EarVAEConfig.transformer_head_dim),
        )
        if values["downsampling_ratio"] != config.downsampling_ratio:
            unsupported.append("downsampling_ratio")
    except (KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(f"official config: field missing or of the wrong type: {error!r}") from error
    if unsupported:
        raise EarVAEError(f"official config: unsupported or inconsistent values of {', '.join(unsupported)}")
    return config


def to_official_config(config: EarVAEConfig) -> dict[str, Any]:
    """The official config of the same architecture."""
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


def from_official(path: Path, state: Mapping[str, Tensor], config: EarVAEConfig) -> dict[str, Tensor]:
    """Our state dict for an official one: names changed, weight norm folded.

    Args:
        path: Where `state` came from, for messages.
        state: The official tensors.
        config: What they must fit.

    Raises:
        EarVAEError: Tensors are missing, unexpected or misshapen, or a norm has a bias.
    """
    for suffix in ("weight_g", "weight_v"):
        if not any(name.endswith(suffix) for name in state):
            raise EarVAEError(f"{path}: no {suffix} tensors: these are not official εar-VAE weights")
    expected = to_official({name: torch.empty(s, device="meta") for name, s in _shapes(config).items()}, config)
    require_fit(path, state, {name: tensor.shape for name, tensor in expected.items()})
    ours: dict[str, Tensor] = {}
    for name, official, kind in _names(config):
        if kind == "weight_norm":
            v = state[f"{official}.weight_v"].double()
            g = state[f"{official}.weight_g"].double()
            # In double precision: this runs once, and the folded weights then differ from the
            # normalised ones by the last rounding only.
            ours[f"{name}.weight"] = (v * (g / v.norm(dim=(1, 2), keepdim=True))).float()
        else:
            ours[name] = state[official].float()
    if any(state[name].any() for name in state if name.startswith("transformers.") and name.endswith("norm.beta")):
        raise EarVAEError(f"{path}: a norm of the transformer has a bias, which the published network has not")
    return ours


def to_official(state: Mapping[str, Tensor], config: EarVAEConfig) -> dict[str, Tensor]:
    """The official state dict of our tensors, with weight norm (v the weight itself, g its norm)."""
    official_state: dict[str, Tensor] = {}
    for name, official, kind in _names(config):
        if kind == "weight_norm":
            weight = state[f"{name}.weight"]
            norm = weight.norm(dim=(1, 2), keepdim=True)
            official_state[f"{official}.weight_g"] = norm
            # An all-zero kernel has no direction: with any other one, g = 0 still gives zeros, not 0/0.
            official_state[f"{official}.weight_v"] = torch.where(norm == 0, torch.ones_like(weight), weight)
        else:
            official_state[official] = state[name]
            if official.endswith("norm.gamma"):
                official_state[official.replace("gamma", "beta")] = torch.zeros_like(state[name])
    if config.transformer_depth:
        from ear_vae.network.transformer import ROTARY_BASE

        like = official_state["transformers.layers.0.pre_norm.gamma"]
        exponents = torch.arange(0, config.transformer_head_dim, 2, device=like.device) / config.transformer_head_dim
        official_state[_ROTARY_KEY] = ROTARY_BASE**-exponents
    return official_state


def _shapes(config: EarVAEConfig) -> dict[str, torch.Size]:
    from ear_vae.vae import EarVAE

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EarVAE(config).state_dict().items()}


def _names(config: EarVAEConfig) -> Iterator[tuple[str, str, str]]:
    """(our name, official name, kind) of every tensor; for kind `weight_norm` both are prefixes."""

    def conv(ours: str, official: str, *, bias: bool = True) -> Iterator[tuple[str, str, str]]:
        yield ours, official, "weight_norm"
        if bias:
            yield f"{ours}.bias", f"{official}.bias", "plain"

    def snake(ours: str, official: str) -> Iterator[tuple[str, str, str]]:
        yield f"{ours}.log_alpha", f"{official}.alpha", "plain"
        yield f"{ours}.log_beta", f"{official}.beta", "plain"

    def residual(ours: str, official: str) -> Iterator[tuple[str, str, str]]:
        yield from snake(f"{ours}.snake", f"{official}.layers.0")
        # The shared Snake is stored twice; the second copy is written, and read, like the first.
        yield from snake(f"{ours}.snake", f"{official}.layers.2")
        yield from conv(f"{ours}.conv_dilated", f"{official}.layers.1")
        yield from conv(f"{ours}.conv_pointwise", f"{official}.layers.3")

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
