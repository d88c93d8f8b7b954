"""When the activation is compiled unasked: the rule against numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.inference.compiling import (
    WORTHWHILE_MULTIPLY_ADDS,
    CompileWhenItPays,
    activation_compiled,
    multiply_adds_per_frame,
    pays_beforehand,
)
from ear_vae.network import snake as snake_module
from ear_vae.network.blocks import Snake


class Work:
    """A model of ten frames a second, and when it was compiled: after how many tiles."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.compiled: list[int] = []
        self.tiles = 0
        model: Any = SimpleNamespace(dtype=dtype, config=SimpleNamespace(latent_rate=10.0))
        self.rule = CompileWhenItPays(model, lambda _: self.compiled.append(self.tiles))

    def file(self, audio_seconds: float, following: int, tiles: list[tuple[float, float]]) -> None:
        """Tiles are seconds of audio, and seconds that they took."""
        self.rule.begin_file(audio_seconds, following)
        for audio, took in tiles:
            self.tiles += 1
            self.rule.tile_done(round(10 * audio), took)


@pytest.mark.parametrize(
    ("dtype", "audio_seconds", "expected"),
    [
        # A tenth of what is left must be more than 15 s; of bfloat16 a quarter. 12 s are done by then.
        (torch.float32, 161.9, []),
        (torch.float32, 162.1, [2]),
        (torch.bfloat16, 71.9, []),
        (torch.bfloat16, 72.1, [2]),
    ],
)
def test_a_file_that_is_as_fast_as_real_time(
    dtype: torch.dtype, audio_seconds: float, expected: list[int]
) -> None:
    work = Work(dtype)
    work.file(audio_seconds, 0, [(6, 6)] * 20)
    assert work.compiled == expected


def test_the_first_tile_does_not_count() -> None:
    work = Work()
    # 1000 s are left; were the first counted, at 13.25 times real time, else a hundredth of it.
    work.file(1008, 0, [(4, 106), (4, 0.04)])
    assert not work.compiled
    # Now (0.04 + 4) / 8 of real time, 996 s left: 503 s.
    work.tiles += 1
    work.rule.tile_done(40, 4)
    assert work.compiled == [3]


def test_files_that_follow_are_as_long_as_those_before() -> None:
    work = Work()
    # 8 s of real time left after the second tile, and 7 files of 20 s: 148 s.
    work.file(20, 7, [(6, 6), (6, 6)])
    assert not work.compiled
    work.file(0.1, 6, [(0.1, 0.1)])
    # Of 12, 0.1 and 400 s so far, in the mean 137.4: 382.4 of this are left when 17.6 are done, and 5 more.
    work.file(400, 5, [(17.6, 17.6)])
    assert work.compiled == [4]


def test_a_file_that_goes_on_longer_than_it_said() -> None:
    work = Work()
    # The one that follows will be as long as this has been: 147 s after 21 tiles, 154 after 22.
    work.file(1, 1, [(7, 7)] * 30)
    assert work.compiled == [22]
    work = Work()
    work.file(1, 0, [(7, 7)] * 100)
    assert not work.compiled


def test_it_is_tried_once_and_goes_on_where_it_fails() -> None:
    tried = []

    def fail(model: Any) -> None:
        tried.append(model)
        raise ValueError("anything")

    model: Any = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(latent_rate=10.0))
    rule = CompileWhenItPays(model, fail)
    rule.begin_file(10_000, 0)
    for _ in range(5):
        rule.tile_done(60, 6)
    assert tried == [model]


@pytest.mark.parametrize("strides", [(2, 4, 4, 4, 8), (2, 2, 4, 6, 10)])
def test_multiply_adds_are_those_that_torch_counts(strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        vae = EarVAE(EarVAEConfig(channels=8, strides=strides, transformer_depth=0))
        audio = torch.zeros(1, 2, 3 * vae.downsampling_ratio)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encoder(audio)
    assert 3 * 2 * multiply_adds_per_frame(vae) == counter.get_total_flops()


def test_what_pays_beforehand() -> None:
    """118.7 GFLOP a second, half of them products: 3369 s for the published size."""
    with torch.device("meta"):
        vae = EarVAE()
    seconds = WORTHWHILE_MULTIPLY_ADDS / (118.7214336e9 / 2)
    assert seconds == pytest.approx(3369, abs=1)
    assert not pays_beforehand(vae, seconds * 0.999)
    assert pays_beforehand(vae, seconds * 1.001)


def test_the_model_is_compiled_within_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snake_module, "_compiled", lambda function: function)
    vae = EarVAE(EarVAEConfig(channels=4))
    snakes = [module for module in vae.modules() if isinstance(module, Snake)]
    with activation_compiled(vae, True):
        assert all(snake.compiled for snake in snakes)
        with activation_compiled(vae, False):
            assert not any(snake.compiled for snake in snakes)
        assert all(snake.compiled for snake in snakes)
    assert not any(snake.compiled for snake in snakes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_a_pass_takes_is_compiled_before(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """What comes later would take its time then, and be fitted to the size of whatever tile comes first."""
    kinds: set[tuple[Any, ...]] = set()
    smallest = []

    def stand_in(function: Any) -> Any:
        def call(*given: Any) -> Any:
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            kinds.add((function, given[-1], *(tensor.dtype for tensor in tensors)))
            smallest.append(tensors[0].numel())
            return function(*given)

        return call

    monkeypatch.setattr(snake_module, "_compiled", stand_in)
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=16)).eval().requires_grad_(False)
    vae.cast(dtype)
    with activation_compiled(vae, True):
        before = set(kinds)
        # torch decides by the first values whether to use threads: at least 4096 for each.
        assert min(smallest) >= 256 * 4096
        vae.decode(vae.encode(0.1 * torch.randn(2, 8192)).mean)
    assert kinds == before
