"""What a user gets: a light import, a complete wheel, one version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ear_vae

ROOT = Path(__file__).parents[2]
in_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source checkout")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy_and_prints_nothing() -> None:
    heavy = ("lightning", "matplotlib", "pydub", "torchaudio", "huggingface_hub", "soundfile", "torch")
    code = f"import sys, ear_vae; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).strip() == "[]"
    heavy = heavy[:-1]
    code = f"import sys; from ear_vae import *; EarVAE; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_import_changes_no_global_setting() -> None:
    code = (
        "import warnings, torch; before = (torch.get_num_threads(), torch.get_default_dtype(), "
        "torch.backends.cuda.matmul.allow_tf32, list(warnings.filters)); import ear_vae; ear_vae.EarVAE; "
        "print(before == (torch.get_num_threads(), torch.get_default_dtype(), "
        "torch.backends.cuda.matmul.allow_tf32, list(warnings.filters)))"
    )
    assert run(code).strip() == "True"


def test_exports() -> None:
    assert set(ear_vae.__all__) <= set(dir(ear_vae))
    for name in ear_vae.__all__:
        assert getattr(ear_vae, name).__class__.__name__ in ("type", "str")
    with pytest.raises(AttributeError, match="no attribute 'VAE'"):
        ear_vae.VAE  # noqa: B018


def test_resampling_works_beside_a_torch_that_torchaudio_does_not_fit() -> None:
    """The extension's loader is made to fail as it does with a CPU-only torch, then with another CUDA."""
    for error in ("OSError('libc10_cuda.so')", "RuntimeError('different CUDA versions')"):
        code = (
            "import torch\n"
            f"def fail(*_): raise {error}\n"
            "torch.ops.load_library = fail\n"
            "from ear_vae.dsp.resampling import resample\n"
            "print(resample(torch.zeros(1, 441), 44100, 48000).shape[1])\n"
            "import torchaudio\n"
            "print(torchaudio.functional.__name__)\n"
        )
        assert run(code).split() == ["480", "torchaudio.functional"]


@in_checkout
def test_one_version() -> None:
    head = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert head[1] == ear_vae.__version__


@in_checkout
def test_wheel_is_complete(tmp_path: Path) -> None:
    """Built from the checkout without network: everything in src, the configs, the bundled checkpoints."""
    pytest.importorskip("setuptools", minversion="77")
    # A build leaves its own folders behind, which have no place in the checkout.
    source = tmp_path / "source"
    source.mkdir()
    for folder in ("src", "checkpoints"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.egg-info"))
    for file in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "ear_vae").rglob("*.py")}
    assert sources <= names
    for model in (path.parent for path in (ROOT / "checkpoints").glob("*/model.safetensors")):
        for file in ("config.json", "model.safetensors", "README.md"):
            assert f"ear_vae/checkpoints/{model.name}/{file}" in names
    assert {"ear_vae/py.typed", "ear_vae/training/configs/tiny.yaml"} <= names
    metadata = zipfile.ZipFile(wheel).read(f"ear_vae-{ear_vae.__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch>=2.7\n" in metadata
    assert not any(name.startswith(("tests/", "examples/")) for name in names)
