"""The worked example: its flow goes the right way, and what it makes up sounds like the songs on average."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
from torch import Tensor, nn

from ear_vae import EarVAE
from ear_vae.audio import read_audio
from ear_vae.dsp._torchaudio import functional
from ear_vae.encoding import latent_statistics
from ear_vae.pretrained.bundled import bundled_checkpoints

# Of one loudness: else chance, which decides how many samples are of which song, decides their mean too.
SONGS = (
    "cxong+cdogs-sdl/Epic_Fall.ogg",
    "cxong+cdogs-sdl/red_doors2.ogg",
    "flutter+games/Mr_Smith-Azul.mp3",
)
SECONDS = 15


@pytest.fixture(scope="module")
def example(repository: Path) -> Path:
    return repository / "examples" / "latent_flow" / "latent_flow.py"


@pytest.fixture(scope="module")
def latent_flow(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("latent_flow", example)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Velocity(nn.Module):
    """A velocity that is given by a formula."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        return self.formula(latents, time[:, None, None])


def test_the_example_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 200


def test_the_flow_of_gaussian_latents_ends_in_them(latent_flow: ModuleType) -> None:
    """For latents of N(m, s²) the best velocity has a closed form; time 0 is noise and time 1 is music."""
    m, s = 3.0, 0.25

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    flow = latent_flow.LatentFlow(Velocity(velocity), lambda latents: latents)
    noise = torch.randn(100, 4, 50, generator=torch.Generator().manual_seed(0))
    sample = flow.sample(noise, steps=100)
    # It carries each point of one Gaussian to that of the other.
    assert torch.allclose(sample, m + s * noise, atol=0.01)
    # And no velocity has a smaller loss.
    batch = {"latents": m + s * torch.randn(500, 4, 50), "padding_mask": torch.ones(500, 50)}
    best = flow.loss(batch, torch.Generator().manual_seed(1))
    for change in (0.9, 1.1):
        worse = latent_flow.LatentFlow(Velocity(lambda x, t, c=change: c * velocity(x, t)), lambda z: z)
        assert worse.loss(batch, torch.Generator().manual_seed(1)) > best


def test_the_network_starts_with_what_is_best_for_noise(latent_flow: ModuleType) -> None:
    """Before it has learnt anything, it takes Gaussian latents for that: they are carried nowhere."""
    network = latent_flow.VelocityTransformer(4, 16, width=64, depth=1)
    noise = torch.randn(3, 4, 16)
    assert torch.allclose(latent_flow.LatentFlow(network, lambda z: z).sample(noise, 200), noise, atol=1e-3)


def test_padding_does_not_count(latent_flow: ModuleType) -> None:
    flow = latent_flow.LatentFlow(Velocity(lambda x, t: torch.zeros_like(x)), lambda latents: latents / 2)
    latents = torch.randn(6, 4, 50)
    mask = torch.arange(50) < torch.tensor([50, 40, 30, 20, 10, 1])[:, None]
    generator = torch.Generator().manual_seed(0)
    loss = flow.loss({"latents": latents, "padding_mask": mask}, generator)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    errors = (latents / 2 - noise).square().movedim(1, 2)[mask]
    assert float(loss) == pytest.approx(float(errors.mean()), rel=1e-5)
    spoilt = torch.where(mask[:, None], latents, 1000.0)
    again = flow.loss({"latents": spoilt, "padding_mask": mask}, torch.Generator().manual_seed(0))
    assert torch.equal(again, loss)


def mel_db(audio: Tensor, sample_rate: int) -> Tensor:
    """Log-mel spectra of all frames and channels, [frames, 64], in dB."""
    spectrum = torch.stft(audio, 2048, 1024, window=torch.hann_window(2048), return_complex=True)
    filters = functional().melscale_fbanks(1025, 20.0, 20_000.0, 64, sample_rate)
    mel = spectrum.abs().square().transpose(1, 2) @ filters
    return 10 * torch.log10(mel + 1e-12).flatten(0, 1)


# With fewer steps it is not so much nearer than noise of the right spread.
@pytest.mark.long
@pytest.mark.skipif("ear-vae-tiny" not in bundled_checkpoints(), reason="needs the bundled checkpoint")
def test_samples_have_the_spectrum_of_the_songs(
    tmp_path: Path, training_music: Path, example: Path, write_latents: Callable[..., Path]
) -> None:
    """A quarter of a minute of each of three songs; within 3 dB of them, and nearer than decoded noise."""
    vae = EarVAE.from_pretrained("ear-vae-tiny")
    songs, items = [], []
    for name in SONGS:
        audio, sample_rate = read_audio(
            training_music / name, start=20 * 44_100, num_samples=SECONDS * 44_100
        )
        assert sample_rate == vae.sample_rate
        posterior = vae.encode(audio)
        songs.append(mel_db(audio, sample_rate))
        items.append({"mean": posterior.mean.half().numpy(), "std": posterior.std.half().numpy()})
    latents = write_latents(
        tmp_path / "latents", "webdataset", items, ratio=256, weights_sha256=vae.weights_sha256
    )
    statistics = latent_statistics(latents)
    vae.set_latent_statistics(statistics.mean, statistics.std)
    vae.save_pretrained(tmp_path / "model")
    command = [sys.executable, example, latents, "--model", tmp_path / "model", "--out", tmp_path / "samples"]
    subprocess.run([*map(str, command), "--precision", "bf16-mixed"], check=True, timeout=900)
    found = sorted((tmp_path / "samples").glob("*.wav"))
    assert len(found) == 16
    samples = [torch.from_numpy(soundfile.read(path, dtype="float32")[0].T.copy()) for path in found]
    # Of the songs, what is 80 dB below their loudest place is as good as nothing.
    whole = torch.cat(songs)
    floor = whole.max() - 80

    def spectrum(frames: Tensor) -> Tensor:
        return frames.clamp(min=floor).mean(dim=0)

    def distance(audio: list[Tensor]) -> float:
        made = torch.cat([mel_db(one, vae.sample_rate) for one in audio])
        return float((spectrum(made) - spectrum(whole)).abs().mean())

    prior = torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(0))
    made, noise = distance(samples), distance(list(vae.decode(prior)))
    spread = distance(list(vae.decode(vae.denormalize(prior))))
    assert made < 3
    assert made < min(noise, spread) - 1
