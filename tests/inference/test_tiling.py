"""Exactness of tiles, and the reach that it rests on."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.inference import tiling
from ear_vae.inference.runner import Runner
from ear_vae.inference.tiling import (
    StageTiles,
    decoder_reach,
    decoder_stages,
    encoder_reach,
    encoder_stages,
    observe_tiles,
    run_stages,
    run_tiled,
    tile_length,
)
from ear_vae.network.blocks import keep_kernels

HOP_1024 = EarVAEConfig(channels=4)
HOP_8 = EarVAEConfig(
    channels=4, latent_dim=32, transformer_depth=0, channel_multipliers=(1, 2), strides=(2, 4)
)
HOP_960 = EarVAEConfig(channels=4, sample_rate=48_000, strides=(2, 2, 4, 6, 10), transformer_depth=0)
BOTH = pytest.mark.parametrize("config", [HOP_1024, HOP_960], ids=["hop1024", "hop960"])
TOLERANCE = 1e-5


def given(**options: Any) -> Callable[..., Runner]:
    """Makes runners with these options, whatever else is asked for."""
    return lambda model, **others: Runner(model, **{**others, **options})


def random_model(config: EarVAEConfig) -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(config).eval().requires_grad_(False)


@BOTH
def test_encoder_reach_is_what_the_gradient_reaches(config: EarVAEConfig) -> None:
    vae, ratio, frame = random_model(config).double(), config.downsampling_ratio, 20
    audio = torch.randn(1, 2, 41 * ratio, dtype=torch.float64, requires_grad=True)
    vae.encoder(audio)[0, :, frame].sum().backward()
    touched = audio.grad[0].abs().sum(0).nonzero().flatten()
    measured = (frame * ratio - int(touched[0]), int(touched[-1]) - (frame + 1) * ratio + 1)
    assert encoder_reach(vae.encoder, ratio) == measured


@BOTH
def test_decoder_reach_is_what_the_gradient_reaches(config: EarVAEConfig) -> None:
    vae, ratio, frame = random_model(config).double(), config.downsampling_ratio, 20
    latents = torch.randn(1, 64, 41, dtype=torch.float64, requires_grad=True)
    vae.decoder(latents)[0, :, frame * ratio : (frame + 1) * ratio].sum().backward()
    touched = latents.grad[0].abs().sum(0).nonzero().flatten()
    assert decoder_reach(vae.decoder, ratio) == (frame - int(touched[0]), int(touched[-1]) - frame)


def test_reach_of_the_published_44k_model() -> None:
    vae = random_model(HOP_1024)
    assert encoder_reach(vae.encoder, 1024) == (8293, 8293)
    assert decoder_reach(vae.decoder, 1024) == (11, 11)


@pytest.mark.parametrize("tile_frames", [1, 7, 64])
@pytest.mark.parametrize("frames", [1, 3.5, 10.5, 130])
@BOTH
def test_tiled_equals_whole(config: EarVAEConfig, frames: float, tile_frames: int) -> None:
    if tile_frames == 1 and frames > 20:
        pytest.skip("a tile of one frame is proven on the shorter inputs")
    vae, ratio = random_model(config), config.downsampling_ratio
    num_frames = -(-int(frames * ratio) // ratio)
    audio = torch.randn(1, 2, num_frames * ratio) * 0.3
    whole = vae.encoder(audio)
    reach = tuple(-(-side // ratio) for side in encoder_reach(vae.encoder, ratio))
    tiled = run_tiled(
        vae.encoder,
        audio,
        inputs_per_frame=ratio,
        outputs_per_frame=1,
        context_frames=reach,
        tile_frames=tile_frames,
    )
    assert_equal_to_peak(tiled, whole)
    latents = torch.randn(1, 64, num_frames)
    tiled = run_tiled(
        vae.decoder,
        latents,
        inputs_per_frame=1,
        outputs_per_frame=ratio,
        context_frames=decoder_reach(vae.decoder, ratio),
        tile_frames=tile_frames,
    )
    assert_equal_to_peak(tiled, vae.decoder(latents))


def test_a_context_one_frame_too_short_is_seen() -> None:
    vae = random_model(HOP_1024)
    latents = torch.randn(1, 64, 60)
    before, after = decoder_reach(vae.decoder, 1024)
    short = run_tiled(
        vae.decoder.double(),
        latents.double(),
        inputs_per_frame=1,
        outputs_per_frame=1024,
        context_frames=(before - 1, after - 1),
        tile_frames=20,
    )
    assert (short - vae.decoder(latents.double())).abs().max() > 0


@pytest.mark.parametrize("samples", [1, 1023, 1024, 1025, 3584, 441_000, 882_000])
def test_public_methods_tile_by_themselves(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same audio with small tiles and in one pass, through the public methods."""
    small, whole = StageTiles(1, 2000), StageTiles(1, 10**9)
    vae = random_model(HOP_1024)
    audio = torch.randn(2, samples) * 0.3
    frames = -(-samples // 1024)
    monkeypatch.setattr("ear_vae.vae.Runner", given(tile_frames=100, stage_tiles=small))
    tiled = vae.encode(audio).mean
    rebuilt = vae.decode(tiled, num_samples=samples)
    monkeypatch.setattr("ear_vae.vae.Runner", given(tile_frames=10**9, stage_tiles=whole))
    assert tiled.shape == (64, frames)
    assert rebuilt.shape == (2, samples)
    assert_equal_to_peak(tiled, vae.encode(audio).mean)
    assert_equal_to_peak(rebuilt, vae.decode(tiled, num_samples=samples))


def test_batches_are_cut_to_the_memory_of_one_tile() -> None:
    vae, seen = random_model(HOP_1024), []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return vae.encoder(x)

    audio = torch.randn(5, 2, 8 * 1024)
    arguments = {"inputs_per_frame": 1024, "outputs_per_frame": 1, "context_frames": (9, 9)}
    tiled = run_tiled(spy, audio, tile_frames=16, **arguments)
    assert seen == [(2, 2, 8192), (2, 2, 8192), (1, 2, 8192)]
    assert_equal_to_peak(tiled, vae.encoder(audio))


@pytest.mark.parametrize(("tile_frames", "units"), [(1, 40), (7, 61), (16, 1000), (1000, 40)])
@pytest.mark.parametrize("layout", ["plain", "channels last"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@BOTH
def test_stages_equal_the_whole(
    config: EarVAEConfig,
    device: str,
    layout: str,
    tile_frames: int,
    units: int,
) -> None:
    """In the tiles of either device, all of them computed on the CPU."""
    stage_tiles = StageTiles(activation_bytes=1, fewest_units=units)
    # Of one frame to a tile there are many.
    vae, ratio, frames = random_model(config), config.downsampling_ratio, 9 if tile_frames == 1 else 21
    options = {"tile_frames": tile_frames}
    if layout == "channels last":
        options["prepare"] = lambda x: x.unsqueeze(-2).contiguous(memory_format=torch.channels_last)
        options["retrieve"] = lambda x: lambda: x.squeeze(-2)
    audio, latents = torch.randn(2, 2, frames * ratio) * 0.3, torch.randn(2, 64, frames)
    encoding = encoder_stages(vae.encoder, config, torch.device(device), stage_tiles)
    decoding = decoder_stages(vae.decoder, config, torch.device(device), stage_tiles)
    assert_equal_to_peak(run_stages(encoding, audio, **options), vae.encoder(audio))
    assert_equal_to_peak(run_stages(decoding, latents, **options), vae.decoder(latents))


def test_tiles_are_of_one_length_and_the_next_is_begun_before_one_is_waited_for() -> None:
    vae, events = random_model(HOP_1024), []
    stages = encoder_stages(vae.encoder, vae.config, torch.device("cuda"))

    def retrieve(tile: torch.Tensor) -> Callable[[], torch.Tensor]:
        number = sum(kind == "begun" for kind, *_ in events)
        events.append(("begun", number))

        def wait() -> torch.Tensor:
            events.append(("waited for", number, tile.shape[-1]))
            return tile

        return wait

    audio, heard = torch.randn(1, 2, 25 * 1024), []
    with observe_tiles(lambda frames, _: heard.append(frames)):
        found = run_stages(stages, audio, tile_frames=8, retrieve=retrieve)
    begun, lengths = [("begun", n) for n in range(4)], [7, 7, 7, 4]
    waited = [("waited for", n, length) for n, length in enumerate(lengths)]
    assert events == [begun[0], begun[1], waited[0], begun[2], waited[1], begun[3], waited[2], waited[3]]
    assert heard == lengths
    assert_equal_to_peak(found, vae.encoder(audio))


def test_a_stage_computes_little_beyond_its_tile() -> None:
    """What the stages of one tile take in: their own context, not that of the whole network."""
    vae, seen = random_model(HOP_1024), []
    stages = decoder_stages(vae.decoder, vae.config, torch.device("cpu"))
    for stage in stages:
        stage.network.register_forward_hook(lambda module, given, result: seen.append(given[0].shape[-1]))
    latents = torch.randn(1, 64, 120)
    run_stages(stages, latents, tile_frames=40)
    # Tile by tile: units of each stage, beside the 40, 320, 1280, ... that are kept.
    middle = seen[len(stages) : 2 * len(stages)]
    kept = [40 * 8, 40 * 32, 40 * 128, 40 * 512]
    assert middle[0] == 40 + 2 * 11
    for found, needed in zip(middle[1:], kept, strict=True):
        assert needed < found <= needed + 2 * 60


@pytest.mark.slow
def test_tiles_of_a_stage_have_few_lengths() -> None:
    """A first, a middle one, and what is left at the ends, whatever the length of the whole."""
    vae, seen = random_model(HOP_1024), []
    tiles = StageTiles(activation_bytes=1, fewest_units=40)
    stages = decoder_stages(vae.decoder, vae.config, torch.device("cpu"), tiles)
    stages[1].network.register_forward_hook(lambda module, given, result: seen.append(given[0].shape[-1]))
    for frames in (80, 95, 111):
        run_stages(stages, torch.randn(1, 64, frames), tile_frames=30)
    usual = [length for length, _ in Counter(seen).most_common(2)]
    # Of some dozen tiles between the ends of a tile along the file, all.
    assert sum(length in usual for length in seen) / len(seen) > 0.8
    before, after = stages[1].context
    assert sorted(usual) == [40 + after, before + 40 + after]


def test_tiles_of_the_full_size_network_stay_within_their_memory() -> None:
    config, device = EarVAEConfig(), torch.device("cpu")
    assert tile_length(config.channels, config.downsampling_ratio, device) * 1024 * 128 * 4 <= 2**27
    with torch.device("meta"):
        vae = EarVAE(config)
    for stages in (
        encoder_stages(vae.encoder, config, device),
        decoder_stages(vae.decoder, config, device)[::-1],
    ):
        for stage, (width, _) in zip(stages, config.block_widths, strict=True):
            values = width * stage.tile_units * max(stage.inputs, stage.outputs)
            assert 4 * values <= (2**24 if stage.tile_units == 512 else 2**22)


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and (key := id(tensor.untyped_storage())) not in self._known:
                self._known.add(key)
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("name", "fused", "activations"),
    [("encoder", False, 5.0), ("decoder", False, 5.8), ("encoder", True, 4.0), ("decoder", True, 4.3)],
)
def test_what_a_tile_of_a_gpu_takes(
    name: str, fused: bool, activations: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on shapes alone, each Snake being one pass, as on a GPU."""
    monkeypatch.setattr("ear_vae.network.blocks.snake", lambda x, *_, **__: torch.empty_like(x))
    monkeypatch.setattr("ear_vae.network.blocks.fuses_sums", lambda x: fused)
    monkeypatch.setattr(
        "ear_vae.network.blocks.snake_of_sum",
        lambda x, *logs, keep_sum, **_: torch.ops.ear_vae.snake(*x.take(), *logs, keep_sum),
    )
    with torch.device("meta"):
        config = EarVAEConfig()
        network = getattr(EarVAE(config), name).requires_grad_(False)
        x = torch.empty(1, 2, 1, 2048 * 1024) if name == "encoder" else torch.empty(1, 64, 1, 2048)
        x = x.contiguous(memory_format=torch.channels_last)
    with Living() as living, torch.no_grad():
        network(x)
    widest = 2048 * 1024 * 128 * 4
    assert living.peak / widest == pytest.approx(activations, abs=0.1)
    assert living.peak / widest < tiling.ACTIVATIONS_ALIVE


@pytest.mark.parametrize("gigabytes", [0.5, 3, 7.3, 22, 78])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_fit_into_what_is_free_on_a_gpu(
    gigabytes: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "free_bytes", lambda device: int(gigabytes * 1e9), raising=False)
    frames = tile_length(128, 1024, torch.device("cuda"), dtype)
    needed = 5.8 * frames * 1024 * 128 * dtype.itemsize
    assert needed < 0.7 * gigabytes * 1e9
    most = 2**30 // (1024 * 128 * dtype.itemsize)
    assert frames in {2**n for n in range(12)} | {most}
    # Nothing is given away: with twice the length it would not fit, or is as long as is useful.
    assert frames == most or 4 * needed > 0.7 * gigabytes * 1e9


def assert_equal_to_peak(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


class Kernels(TorchDispatchMode):
    """The kernels of more than one position that convolutions are called with, and how they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.channels_last: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution.default and args[1].shape[-1] > 1:
            self.calls += 1
            if not args[1].is_contiguous():
                assert args[1].is_contiguous(memory_format=torch.channels_last)
                # Held, so that no other takes its place.
                self.channels_last[args[1].data_ptr()] = args[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["within a stage", "along the file, as on a GPU", "a stream, as on a GPU"])
def test_tiles_share_kernels_that_are_reordered_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = EarVAE(
        EarVAEConfig(
            channels=4, latent_dim=32, transformer_depth=0, channel_multipliers=(1, 2), strides=(2, 4)
        )
    ).requires_grad_(False)
    audio = torch.randn(1, 2, 8 * 600)
    expected = vae.encode(audio).mean
    strides = {name: weight.stride() for name, weight in vae.state_dict().items()}
    stage_tiles = StageTiles(1, 100) if where == "within a stage" else StageTiles()
    runner = Runner(vae, tile_frames=1000 if where == "within a stage" else 100, stage_tiles=stage_tiles)
    if "GPU" in where:
        # The network in one piece, which the tiles along the file share.
        monkeypatch.setattr(Runner, "_kept_kernels", lambda self, kernels: keep_kernels(kernels))

    def encode() -> torch.Tensor:
        if "stream" in where:
            with torch.no_grad():
                parts = list(runner.encode_stream(audio.split(1000, dim=-1)))
            return torch.cat(parts, dim=-1).chunk(2, dim=1)[0]
        return runner.encode(audio).chunk(2, dim=1)[0]

    with Kernels() as seen:
        found = encode()
    assert_equal_to_peak(found, expected)
    kernels = [weight for name, weight in vae.encoder.named_parameters() if weight.ndim == 3]
    several = sum(weight.shape[-1] > 1 for weight in kernels)
    assert seen.calls >= 5 * several
    assert len(seen.channels_last) == several
    assert {name: weight.stride() for name, weight in vae.state_dict().items()} == strides
    # The next run sees what has become of the weights, however that was done.
    vae.encoder.blocks[0].conv.weight.data.mul_(2)
    assert_equal_to_peak(encode(), vae.encode(audio).mean)
    assert not torch.allclose(encode(), expected)


def test_a_single_tile_keeps_no_kernels() -> None:
    vae = EarVAE(
        EarVAEConfig(
            channels=4, latent_dim=32, transformer_depth=0, channel_multipliers=(1, 2), strides=(2, 4)
        )
    ).requires_grad_(False)
    with Kernels() as seen:
        vae.encode(torch.randn(1, 2, 8 * 100))
    assert seen.calls > 0
    assert not seen.channels_last
