"""The public class on tensors: shapes, ranks, dtypes, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
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


def test_compiled_it_gives_the_same_and_only_where_no_gradient_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval()
    audio, latents = torch.randn(2, 2, 30_000) * 0.1, torch.randn(2, 64, 20)
    with torch.no_grad():
        expected = vae.encode(audio).mean, vae.decode(latents)
    calls = []

    def stand_in(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return snake_module._formula_of_rows(*arguments)

    monkeypatch.setattr(snake_module, "_compiled", lambda: stand_in)
    vae.compile()
    calls.clear()
    with torch.no_grad():
        found = vae.encode(audio).mean, vae.decode(latents)
    snakes = sum(isinstance(module, Snake) for module in vae.modules())
    assert len(calls) > snakes
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    calls.clear()
    vae.decode(latents).sum().backward()
    assert not calls


def test_where_nothing_can_be_compiled_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("C++ compiler not found\nand more")

    monkeypatch.setattr(snake_module, "_compiled", lambda: refuse)
    vae, latents = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False), torch.randn(64, 5)
    expected = vae.decode(latents)
    with pytest.warns(UserWarning, match="without being compiled: C\\+\\+ compiler not found$"):
        vae.compile()
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=0)


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


def test_half_precision_is_refused(vae: EarVAE) -> None:
    with pytest.raises(EarVAEError, match=r"float16.*bfloat16"):
        vae.to(torch.float16)
    with pytest.raises(EarVAEError, match="float16"):
        vae.half()


def test_the_transformer_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    vae = EarVAE(EarVAEConfig(channels=4)).eval().requires_grad_(False)
    latents = torch.randn(1, 64, 30)
    expected = vae.transformer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vae._transformed(latents)
    assert torch.equal(found, expected)
