"""The public class on tensors: shapes, ranks, dtypes, gradients, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.dsp.si_sdr import scale_invariant_sdr_db
from ear_vae.inference.runner import Runner
from ear_vae.network import snake as snake_module
from ear_vae.network.blocks import Snake


@pytest.fixture(scope="module")
def vae() -> EarVAE:
    torch.manual_seed(0)
    return EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False)


def test_ranks_are_kept(vae: EarVAE) -> None:
    audio = torch.randn(3, 2, 5000) * 0.1
    batched, single = vae.encode(audio), vae.encode(audio[1])
    assert batched.mean.shape == (3, 64, 5)
    assert single.mean.shape == (64, 5)
    torch.testing.assert_close(single.mean, batched.mean[1], rtol=1e-4, atol=1e-5)
    assert vae.decode(batched.mean).shape == (3, 2, 5 * 1024)
    assert vae.decode(single.mean, num_samples=5000).shape == (2, 5000)
    assert vae.reconstruct(audio).shape == (3, 2, 5000)
    assert vae.reconstruct(audio[0]).shape == (2, 5000)


def test_padding_is_zeros_on_the_right(vae: EarVAE) -> None:
    audio = torch.randn(2, 1500) * 0.1
    padded = torch.cat((audio, torch.zeros(2, 548)), dim=1)
    torch.testing.assert_close(vae.encode(audio).mean, vae.encode(padded).mean, rtol=0, atol=0)


def test_mono_is_duplicated_and_folded_back(vae: EarVAE) -> None:
    mono = torch.randn(1, 3000) * 0.1
    stereo = mono.expand(2, -1)
    torch.testing.assert_close(vae.encode(mono).mean, vae.encode(stereo).mean)
    folded = vae.reconstruct(mono)
    assert folded.shape == (1, 3000)
    torch.testing.assert_close(folded[0], vae.reconstruct(stereo).mean(dim=0))


def test_numpy_and_non_contiguous_input(vae: EarVAE) -> None:
    interleaved = torch.randn(4000, 2) * 0.1
    expected = vae.encode(interleaved.T.contiguous()).mean
    torch.testing.assert_close(vae.encode(interleaved.T).mean, expected)
    torch.testing.assert_close(vae.encode(interleaved.T.double().numpy()).mean, expected)
    torch.testing.assert_close(vae.encode(np.ascontiguousarray(interleaved.T.numpy())).mean, expected)


def test_one_sample_and_silence(vae: EarVAE) -> None:
    assert vae.reconstruct(torch.full((2, 1), 0.5)).shape == (2, 1)
    assert vae.reconstruct(torch.zeros(2, 2000)).isfinite().all()


def test_reconstruct_is_encode_then_decode(vae: EarVAE) -> None:
    audio = torch.randn(2, 7000) * 0.1
    by_hand = vae.decode(vae.encode(audio).mode(), num_samples=7000)
    torch.testing.assert_close(vae.reconstruct(audio), by_hand, rtol=0, atol=0)
    rebuilt, posterior = vae(audio[None])
    torch.testing.assert_close(rebuilt[0], by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.mean[0], vae.encode(audio).mean, rtol=1e-4, atol=1e-5)


def test_other_rates_come_back_at_their_own(vae: EarVAE) -> None:
    audio = torch.randn(1, 2, 4801) * 0.1
    assert vae.reconstruct(audio, sample_rate=48_000).shape == (1, 2, 4801)
    assert vae.encode(audio, sample_rate=48_000).mean.shape == (1, 64, 5)
    assert vae.encode(audio, sample_rate=22_050).mean.shape == (1, 64, 10)


def test_gradients_pass_encode_and_decode(vae: EarVAE) -> None:
    double = EarVAE(EarVAEConfig(channels=4)).double().eval()
    latents = torch.randn(1, 64, 3, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(latents)
    (gradient,) = torch.autograd.grad(double.decode(latents).square().sum(), latents)
    step = 1e-6
    difference = (
        double.decode(latents + step * probe).square().sum()
        - double.decode(latents - step * probe).square().sum()
    )
    assert float((gradient * probe).sum().detach()) == pytest.approx(
        float(difference.detach()) / (2 * step), rel=1e-5
    )
    audio = torch.randn(1, 2, 3000, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(audio)
    (gradient,) = torch.autograd.grad(double.encode(audio).mean.square().sum(), audio)
    difference = (
        double.encode(audio + step * probe).mean.square().sum()
        - double.encode(audio - step * probe).mean.square().sum()
    )
    assert float((gradient * probe).sum().detach()) == pytest.approx(
        float(difference.detach()) / (2 * step), rel=1e-5
    )


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    torch.manual_seed(0)
    vae, audio = EarVAE(EarVAEConfig(channels=4)), torch.randn(1, 2, 8 * 1024)
    gradients, kept = [], []
    for vae.gradient_checkpointing in (False, True):
        sizes: dict[int, int] = {}

        def remember(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = vae(audio).audio.square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in vae.parameters()])
        kept.append(sum(sizes.values()))
        vae.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < kept[0] / 3


def test_a_frozen_model_still_gives_gradients_to_its_input(vae: EarVAE) -> None:
    latents = torch.randn(64, 4, requires_grad=True)
    vae.decode(latents).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_bfloat16_is_near_float32_and_returns_float32() -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False)
    audio = torch.randn(2, 8192) * 0.1
    expected = vae.encode(audio).mean
    found = vae.to(torch.bfloat16).encode(audio).mean
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (found - expected).norm() > 0


def test_with_bfloat16_weights_music_stays_within_45_db(training_music: Path) -> None:
    """What costs little stays in float32, see `network.blocks`; all in bfloat16 gives 42 and 44 dB."""
    track = training_music.parent / "eval" / "OpenHV+OpenHV" / "Pink_Blue.ogg"
    samples, _ = soundfile.read(track, start=20 * 44_100, frames=4 * 44_100, dtype="float32")
    audio = torch.from_numpy(samples.T.copy())
    vae, reduced = (EarVAE.from_pretrained("ear-vae-tiny", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert reduced.dtype == torch.bfloat16
    kept = [p for convolution in reduced.wide_convolutions() for p in convolution.parameters()]
    assert {p.dtype for p in kept} == {torch.float32}
    assert sum(p.numel() for p in kept) < 0.2 * sum(p.numel() for p in reduced.parameters())
    latents = vae.encode(audio).mean
    expected = vae.decode(latents)
    found = reduced.encode(audio).mean
    # Of the encoder's last convolution in bfloat16 too: 49.8.
    assert scale_invariant_sdr_db(found, latents).mean() > 51
    for rebuilt in (reduced.decode(latents), reduced.decode(found)):
        assert scale_invariant_sdr_db(rebuilt, expected).mean() > 45


def test_compiled_it_gives_the_same_and_only_where_no_gradient_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval()
    audio, latents = torch.randn(2, 2, 30_000) * 0.1, torch.randn(2, 64, 20)
    with torch.no_grad():
        expected = vae.encode(audio).mean, vae.decode(latents)
    calls = []

    def stand_in(function: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (calls.append(function), function(*arguments))[1]

    monkeypatch.setattr(snake_module, "_compiled", stand_in)
    vae.optimize_for_inference()
    calls.clear()
    with torch.no_grad():
        found = vae.encode(audio).mean, vae.decode(latents)
    snakes = sum(isinstance(module, Snake) for module in vae.modules())
    assert len(calls) > snakes
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    calls.clear()
    vae.decode(latents).sum().backward()
    assert not calls


def test_compiled_bfloat16_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rounding of its shorter sine: sums of residual units in the same pass, in float32."""
    monkeypatch.setattr(snake_module, "_compiled", lambda function: function)
    sums = []
    in_one_pass = snake_module._sum_in_one_pass
    monkeypatch.setattr(
        snake_module, "_sum_in_one_pass", lambda *given: sums.append(in_one_pass(*given)) or sums[-1]
    )
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=16)).eval().requires_grad_(False)
    vae.cast(torch.bfloat16)
    audio, latents = 0.1 * torch.randn(2, 8192), torch.randn(64, 8)
    expected = vae.encode(audio).mean, vae.decode(latents)
    vae.optimize_for_inference()
    sums.clear()
    found = vae.encode(audio).mean, vae.decode(latents)
    assert len(sums) >= 2 * 5 * 2
    assert {(total.dtype, activated.dtype) for total, activated in sums} == {(torch.float32, torch.bfloat16)}
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_where_nothing_can_be_compiled_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("C++ compiler not found\nand more")

    monkeypatch.setattr(snake_module, "_compiled", lambda function: refuse)
    vae, latents = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False), torch.randn(64, 5)
    expected = vae.decode(latents)
    with pytest.warns(UserWarning, match="without being compiled: C\\+\\+ compiler not found and more$"):
        vae.optimize_for_inference()
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=0)


def test_compile_is_that_of_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of a call, with its options, and nothing of `optimize_for_inference`."""
    torch.manual_seed(0)
    vae, audio = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False), torch.randn(1, 2, 3000)
    expected, seen = vae(audio).audio, []

    def compile(call: Callable[..., object], **options: object) -> Callable[..., object]:
        seen.append(options)
        return lambda *arguments, **given: (seen.append("called"), call(*arguments, **given))[1]

    monkeypatch.setattr(torch, "compile", compile)
    vae.compile(mode="max-autotune", dynamic=True)
    assert torch.equal(vae(audio).audio, expected)
    assert seen == [{"mode": "max-autotune", "dynamic": True}, "called"]
    assert not any(module.compiled for module in vae.modules() if isinstance(module, Snake))


def test_facts_of_the_published_variants() -> None:
    with torch.device("meta"):
        full = EarVAE()
        second = EarVAE(EarVAEConfig(sample_rate=48_000, strides=(2, 2, 4, 6, 10), transformer_depth=0))
    assert (full.sample_rate, full.downsampling_ratio, full.latent_dim) == (44_100, 1024, 64)
    assert full.latent_rate == pytest.approx(43.07, abs=0.005)
    assert (second.downsampling_ratio, second.latent_rate) == (960, 50.0)
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(147.8e6, rel=1e-3)


def test_name_and_fingerprint(vae: EarVAE) -> None:
    torch.manual_seed(0)
    again = EarVAE(EarVAEConfig(channels=4))
    assert again.weights_sha256 == vae.weights_sha256
    before = again.weights_sha256
    assert again.to(torch.bfloat16).weights_sha256 == before
    with torch.no_grad():
        again.decoder.conv_out.weight.add_(1.0)
    assert again.weights_sha256 != before


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(100), r"shape \[100\].*\[C, T\].*audio\[None\]"),
        (torch.zeros(1, 1, 2, 100), r"expected \[C, T\] or \[B, C, T\]"),
        (torch.zeros(2, 100, dtype=torch.int16), r"floating point.*int16.*32768"),
        (torch.zeros(2, 0), "no samples"),
        (torch.zeros(6, 1000), "6 channels.*downmix"),
        (torch.zeros(1000, 2), "last axis looks like the channels.*transpose"),
    ],
)
def test_refused_audio(vae: EarVAE, audio: torch.Tensor, message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        vae.encode(audio)
    with pytest.raises(EarVAEError, match=message):
        vae.reconstruct(audio)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(10, 64), r"expected \[64, N\]"),
        (torch.zeros(64), r"expected \[64, N\]"),
        (torch.zeros(64, 5, dtype=torch.int32), "floating point"),
        (torch.zeros(64, 0), "nothing to decode"),
    ],
)
def test_refused_latents(vae: EarVAE, latents: torch.Tensor, message: str) -> None:
    with pytest.raises(EarVAEError, match=message):
        vae.decode(latents)


@pytest.mark.parametrize("num_samples", [0, -1, 5 * 1024 + 1])
def test_refused_lengths(vae: EarVAE, num_samples: int) -> None:
    with pytest.raises(EarVAEError, match="decode to 1 to 5120 samples"):
        vae.decode(torch.zeros(64, 5), num_samples=num_samples)


@pytest.mark.parametrize(
    "cast",
    [
        lambda vae: vae.half(),
        lambda vae: vae.to(torch.float16),
        lambda vae: torch.nn.ModuleDict({"v": vae}).half(),
        lambda vae: torch.nn.ModuleDict({"v": vae}).to(torch.float16),
        lambda vae: vae.decoder.half() and vae.encoder.half(),
    ],
)
def test_float16_is_refused_where_it_would_run_however_it_came_about(
    cast: Callable[[EarVAE], object],
) -> None:
    vae = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False)
    cast(vae)
    audio, latents = torch.zeros(2, 5000), torch.zeros(64, 5)
    for run in (
        lambda: vae.encode(audio),
        lambda: vae.decode(latents),
        lambda: vae.reconstruct(audio),
        lambda: vae(audio[None]),
        lambda: list(vae.encode_stream([audio])),
        lambda: list(vae.decode_stream([latents])),
    ):
        with pytest.raises(EarVAEError, match=r"float16.*use bfloat16 or float32"):
            run()


def test_autocast_to_float16_is_refused_and_to_bfloat16_is_not(vae: EarVAE) -> None:
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(EarVAEError, match=r"autocast.*float16"):
        vae.encode(torch.zeros(2, 5000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vae.encode(torch.zeros(2, 5000)).mean.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_dtype_by_name(dtype: str, small_model: Path) -> None:
    assert EarVAE.from_pretrained(small_model, dtype=dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "float16 overflows.*use float32, bfloat16"),
        ({"dtype": torch.float16}, "float16 overflows.*use float32, bfloat16"),
        ({"dtype": "int8"}, "'int8' is not supported.*use float32"),
        ({"device": "gpu"}, "device 'gpu' is not available.*called 'cuda'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available.*have cpu"),
    ],
)
def test_devices_and_dtypes_that_cannot_be(
    arguments: dict[str, object], message: str, small_model: Path
) -> None:
    with pytest.raises(EarVAEError, match=message) as caught:
        EarVAE.from_pretrained(small_model, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [np.int64(48_000), np.int32(48_000), torch.tensor(48_000)])
def test_rates_may_be_integers_of_any_library(rate: int, vae: EarVAE) -> None:
    audio = torch.randn(2, 4801) * 0.1
    assert torch.equal(vae.encode(audio, rate).mean, vae.encode(audio, 48_000).mean)
    assert torch.equal(vae.reconstruct(audio, rate), vae.reconstruct(audio, 48_000))
    streamed = torch.cat([p.mean for p in vae.encode_stream([audio], rate)], dim=-1)
    torch.testing.assert_close(streamed, vae.encode(audio, 48_000).mean)


@pytest.mark.parametrize("rate", [10_000_019, 10**12, 10**400, 999, 0, -48_000, True, 48_000.0, "48000"])
def test_rates_out_of_range_are_refused_before_any_work(rate: int, vae: EarVAE) -> None:
    audio = torch.zeros(2, 100)
    for run in (
        lambda: vae.encode(audio, rate),
        lambda: vae.reconstruct(audio, rate),
        lambda: list(vae.encode_stream([audio], rate)),
    ):
        with pytest.raises(
            EarVAEError, match=r"sample_rate must be (1000 to 768000 Hz|an integer), got"
        ) as caught:
            run()
        assert len(str(caught.value)) < 200


def test_the_state_dict_knows_nothing_of_how_kernels_are_used(tmp_path: Path, small_model: Path) -> None:
    vae = EarVAE.from_pretrained(small_model)
    audio = torch.randn(2, 9000) * 0.1
    expected = vae.reconstruct(audio)
    assert all(tensor.is_contiguous() for tensor in vae.state_dict().values())
    save_file(vae.state_dict(), tmp_path / "plain.safetensors")
    torch.save(vae.state_dict(), tmp_path / "state.pt")
    torch.save(vae, tmp_path / "whole.pt")
    flat = torch.nn.utils.parameters_to_vector(vae.parameters())
    assert flat.numel() == sum(p.numel() for p in vae.parameters())
    for state in (load_file(tmp_path / "plain.safetensors"), torch.load(tmp_path / "state.pt")):
        other = EarVAE(vae.config).eval().requires_grad_(False)
        other.load_state_dict(state)
        assert torch.equal(other.reconstruct(audio), expected)
    other = EarVAE(vae.config).eval().requires_grad_(False)
    torch.nn.utils.vector_to_parameters(flat, other.parameters())
    for same in (other, copy.deepcopy(vae), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(same.reconstruct(audio), expected)
        assert same.weights_sha256 == vae.weights_sha256


def test_inference_adds_no_memory_to_the_model(vae: EarVAE) -> None:
    def stored() -> dict[int, int]:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in vae.parameters()}
        held = (t for m in vae.modules() for t in vars(m).values() if isinstance(t, torch.Tensor))
        return storages | {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}

    before = stored()
    vae.reconstruct(torch.zeros(2, 3000))
    assert stored() == before


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_takes_it(trained: bool) -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(trained)
    audio = torch.randn(1, 2, 4096) * 0.1
    exported = torch.export.export(vae, (audio,)).module()
    for x in (audio, audio.flip(-1)):
        found, expected = exported(x), vae(x)
        torch.testing.assert_close(found.audio, expected.audio, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.posterior.std, expected.posterior.std, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of attention under vmap
@pytest.mark.parametrize("trained", [False, True])
def test_torch_func_takes_it(trained: bool) -> None:
    """vmap against a batch, jvp and vjp against each other and against a difference, in float64."""
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).double().eval().requires_grad_(trained)
    audio = torch.randn(3, 2, 3000, dtype=torch.float64) * 0.1
    with torch.no_grad():
        posterior = torch.func.vmap(vae.encode)(audio)
        torch.testing.assert_close(posterior.mean, vae.encode(audio).mean)
        torch.testing.assert_close(
            torch.func.vmap(vae.decode)(posterior.mean), vae.decode(vae.encode(audio).mean)
        )

    def energy(x: torch.Tensor) -> torch.Tensor:
        return vae(x[None]).audio.square().sum()

    direction = torch.randn(2, 3000, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        difference = (energy(audio[0] + step * direction) - energy(audio[0] - step * direction)) / (2 * step)
    gradient = torch.func.grad(energy)(audio[0])
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        _, derivative = torch.func.jvp(energy, (audio[0],), (direction,))
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-8)
    each = torch.func.vmap(torch.func.grad(energy))(audio)
    torch.testing.assert_close(each[0], gradient)
    weights = {name: 0.5 * p.detach() for name, p in vae.named_parameters()}
    found = torch.func.functional_call(vae, weights, (audio,)).audio
    halved = copy.deepcopy(vae)
    halved.load_state_dict(weights)
    torch.testing.assert_close(found, halved(audio).audio)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_jacobians_in_reverse_mode_are_those_in_forward_mode(
    least_config: EarVAEConfig, direction: str
) -> None:
    """Reverse mode asks for many gradients at once, which torch batches."""
    vae = EarVAE(least_config).double().eval()
    x = torch.randn(2 if direction == "encode" else 4, 16, dtype=torch.float64)

    def network(x: torch.Tensor) -> torch.Tensor:
        return vae.encode(x).mean if direction == "encode" else vae.decode(x)

    expected = torch.func.jacfwd(network)(x)
    torch.testing.assert_close(torch.func.jacrev(network)(x), expected)
    found = torch.autograd.functional.jacobian(network, x, vectorize=True)
    torch.testing.assert_close(found, expected)


def test_inference_mode_loads_a_model_that_can_be_trained_later(small_model: Path) -> None:
    with torch.inference_mode():
        vae = EarVAE.from_pretrained(small_model, dtype=torch.float64)
        sha256 = vae.weights_sha256
    assert sha256 == EarVAE.from_pretrained(small_model).weights_sha256
    vae.requires_grad_(True)(torch.zeros(1, 2, 2000)).audio.sum().backward()
    assert vae.decoder.conv_out.weight.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda vae: vae.decoder.conv_out.weight.data.mul_(1.5),
        lambda vae: vae.load_state_dict({k: 1.5 * v for k, v in vae.state_dict().items()}, assign=True),
        lambda vae: vae.decoder.conv_out.weight.set_(vae.decoder.conv_out.weight * 1.5),
        lambda vae: np.multiply(
            vae.decoder.conv_out.weight.numpy(), 1.5, vae.decoder.conv_out.weight.numpy()
        ),
    ],
)
@torch.no_grad()
def test_the_fingerprint_is_of_the_values_whatever_changed_them(
    change: Callable[[EarVAE], object], small_model: Path, tmp_path: Path
) -> None:
    vae = EarVAE.from_pretrained(small_model)
    before = vae.weights_sha256
    change(vae)
    after = vae.weights_sha256
    assert after != before
    vae.save_pretrained(tmp_path / "tuned")
    assert EarVAE.from_pretrained(tmp_path / "tuned").weights_sha256 == after


def test_the_fingerprint_follows_a_fused_optimizer(small_model: Path) -> None:
    vae = EarVAE.from_pretrained(small_model).requires_grad_(True)
    before = vae.weights_sha256
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, fused=True)
    vae(torch.randn(1, 2, 2000)).audio.square().mean().backward()
    optimizer.step()
    assert vae.weights_sha256 != before


def test_one_model_in_every_dtype_has_one_fingerprint(small_model: Path) -> None:
    vae = EarVAE.from_pretrained(small_model)
    expected = vae.weights_sha256
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float32):
        assert torch.nn.ModuleDict({"v": vae}).to(dtype)["v"].weights_sha256 == expected


def test_the_transformer_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False)
    latents = torch.randn(1, 64, 30)
    expected = vae.transformer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Runner(vae).transform(latents)
    assert torch.equal(found, expected)
