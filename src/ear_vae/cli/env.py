"""The command `ear-vae env`: what is installed, what does not work together, and how to fix it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import soundfile
import torch
from huggingface_hub import constants

from ear_vae import __version__
from ear_vae.cli.terminal import put_facts
from ear_vae.dsp._torchaudio import extension_problem
from ear_vae.pretrained.bundled import bundled_checkpoints
from ear_vae.pretrained.conversion_cache import conversions_folder

_REQUIRED = ("lightning", "huggingface_hub", "safetensors", "numpy", "soundfile")
# By the extra that installs them.
_OPTIONAL = {
    "transformers": "codecs",
    "diffusers": "diffusers",
    "audiogen-agc": "codecs",
    "tensorboard": "tensorboard",
    "matplotlib": "notebooks",
}


def run_env(options: argparse.Namespace) -> int:
    """Prints what is installed, what does not work together, and how to fix it."""
    put_facts(facts(), as_json=options.json)
    return 0


def facts() -> dict[str, Any]:
    """Returns versions, devices, caches and, under `problems`, a line for each problem with what to do.

    What looks like a problem but leaves nothing to do is under `notes`. Values are strings, or lists of
    strings.
    """
    problems: list[str] = []
    notes: list[str] = []
    found: dict[str, Any] = {
        "ear-vae": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {_build()}, {torch.get_num_threads()} threads",
        "devices": _devices(problems, notes),
        "torchaudio": _torchaudio(problems, notes),
        **{name: _version(name) or "missing" for name in _REQUIRED},
        "libsndfile": soundfile.__libsndfile_version__,
        "ffmpeg": _ffmpeg(problems),
        "triton": _version("triton") or "not installed",
        **{
            name: _version(name) or f'not installed; pip install "ear-vae[{extra}]"'
            for name, extra in _OPTIONAL.items()
        },
        "models": sorted(bundled_checkpoints()),
        "caches": _caches(problems),
    }
    if not found["models"]:
        problems.append("no bundled model was found; install the package again")
    return {**found, "problems": problems, "notes": notes}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"


def _devices(problems: list[str], notes: list[str]) -> list[str]:
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    has_driver = shutil.which("nvidia-smi") is not None
    if len(devices) == 1 and torch.version.cuda and not has_driver:
        notes.append(
            "this torch is built for CUDA and there is no NVIDIA driver: nothing to do, unless there is a GPU"
        )
    elif len(devices) == 1 and torch.version.cuda:
        problems.append(
            f"torch sees no GPU, though there is an NVIDIA driver; the driver may be too old for CUDA "
            f"{torch.version.cuda}: compare with what nvidia-smi says, update it or install a torch for it"
        )
    elif len(devices) == 1 and has_driver and not torch.version.hip:
        problems.append(
            "there is an NVIDIA driver, but this torch is built for the CPU alone; install a CUDA build of "
            "torch (https://pytorch.org/get-started)"
        )
    return devices


def _torchaudio(problems: list[str], notes: list[str]) -> str:
    version = _version("torchaudio")
    if version is None:
        problems.append("torchaudio is missing; pip install torchaudio")
        return "missing"
    reason = extension_problem()
    if reason is None:
        return f"{version}, its compiled extension fits"
    beside = [name for name in ("transformers", "diffusers") if _version(name)]
    if beside:
        problems.append(
            f"torchaudio {version} does not fit torch {torch.__version__} ({reason}). Nothing to do for "
            f"ear-vae; if a program fails on importing {' or '.join(beside)}, give it a torchaudio made "
            "for this torch, from the same package index, or an environment without torchaudio"
        )
    else:
        notes.append(
            "torchaudio was compiled for another torch: nothing to do, ear-vae uses its Python part alone"
        )
    return f"{version}, its compiled extension does not fit this torch and is left out"


def _ffmpeg(problems: list[str]) -> str:
    path = shutil.which("ffmpeg")
    if path is None:
        problems.append(
            "ffmpeg is missing: m4a, aac, wma and video cannot be read; install it with your system"
        )
        return "missing"
    try:
        result = subprocess.run(
            [path, "-version"], capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        problems.append(f"{path} does not run ({type(error).__name__}); install ffmpeg again")
        return f"{path}, does not run"
    version = re.match(r"ffmpeg version (\S+)", result.stdout)
    return f"{version[1] if version else 'unknown version'} at {path}"


def _caches(problems: list[str]) -> list[str]:
    folders = {"models from the Hub": Path(constants.HF_HUB_CACHE), "conversions": conversions_folder(None)}
    for folder in folders.values():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(there, os.W_OK):
            problems.append(f"{folder} cannot be written to; choose another place with HF_HOME")
    return [f"{what} in {folder}" for what, folder in folders.items()]
