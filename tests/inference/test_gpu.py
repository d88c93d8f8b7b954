"""What is done for GPUs: on one where there is one, and what can be told without."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.inference import asynchronous_copy as transfers
from ear_vae.inference import cuda_graphs as graphs
from ear_vae.inference import tiling
from ear_vae.inference.asynchronous_copy import copy_to_device, start_copy
from ear_vae.inference.runner import Runner
from ear_vae.network.blocks import Snake

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Recording:
    """Stands in for a CUDA graph: keeps what a graph keeps, on a CPU."""

    made = 0
    fails = False

    def __init__(self, network: nn.Module, x: torch.Tensor, beside: Recording | None) -> None:
        type(self).made += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self._network, self.device, self.beside = network, x.device, beside

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self._network(x)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(graphs, "_Graph", Recording)
    monkeypatch.setattr(Recording, "made", 0)
    monkeypatch.setattr(Recording, "fails", False)
    return Recording


def test_a_shape_is_recorded_when_it_comes_again(recordings: type[Recording]) -> None:
    network, x = nn.Conv1d(2, 3, 1).requires_grad_(False), torch.randn(1, 2, 10)
    expected = network(x)
    assert torch.equal(graphs.run_graph(network, x), expected)
    assert recordings.made == 0
    for _ in range(3):
        assert torch.equal(graphs.run_graph(network, x), 2 * expected)
    assert recordings.made == 1
    # Another shape, other weights, and after all has been forgotten.
    graphs.run_graph(network, x[..., :9])
    network.weight.data = network.weight.data.clone()
    assert torch.equal(graphs.run_graph(network, x), expected)
    graphs.clear_graphs(network)
    assert torch.equal(graphs.run_graph(network, x), expected)
    assert recordings.made == 1


def test_the_shapes_that_are_remembered_are_few(recordings: type[Recording]) -> None:
    network = nn.Conv1d(2, 3, 1).requires_grad_(False)
    inputs = [torch.randn(1, 2, 10 + n) for n in range(graphs._MOST_SHAPES + 1)]
    for x in (*inputs, inputs[-1]):
        graphs.run_graph(network, x)
    assert recordings.made == 1
    assert torch.equal(graphs.run_graph(network, inputs[0]), network(inputs[0]))
    assert len(graphs._networks[network].shapes) == graphs._MOST_SHAPES


def test_recordings_of_a_network_share_memory(recordings: type[Recording]) -> None:
    network, other = (nn.Conv1d(2, 3, 1).requires_grad_(False) for _ in range(2))
    for part in (network, other):
        for x in (torch.randn(1, 2, 4), torch.randn(1, 2, 5)):
            graphs.run_graph(part, x)
            graphs.run_graph(part, x)
    for part in (network, other):
        first, second = graphs._networks[part].graphs()
        assert (first.beside, second.beside) == (None, first)


def test_recordings_go_with_their_network(recordings: type[Recording]) -> None:
    network = nn.Conv1d(2, 3, 1).requires_grad_(False)
    before = len(graphs._networks)
    graphs.run_graph(network, torch.randn(1, 2, 4))
    copy.deepcopy(network)
    assert len(graphs._networks) == before + 1
    del network
    assert len(graphs._networks) == before


def switch_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("switched", ["autocast", "autocast's dtype", "TF32"])
def test_other_settings_are_another_recording(recordings: type[Recording], switched: str) -> None:
    network, x = nn.Conv1d(2, 3, 1).requires_grad_(False), torch.randn(1, 2, 10)
    autocast = {"device_type": "cpu", "enabled": switched == "autocast's dtype", "dtype": torch.float16}
    with torch.autocast(**autocast):
        graphs.run_graph(network, x)
        graphs.run_graph(network, x)
    assert recordings.made == 1
    try:
        if switched == "TF32":
            switch_tf32()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=switched != "TF32"):
            graphs.run_graph(network, x)
            assert recordings.made == 1
            graphs.run_graph(network, x)
    finally:
        if switched == "TF32":
            switch_tf32()
    assert recordings.made == 2


def test_what_cannot_be_recorded_is_computed_as_usual(recordings: type[Recording]) -> None:
    network, x = nn.Conv1d(2, 3, 1).requires_grad_(False), torch.randn(1, 2, 10)
    recordings.fails = True
    graphs.run_graph(network, x)
    with pytest.warns(UserWarning, match=r"\[1, 2, 10\] cannot be recorded .*: operation not permitted"):
        assert torch.equal(graphs.run_graph(network, x), network(x))
    # Neither tried again nor complained about.
    assert torch.equal(graphs.run_graph(network, x), network(x))
    assert recordings.made == 1
    graphs.run_graph(network, x[..., :9])
    recordings.fails = False
    assert torch.equal(graphs.run_graph(network, x[..., :9]), 2 * network(x[..., :9]))


def test_threads_take_turns(recordings: type[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay has one input and one output: what two threads put there at once would be mixed up."""
    network, inputs = nn.Conv1d(1, 1, 1).requires_grad_(False), torch.randn(2, 1, 1, 10).unbind()
    both = threading.Barrier(2, timeout=0.5)

    def replay(self: Recording, x: torch.Tensor) -> torch.Tensor:
        self.input = x
        with contextlib.suppress(threading.BrokenBarrierError):
            # Where nothing keeps them apart, both are here at once.
            both.wait()
        return 2 * network(self.input)

    monkeypatch.setattr(recordings, "replay", replay)
    for _ in range(2):
        graphs.run_graph(network, inputs[0])
    both.reset()
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda x: graphs.run_graph(network, x), inputs))
    for one, x in zip(found, inputs, strict=True):
        assert torch.equal(one, 2 * network(x))


def test_a_model_prepared_before_it_is_moved_records_short_inputs(
    vae: EarVAE, recordings: type[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared on the CPU; then as on a GPU, whose tensors are on the CPU here."""
    monkeypatch.setattr("ear_vae.inference.compiling.compile_snake", lambda *_: None)
    vae.optimize_for_inference()
    for module in vae.modules():
        if isinstance(module, Snake):
            module.compiled = False
    there = types.SimpleNamespace(type="cuda")

    def runner(model: EarVAE, **options: Any) -> Runner:
        return Runner(model, **{**options, "graph_frames": 6, "tile_frames": 2048})

    monkeypatch.setattr(EarVAE, "device", there)
    monkeypatch.setattr("ear_vae.inference.runner.copy_to_device", lambda x, *_: x)
    monkeypatch.setattr("ear_vae.vae.Runner", runner)
    vae.transformer = None
    monkeypatch.setattr(vae.decoder, "forward", lambda x: x[:, :2].repeat_interleave(1024, dim=-1))
    for frames, batch, made in ((7, 1, 0), (2, 4, 0), (2, 3, 1), (2, 1, 2)):
        latents = torch.randn(batch, 64, frames)
        for _ in range(2):
            vae.decode(latents)
        assert recordings.made == made


def test_transfers_on_one_device() -> None:
    x = torch.randn(3, dtype=torch.float64)
    assert torch.equal(copy_to_device(x, torch.device("cpu"), torch.float32), x.float())
    assert start_copy(x, torch.device("cpu"))() is x


def pin_memory(x: torch.Tensor) -> torch.Tensor:
    """What `Tensor.pin_memory` does, in memory that is not pinned: as many values as the strides span."""
    if 0 in x.stride():
        raise RuntimeError("unsupported operation: more than one element of the written-to tensor")
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.empty(span).as_strided(x.shape, x.stride()).copy_(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 2, 100_000)[..., 300:600],
        torch.randn(1, 1, 100_000).expand(1, 2, -1)[..., 300:600],
        torch.randn(1, 600, 2)[:, 300:].mT,
    ],
    ids=["a tile", "mono", "transposed"],
)
def test_a_tile_is_pinned_in_one_piece_of_its_own_size(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def upload(pinned: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(pinned)
        return pinned

    def unpinned(*shape: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
        assert pin_memory
        return allocate(*shape, **given)

    allocate = torch.empty
    monkeypatch.setattr(transfers, "_upload", upload, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "empty", unpinned)
    original = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *given, **options: (
            upload(self, given[0]) if options.get("non_blocking") else original(self, *given, **options)
        ),
    )
    found = copy_to_device(x, torch.device("cuda"), torch.float64)
    assert torch.equal(found, x.double())
    (pinned,) = sent
    assert pinned.is_contiguous()
    assert pinned.untyped_storage().nbytes() == 4 * 600


@pytest.fixture
def vae() -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(EarVAEConfig(channels=16)).eval().requires_grad_(False)


@pytest.fixture
def single_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("single_precision")
class TestOnAGpu:
    pytestmark = GPU

    @pytest.mark.parametrize("compiled", [False, True])
    def test_it_gives_what_a_cpu_gives(
        self, vae: EarVAE, compiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        audio = 0.3 * torch.randn(3, 2, 200 * 1024)
        on_gpu = copy.deepcopy(vae).to("cuda")
        if compiled:
            on_gpu.optimize_for_inference()
        monkeypatch.setattr("ear_vae.inference.runner.tile_length", lambda *_: 64)
        latents = vae.encode(audio).mean
        rebuilt = vae.decode(latents)
        # The first pass is plain, the second recorded, the third replayed.
        for mode in (torch.no_grad, torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                found, sound = on_gpu.encode(audio).mean, on_gpu.decode(latents)
            assert found.device == sound.device == torch.device("cpu")
            assert not found.is_pinned()
            torch.testing.assert_close(found, latents, rtol=0, atol=1e-4)
            torch.testing.assert_close(sound, rebuilt, rtol=0, atol=1e-4)

    def test_replays_follow_weights_that_change(self, vae: EarVAE) -> None:
        vae.to("cuda").optimize_for_inference()
        latents = torch.randn(64, 30, device="cuda")
        before = [vae.decode(latents) for _ in range(3)][-1]
        vae.decoder.conv_out.weight.data.mul_(2)
        torch.testing.assert_close(vae.decode(latents), 2 * before, rtol=0, atol=1e-4)

    def test_recordings_of_one_network_take_turns(self, vae: EarVAE) -> None:
        """They share memory: what one leaves there is nothing to another, and each costs little more."""
        vae.to("cuda")
        inputs = [torch.randn(64, frames, device="cuda") for frames in (50, 40, 30, 20)]
        expected = [vae.decode(latents) for latents in inputs]
        vae.optimize_for_inference()
        for latents in inputs[:1] * 2:
            vae.decode(latents)
        one = torch.cuda.memory_reserved()
        for _ in range(3):
            for latents, audio in zip(inputs, expected, strict=True):
                torch.testing.assert_close(vae.decode(latents), audio, rtol=0, atol=1e-4)
        assert torch.cuda.memory_reserved() < 1.4 * one

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_it_need_not_be_the_current_gpu(self, vae: EarVAE) -> None:
        latents = torch.randn(64, 30)
        expected = vae.decode(latents)
        vae.to("cuda:1").optimize_for_inference()
        for _ in range(3):
            torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-4)

    def test_streams(self, vae: EarVAE) -> None:
        audio = 0.3 * torch.randn(2, 50 * 1024)
        vae.to("cuda")
        pieces = [part.mean for part in vae.encode_stream(audio.split(7000, dim=-1), tile_frames=8)]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), vae.encode(audio).mean, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_of_a_cpu(self, vae: EarVAE, checkpointing: bool) -> None:
        vae.requires_grad_(True)
        audio = 0.3 * torch.randn(1, 2, 20 * 1024)
        on_gpu = copy.deepcopy(vae).to("cuda")
        on_gpu.gradient_checkpointing = checkpointing
        gradients = [
            torch.autograd.grad(model(x).audio.square().mean(), list(model.parameters()))
            for model, x in ((vae, audio), (on_gpu, audio.cuda()))
        ]
        for expected, found in zip(*gradients, strict=True):
            scale = max(float(expected.abs().max()), 1e-6)
            assert float((found.cpu() - expected).abs().max()) < 1e-2 * scale

    def test_mono_streams(self, vae: EarVAE) -> None:
        audio = 0.3 * torch.randn(1, 50 * 1024)
        expected = vae.encode(audio).mean
        vae.to("cuda")
        pieces = [part.mean for part in vae.encode_stream(audio.split(7000, dim=-1), tile_frames=8)]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), expected, rtol=0, atol=1e-4)

    def test_an_hour_is_not_pinned(self, vae: EarVAE) -> None:
        """Host memory that is pinned for the tiles of a strided hour is that of a few tiles."""
        vae.to("cuda")
        hour = torch.zeros(2, 3600 * 44_100)
        torch.cuda.reset_peak_host_memory_stats()
        vae.encode(hour)
        assert torch.cuda.host_memory_stats()["allocated_bytes.peak"] < 2**28

    def test_autocast_after_preparing(self, vae: EarVAE) -> None:
        vae.optimize_for_inference()
        vae.to("cuda")
        latents = torch.randn(64, 30, device="cuda")
        plain = [vae.decode(latents) for _ in range(3)][-1]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            cast = [vae.decode(latents) for _ in range(3)]
        assert all(torch.equal(cast[0], other) for other in cast[1:])
        assert not torch.equal(cast[0], plain)
        assert torch.equal(vae.decode(latents), plain)

    def test_recording_beside_a_thread_that_pins_memory(self, vae: EarVAE) -> None:
        """As a data loader does. None of it may fail, and none be computed as usual for it."""
        vae.to("cuda").optimize_for_inference()
        done = threading.Event()

        def pin() -> None:
            size = 1000
            while not done.is_set():
                size += 4096
                torch.empty(size, pin_memory=True)

        with ThreadPoolExecutor(1) as threads:
            pinning = threads.submit(pin)
            try:
                for frames in (20, 30, 40):
                    latents = torch.randn(64, frames, device="cuda")
                    found = [vae.decode(latents) for _ in range(3)]
                    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)
            finally:
                done.set()
            pinning.result()
        assert len(graphs._networks[vae.decoder].graphs()) == 3

    def test_three_steps_of_fit(self, tmp_path: Path) -> None:
        """Through the command line, with a discriminator, in mixed precision; a model comes out."""
        for number in range(2):
            noise = 0.1 * np.random.default_rng(number).standard_normal((5 * 44_100, 2))
            soundfile.write(tmp_path / f"{number}.wav", noise, 44_100)
        options = [
            "--config",
            "smoke",
            "--config",
            "one_gpu",
            "--data.batch_size",
            "2",
            "--data.num_workers",
            "1",
        ]
        options += ["--data.folder", str(tmp_path), "--trainer.max_steps", "3"]
        options += ["--trainer.default_root_dir", str(tmp_path / "run")]
        subprocess.run([sys.executable, "-m", "ear_vae", "fit", *options], check=True)
        model = EarVAE.from_pretrained(tmp_path / "run" / "model")
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_a_long_file_takes_the_memory_of_its_tiles(self, vae: EarVAE) -> None:
        vae.to("cuda")
        frames = tiling.tile_length(16, 1024, vae.device)

        def peak(tiles: int) -> int:
            torch.cuda.reset_peak_memory_stats()
            vae.decode(torch.randn(64, tiles * frames))
            return torch.cuda.max_memory_allocated()

        assert peak(6) < 1.1 * peak(2) + 6 * frames * 64 * 4 * 12
