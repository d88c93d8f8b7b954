"""What is done for GPUs: on one where there is one, and what can be told without."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ear_vae import EarVAE, EarVAEConfig, graphs, tiling
from ear_vae.transfers import begin_delivery, to_device

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Recording:
    """Stands in for a CUDA graph: keeps what a graph keeps, on a CPU."""

    made = 0

    def __init__(self, network: nn.Module, x: torch.Tensor, beside: Recording | None) -> None:
        type(self).made += 1
        self._network, self.device, self.beside = network, x.device, beside

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self._network(x)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(graphs, "_Graph", Recording)
    monkeypatch.setattr(Recording, "made", 0)
    return Recording


def test_a_shape_is_recorded_when_it_comes_again(recordings: type[Recording]) -> None:
    network, x = nn.Conv1d(2, 3, 1).requires_grad_(False), torch.randn(1, 2, 10)
    expected = network(x)
    assert torch.equal(graphs.replayed(network, x), expected)
    assert recordings.made == 0
    for _ in range(3):
        assert torch.equal(graphs.replayed(network, x), 2 * expected)
    assert recordings.made == 1
    # Another shape, other weights, and after all has been forgotten.
    graphs.replayed(network, x[..., :9])
    network.weight.data = network.weight.data.clone()
    assert torch.equal(graphs.replayed(network, x), expected)
    graphs.forget(network)
    assert torch.equal(graphs.replayed(network, x), expected)
    assert recordings.made == 1


def test_the_shapes_that_are_remembered_are_few(recordings: type[Recording]) -> None:
    network = nn.Conv1d(2, 3, 1).requires_grad_(False)
    inputs = [torch.randn(1, 2, 10 + n) for n in range(graphs._MOST_SHAPES + 1)]
    for x in (*inputs, inputs[-1]):
        graphs.replayed(network, x)
    assert recordings.made == 1
    assert torch.equal(graphs.replayed(network, inputs[0]), network(inputs[0]))
    assert len(graphs._graphs[network]) == graphs._MOST_SHAPES


def test_recordings_of_a_network_share_memory(recordings: type[Recording]) -> None:
    network, other = (nn.Conv1d(2, 3, 1).requires_grad_(False) for _ in range(2))
    for part in (network, other):
        for x in (torch.randn(1, 2, 4), torch.randn(1, 2, 5)):
            graphs.replayed(part, x)
            graphs.replayed(part, x)
    for part in (network, other):
        first, second = graphs._graphs[part].values()
        assert (first.beside, second.beside) == (None, first)


def test_recordings_go_with_their_network(recordings: type[Recording]) -> None:
    network = nn.Conv1d(2, 3, 1).requires_grad_(False)
    before = len(graphs._graphs)
    graphs.replayed(network, torch.randn(1, 2, 4))
    copy.deepcopy(network)
    assert len(graphs._graphs) == before + 1
    del network
    assert len(graphs._graphs) == before


def test_transfers_on_one_device() -> None:
    x = torch.randn(3, dtype=torch.float64)
    assert torch.equal(to_device(x, torch.device("cpu"), torch.float32), x.float())
    assert begin_delivery(x, torch.device("cpu"))() is x


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
            on_gpu.compile()
        monkeypatch.setattr("ear_vae.vae.tile_length", lambda *_: 64)
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
        vae.to("cuda").compile()
        latents = torch.randn(64, 30, device="cuda")
        before = [vae.decode(latents) for _ in range(3)][-1]
        vae.decoder.conv_out.weight.data.mul_(2)
        torch.testing.assert_close(vae.decode(latents), 2 * before, rtol=0, atol=1e-4)

    def test_recordings_of_one_network_take_turns(self, vae: EarVAE) -> None:
        """They share memory: what one leaves there is nothing to another, and each costs little more."""
        vae.to("cuda")
        inputs = [torch.randn(64, frames, device="cuda") for frames in (50, 40, 30, 20)]
        expected = [vae.decode(latents) for latents in inputs]
        vae.compile()
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
        vae.to("cuda:1").compile()
        for _ in range(3):
            torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-4)

    def test_streams(self, vae: EarVAE) -> None:
        audio = 0.3 * torch.randn(2, 50 * 1024)
        vae.to("cuda")
        pieces = [part.mean for part in vae.encode_stream(audio.split(7000, dim=-1), tile_frames=8)]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), vae.encode(audio).mean, rtol=0, atol=1e-4)

    def test_a_long_file_takes_the_memory_of_its_tiles(self, vae: EarVAE) -> None:
        vae.to("cuda")
        frames = tiling.tile_length(16, 1024, vae.device)

        def peak(tiles: int) -> int:
            torch.cuda.reset_peak_memory_stats()
            vae.decode(torch.randn(64, tiles * frames))
            return torch.cuda.max_memory_allocated()

        assert peak(6) < 1.1 * peak(2) + 6 * frames * 64 * 4 * 12
