"""Which torch the scripts install into a new environment: tried with a small index of fake wheels."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="the scripts choose on Linux only"
)

# torchaudio 9 would be the newest, and is for another torch, as torchaudio's were up to 2.10.
OFFERED = {
    "cpu": {"torch": ["2.12.0+cpu", "2.13.0+cpu"], "torchaudio": ["2.11.1+cpu", "9+cpu"]},
    "without-torchaudio": {"torch": ["2.13.0+cpu"]},
    "another-release": {"torch": ["2.12.0+cpu"], "torchaudio": ["2.11.1+cpu"]},
    "pypi": {"torch": ["2.13.0", "99"], "torchaudio": ["2.11.1", "99"]},
}
NEEDS = {"2.11.1+cpu": "torch>=2.11", "9+cpu": "torch==9"}


def write_wheel(folder: Path, name: str, version: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if name == "torchaudio" and version in NEEDS:
        metadata += f"Requires-Dist: {NEEDS[version]}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        information = f"{name}-{version}.dist-info"
        wheel.writestr(f"{information}/METADATA", metadata)
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the folders of OFFERED as indices, and `hanging`, which never answers."""
    root = tmp_path_factory.mktemp("indices")
    for index, packages in OFFERED.items():
        for name, versions in packages.items():
            folder = root / index / name
            folder.mkdir(parents=True)
            wheels = [write_wheel(folder, name, version).name.replace("+", "%2B") for version in versions]
            links = "".join(f'<a href="{wheel}">{wheel}</a>\n' for wheel in wheels)
            (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    stopped = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(root))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if self.path.startswith("/hanging/"):
                # A byte now and then, so that no timeout of a connection ever runs out.
                self.send_response(200)
                self.end_headers()
                while not stopped.wait(0.5):
                    self.wfile.write(b" ")
                return
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        stopped.set()
        server.shutdown()


class Newcomer:
    """A new environment, on a machine whose PyPI is ours."""

    def __init__(self, folder: Path, indices: str) -> None:
        self.folder, self.indices = folder, indices
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        # Installing pip would take seconds.
        (folder / "pip").mkdir()
        # Without looking for the module: setuptools behaves otherwise in a process that has imported pip.
        (folder / "pip" / "pip").symlink_to(Path(str(distribution("pip").locate_file("pip"))))

    def install_torch(self, index: str, *, gpu: bool = False, **variables: str) -> str:
        """Returns what a user sees of it."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        mine.pop("TORCH", None)
        environment = {
            **mine,
            "VENV": str(self.folder / "venv"),
            "PYTHONPATH": str(self.folder / "pip"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
            "PIP_INDEX_URL": f"{self.indices}/pypi",
            # As in the settings of a machine that has more than one.
            "PIP_EXTRA_INDEX_URL": f"{self.indices}/pypi",
            "TORCH_CPU_INDEX": f"{self.indices}/{index}",
            "no_proxy": "127.0.0.1",
            **variables,
        }
        has_gpu = f"has_nvidia_gpu() {{ {str(gpu).lower()}; }}"
        script = f". scripts/environment; {has_gpu}; install_torch | show_progress"
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {script}"],
            cwd=Path(__file__).parents[2],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ).stdout

    def installed(self) -> dict[str, str]:
        found = (self.folder / "venv").rglob("*.dist-info")
        return dict(sorted(path.stem.split("-") for path in found))


@pytest.fixture
def newcomer(tmp_path: Path, indices: str) -> Newcomer:
    return Newcomer(tmp_path, indices)


PAIR = {"torch": "2.13.0+cpu", "torchaudio": "2.11.1+cpu"}
PIPS_OWN = {"torch": "2.13.0"}


def test_without_a_gpu_a_pair_for_the_cpu_is_taken(newcomer: Newcomer) -> None:
    """Nothing of it comes from another index, and nothing is said that a user need not know."""
    said = newcomer.install_torch("cpu")
    assert newcomer.installed() == PAIR
    assert "ear-vae: " not in said


def test_with_a_gpu_pips_own_is_taken(newcomer: Newcomer) -> None:
    assert "ear-vae: " not in newcomer.install_torch("cpu", gpu=True)
    assert newcomer.installed() == PIPS_OWN


def test_a_torch_that_is_named_is_taken(newcomer: Newcomer) -> None:
    newcomer.install_torch("cpu", TORCH="torch<=99")
    assert newcomer.installed() == {"torch": "99"}


def test_a_torch_that_is_there_is_left_alone(newcomer: Newcomer) -> None:
    newcomer.install_torch("cpu", TORCH="torch==99")
    newcomer.install_torch("cpu")
    newcomer.install_torch("cpu", TORCH="torch==2.13.0")
    assert newcomer.installed() == {"torch": "99"}


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("without-torchaudio", "torchaudio: HTTP Error 404: File not found"),
        ("nothing", "torch: HTTP Error 404: File not found"),
        ("another-release", "pip failed"),
        pytest.param("hanging", "no answer within 5 s", marks=pytest.mark.slow),
    ],
)
def test_without_such_an_index_pips_own_is_taken(newcomer: Newcomer, index: str, why: str) -> None:
    start = time.monotonic()
    said = newcomer.install_torch(index)
    assert time.monotonic() - start < 20  # pip's own time included, on a busy machine
    assert newcomer.installed() == PIPS_OWN
    lines = [line for line in said.splitlines() if line.startswith("ear-vae: ")]
    address = re.escape(f"{newcomer.indices}/{index}")
    assert len(lines) == 1
    assert re.match(
        rf"ear-vae: no torch for the CPU from {address} \({why}\); using pip's default instead", lines[0]
    )


def test_a_port_where_nobody_listens(newcomer: Newcomer) -> None:
    said = newcomer.install_torch("", TORCH_CPU_INDEX="http://127.0.0.1:9/cpu")
    assert "(torch: urlopen error [Errno 111] Connection refused)" in said
    assert newcomer.installed() == PIPS_OWN


def test_a_gpu_is_known_by_its_driver(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        found = [True, True]
    else:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        found = [shutil.which("nvidia-smi") is not None, True]
    for path, expected in zip(["", f"{tmp_path}:"], found, strict=True):
        result = subprocess.run(
            ["bash", "-c", ". scripts/environment; has_nvidia_gpu"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PATH": path + os.environ["PATH"]},
            check=False,
        )
        assert (result.returncode == 0) == expected
