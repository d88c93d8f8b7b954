"""Runs that are killed, on one machine and on a cluster: run again, they end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.encoding import EncodingProgress, encode_dataset

pytestmark = pytest.mark.slow
RATE = 44_100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EarVAEConfig(
        channels=4, channel_multipliers=(1, 2, 2), strides=(4, 8, 8), latent_dim=8, transformer_depth=0
    )
    folder = tmp_path_factory.mktemp("model") / "test"
    EarVAE(config).save_pretrained(folder)
    return folder


def write_songs(folder: Path, count: int) -> Path:
    """Every tenth is broken; the others are 0.1 to 3 s long, of three formats and rates."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 7}" / f"{number:03}.{('wav', 'flac', 'ogg')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = (RATE, 48_000, 22_050)[number % 3]
        seconds = generator.uniform(0.1, 3)
        soundfile.write(path, 0.1 * generator.standard_normal((int(seconds * rate), 1 + number % 2)), rate)
        if number % 10 == 3:
            path.write_bytes(path.read_bytes()[: number * 4])
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs"), 200)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@pytest.mark.parametrize("format", ["webdataset", "stable-audio", "safetensors"])
def test_killed_three_times(format: str, songs: Path, model: Path, tmp_path: Path) -> None:
    """At random, all processes of it at once: those that encode and those that decode."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ear_vae", "encode-dataset", str(songs), str(out)]
    command += ["--model", str(model), "--format", format, "--files-per-shard", "4", "--quiet"]
    command += ["--workers", "2", "--threads", "1", "--decoders", "1"]
    chance = random.Random(format)
    for kill in range(1, 4):
        with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            wanted = kill * 12 + chance.randrange(4)
            deadline = time.monotonic() + 120
            while len(list(out.glob("receipts/*.json"))) < wanted:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)
        assert 0 < len(list(out.glob("receipts/*.json"))) < 50
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    vae = EarVAE.from_pretrained(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = encode_dataset(
            songs, tmp_path / "undisturbed", vae, format=format, files_per_shard=4, decoders=0
        )  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    assert (result.num_files, result.num_failures) == (200, 20)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_killed_while_compiled(model: Path, tmp_path: Path) -> None:
    """By torch itself, in each process anew or out of its cache."""
    songs = write_songs(tmp_path / "songs", 24)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ear_vae", "encode-dataset", str(songs)]
    options = ["--model", str(model), "--files-per-shard", "2", "--quiet", "--workers", "2", "--threads", "1"]
    out = tmp_path / "out"
    begun = [*command, str(out), *options, "--optimize"]
    with subprocess.Popen(
        begun, start_new_session=True, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        deadline = time.monotonic() + 200
        while len(list(out.glob("receipts/*.json"))) < 4:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert 0 < len(list(out.glob("receipts/*.json"))) < 12
    # Not asked for again: the plan says it.
    for arguments in ([*command, str(out), *options], [*command, str(tmp_path / "at once"), *begun[6:]]):
        done = subprocess.run(arguments, capture_output=True, check=False, env=environment)
        assert done.returncode == 1
    assert tree(out) == tree(tmp_path / "at once")
    plain = [*command, str(tmp_path / "plain"), *options, "--no-optimize"]
    assert subprocess.run(plain, capture_output=True, check=False).returncode == 1
    assert tree(out)["000000.tar"] != tree(tmp_path / "plain")["000000.tar"]


def actors() -> list[int]:
    """Processes of Ray's actors that this one has, through others, started."""
    found, waiting = [], [os.getpid()]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            children = [int(pid) for pid in (task / "children").read_text().split()]
            waiting += children
            names = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in children]
            found += [pid for pid, name in names if name.startswith(b"ray::MapWorker")]
    return found


@pytest.mark.filterwarnings("ignore")
def test_ray_with_an_actor_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four logical processors, two actors; the bytes are those of this process alone."""
    ray = pytest.importorskip("ray")
    songs = write_songs(tmp_path / "songs", 40)
    vae = EarVAE.from_pretrained(model)
    killed: list[int] = []

    def kill(progress: EncodingProgress) -> None:
        if not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        encode_dataset(
            songs,
            tmp_path / "out",
            vae,
            files_per_shard=2,
            engine="ray",
            workers=2,
            threads=1,
            decoders=1,
            progress=kill,
        )
    finally:
        ray.shutdown()
    assert killed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encode_dataset(songs, tmp_path / "here", vae, files_per_shard=2, decoders=0)
    finally:
        torch.set_num_threads(threads)
    assert tree(tmp_path / "out") == tree(tmp_path / "here")
