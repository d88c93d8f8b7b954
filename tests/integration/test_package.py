"""What a user gets: a light import, a complete wheel, one version."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import ear_vae


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


def test_one_version(repository: Path) -> None:
    head = re.search(r"^## (\S+)", (repository / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert head[1] == ear_vae.__version__
    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ear_vae.__version__


# What a checkout holds that is nobody's work, and what is about the repository alone.
NOT_SOURCE = (
    "__pycache__",
    ".ipynb_checkpoints",
    "*.egg-info",
    "build",
    "dist",
    "site",
    "runs",
    "lightning_logs",
)
OF_THE_REPOSITORY = (
    ".git",
    ".github",
    ".gitignore",
    ".cache",
    ".*_cache",
    ".coverage*",
    "PKG-INFO",
    "rebuilt.wav",
)


def not_source(folder: str, names: list[str]) -> set[str]:
    """Virtual environments as well, whatever they are called."""
    environments = {name for name in names if (Path(folder) / name / "pyvenv.cfg").exists()}
    return environments | shutil.ignore_patterns(*NOT_SOURCE, *OF_THE_REPOSITORY)(folder, names)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_distributions_are_complete(repository: Path, tmp_path: Path) -> None:
    """Built without network: the sdist holds all that its tests need, the wheel made of it the package."""
    # A build leaves its own folders behind, which have no place in the checkout.
    source = tmp_path / "source"
    shutil.copytree(repository, source, ignore=not_source)
    expected = files_in(source)
    assert {"README.md", "tests/conftest.py", "examples/piece.ogg", "scripts/test"} <= expected
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    name = f"ear_vae-{ear_vae.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / name
    assert expected - files_in(unpacked) == set()
    assert not any("__pycache__" in file for file in files_in(unpacked))

    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(unpacked)], check=True, capture_output=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = set(wheel.namelist())
    package = {file.removeprefix("src/") for file in expected if file.startswith("src/ear_vae/")}
    checkpoints = {
        f"ear_vae/{file}" for file in expected if file.startswith("checkpoints/") and file.count("/") == 2
    }
    assert len(checkpoints) >= 3
    assert (package | checkpoints) - names == set()
    assert {file.split("/")[0] for file in names} == {"ear_vae", f"{name}.dist-info"}
    metadata = wheel.read(f"{name}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch>=2.7\n" in metadata
    assert "Classifier: Typing :: Typed\n" in metadata
    # What PyPI shows has no links to files that it does not have.
    assert "Description-Content-Type: text/markdown\n" in metadata
    assert '["Back to Ear' in metadata
    assert not re.search(r"\]\((?!https:)", metadata)
    # Who has the wheel alone has the names that CC-BY asks for.
    assert wheel.read(f"{name}.dist-info/licenses/MODEL_CARD.md") == (source / "MODEL_CARD.md").read_bytes()


def test_the_workflow_that_publishes_gives_the_readme_links_to_the_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setenv("EAR_VAE_FILES", "https://github.com/someone/ear-vae/blob/v9")
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    runpy.run_path(str(repository / "setup.py"))
    links = re.findall(r"\]\(([^)]*)\)", str(given["long_description"]))
    own = [link.removeprefix("https://github.com/someone/ear-vae/blob/v9/") for link in links]
    paths = [link.removesuffix("?raw=true") for link in own if not link.startswith("https:")]
    assert len(paths) > 20
    for path in paths:
        assert (repository / path).is_file(), path
    assert [link for link in links if link.endswith("?raw=true")] == [
        link for link in links if ".webp" in link
    ]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("code", [0, 1])
def test_the_scripts_say_what_is_installed_and_all_of_it_if_that_fails(tmp_path: Path, code: int) -> None:
    pip = tmp_path / "venv" / "bin" / "python"
    pip.parent.mkdir(parents=True)
    says = "Collecting torch\n  Downloading torch-9.whl (188.1 MB)\nRequirement already satisfied: numpy\n"
    pip.write_text(f"#!/bin/sh\ncase $* in *show*) exit 0;; esac\nprintf '{says}'\nexit {code}\n")
    pip.chmod(0o755)

    def install(what: str) -> subprocess.CompletedProcess[str]:
        script = f"set -euo pipefail; . scripts/environment; install {what}; echo installed"
        return subprocess.run(
            ["bash", "-c", script],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "VENV": str(tmp_path / "venv")},
            capture_output=True,
            text=True,
            check=False,
        )

    result = install(".")
    assert result.returncode == code
    first, *rest = result.stderr.splitlines(keepends=True)
    assert re.search(r"Installing ear-vae .* about \d+ MB, \d+ GB with CUDA; minutes on a slow line", first)
    assert "".join(rest) == (f"{says}The installation failed; what was said is above.\n" if code else "")
    assert result.stdout == ("" if code else "installed\n")
    assert (tmp_path / "venv" / "installed").exists() != bool(code)
    if not code:
        assert install(".").stderr == ""
        assert install("'.[test]'").stderr.startswith("Installing the additional packages of .[test] into ")
        # Somebody's `pip install .`, which changes in the folder would not reach.
        copy = tmp_path / "venv" / "lib" / "python3.13" / "site-packages" / "ear_vae"
        copy.mkdir(parents=True)
        assert install(".").stderr == ""  # an empty folder, as uninstalling may leave it
        (copy / "__init__.py").touch()
        assert install(".").stderr.startswith("Installing ear-vae and what it needs into ")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_of_the_tests_checks_style_and_types_unless_told_what_to_test(
    repository: Path, tmp_path: Path
) -> None:
    """With an environment whose programs write down that they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff", "mypy"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*"\n')
        program.chmod(0o755)
    (tmp_path / "installed").write_text(f"{repository.resolve()} .[test]\n")

    def called(*arguments: str) -> list[str]:
        command = ["bash", str(repository / "scripts" / "test"), *arguments]
        environment = {**os.environ, "VENV": str(tmp_path)}
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    pytest_alone = "python -m pytest -n auto --maxprocesses 4 --dist worksteal"
    assert called() == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        pytest_alone,
    ]
    assert "./scripts/test [PYTEST_ARGUMENT ...]" in called("--help")
    assert called("tests/audio", "-k", "mp3") == [f"{pytest_alone} tests/audio -k mp3"]
    with pytest.raises(subprocess.CalledProcessError) as failure:
        called("tests/audio/test_nothing.py::test_it")
    assert failure.value.returncode == 2
    assert (
        failure.value.stderr == "scripts/test: tests/audio/test_nothing.py::test_it: no such file or folder\n"
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_demo_explains_itself_and_misses_a_song_before_it_installs(
    repository: Path, tmp_path: Path
) -> None:
    def called(argument: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "VENV": str(tmp_path / "venv")}
        command = ["bash", str(repository / "scripts" / "demo"), argument]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20
        )

    explained, missed, folder = called("--help"), called("nowhere.mp3"), called(str(tmp_path))
    assert explained.returncode == 0
    assert "./scripts/demo [SONG [REBUILT.wav]]" in explained.stdout
    assert (missed.returncode, missed.stdout) == (1, "")
    assert missed.stderr == f"demo: {tmp_path / 'nowhere.mp3'}: no such file\n"
    assert (folder.returncode, folder.stdout) == (1, "")
    assert folder.stderr.startswith(f"demo: {tmp_path}: is a folder; give one song")
    assert not list(tmp_path.iterdir())
