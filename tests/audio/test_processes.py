"""Files that other processes decode, against those that are read here."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ear_vae.audio import read_audio, resample
from ear_vae.audio.processes import (
    AudioBlock,
    AudioEnd,
    AudioFailure,
    AudioLocation,
    AudioMessage,
    AudioProcesses,
    AudioRestart,
    content_sha256,
)

RATE = 44_100


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", 0.1 * random.standard_normal((30_000, 2)), RATE)
    soundfile.write(folder / "b.flac", 0.1 * random.standard_normal(70_000), 48_000)
    (folder / "bad.wav").write_bytes(b"no audio")
    os.mkfifo(folder / "pipe.wav")
    with tarfile.open(folder / "t.tar", "w") as tar:
        header = tarfile.TarInfo("x.flac")
        content = (folder / "b.flac").read_bytes()
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    return folder


def collected(messages: list[AudioMessage]) -> tuple[dict[int, torch.Tensor], dict[int, AudioMessage]]:
    blocks: dict[int, list[torch.Tensor]] = {}
    ends: dict[int, AudioMessage] = {}
    for message in messages:
        assert message.index not in ends
        if isinstance(message, AudioBlock):
            blocks.setdefault(message.index, []).append(message.audio)
        elif isinstance(message, AudioRestart):
            blocks.pop(message.index, None)
        else:
            ends[message.index] = message
    return {index: torch.cat(parts, dim=1) for index, parts in blocks.items()}, ends


@pytest.mark.parametrize("count", [0, 2])
def test_files_and_members_of_tars(files: Path, count: int) -> None:
    locations = [
        AudioLocation(str(files / name)) for name in ("a.wav", "bad.wav", "b.flac", "no.wav", "pipe.wav")
    ]
    with tarfile.open(files / "t.tar") as tar:
        (member,) = tar
    locations.append(AudioLocation(str(files / "t.tar"), (member.offset_data, member.size)))
    with AudioProcesses(count, RATE) as processes:
        audio, ends = collected(list(processes.read(locations)))
        again, _ = collected(list(processes.read(locations[:1])))
    assert torch.equal(audio[0], read_audio(files / "a.wav")[0])
    assert torch.equal(again[0], audio[0])
    flac, rate = read_audio(files / "b.flac")
    for index in (2, 5):
        assert torch.equal(audio[index], resample(flac, rate, RATE))
        end = ends[index]
        assert isinstance(end, AudioEnd)
        assert (end.num_samples, end.info.sample_rate, end.info.channels) == (70_000, 48_000, 1)
        assert end.sha256 == hashlib.sha256((files / "b.flac").read_bytes()).hexdigest()
        assert end.sha256 == content_sha256(locations[index])
    reasons = {index: end.reason for index, end in ends.items() if isinstance(end, AudioFailure)}
    assert reasons.keys() == {1, 3, 4}
    assert str(files) not in reasons[1]
    assert (reasons[3], reasons[4]) == ("no such file", "is no ordinary file")


def child_processes() -> list[int]:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_decoder_that_dies_is_replaced(tmp_path: Path, deaths: int) -> None:
    """The file begins anew, and has failed when that does not help; the next one is read all the same."""
    long, short = tmp_path / "long.wav", tmp_path / "short.wav"
    samples = 0.1 * np.random.default_rng(0).standard_normal((4_000_000, 2))
    soundfile.write(long, samples, RATE)
    soundfile.write(short, samples[:1000], RATE)
    messages: list[AudioMessage] = []
    before = set(child_processes())
    with AudioProcesses(1, RATE) as processes:
        for message in processes.read([AudioLocation(str(long)), AudioLocation(str(short))]):
            messages.append(message)
            if isinstance(message, AudioBlock) and message.index == 0 and deaths:
                deaths -= 1
                (decoder,) = decoders_of(set(child_processes()) - before)
                os.kill(decoder, signal.SIGKILL)
    audio, ends = collected(messages)
    assert sum(isinstance(message, AudioRestart) for message in messages) == 1
    assert torch.equal(audio[1], read_audio(short)[0])
    if isinstance(ends[0], AudioFailure):
        assert "ended with -9, twice" in ends[0].reason
        assert sum(isinstance(message, AudioBlock) for message in messages) == 3
    else:
        assert torch.equal(audio[0], read_audio(long)[0])


def decoders_of(children: set[int]) -> list[int]:
    """Without the process that looks after shared memory."""
    return [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
