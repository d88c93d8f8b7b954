"""The drop-in for AutoencoderOobleck, in diffusers' own pipelines and beside its own class."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ear_vae import EarVAE, EarVAEError
from ear_vae.dsp._torchaudio import functional

functional()
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from documentation import before_and_after  # noqa: E402
from pipelines import FRAMES, HOP, ace_step, stable_audio  # noqa: E402

from ear_vae.integrations.diffusers import AutoencoderEarVAE, LatentDistribution  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def drop_in(oobleck: Any, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderEarVAE:
    """Ours with the weights of diffusers' Oobleck."""
    folder = tmp_path_factory.mktemp("oobleck")
    oobleck.save_pretrained(folder / "model")
    vae = EarVAE.from_pretrained(folder / "model", cache_dir=folder)
    return AutoencoderEarVAE.from_ear_vae(vae)


@pytest.fixture
def ours(narrow_vae: EarVAE) -> AutoencoderEarVAE:
    return AutoencoderEarVAE.from_ear_vae(narrow_vae)


def run_stable_audio(pipe: Any, **options: Any) -> Tensor:
    """Two songs from initial recordings, with a generator for each."""
    initial = 0.3 * torch.randn(2, 2, HOP * FRAMES, generator=torch.Generator().manual_seed(2))
    generators = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)]
    audio: Tensor = pipe(
        prompt=["a a", "a"],
        num_inference_steps=2,
        initial_audio_waveforms=initial.to(pipe.transformer.dtype),
        initial_audio_sampling_rate=44_100,
        generator=generators,
        output_type="pt",
        **options,
    ).audios
    return audio


def run_ace_step(pipe: Any, **options: Any) -> Tensor:
    """Repaints a part of a recording."""
    torch.manual_seed(5)
    source = 0.3 * torch.randn(2, HOP * FRAMES, generator=torch.Generator().manual_seed(2))
    audio: Tensor = pipe(
        prompt="a",
        lyrics="a",
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        task_type="repaint",
        src_audio=source,
        repainting_start=0.01,
        repainting_end=0.02,
        **options,
    ).audios
    return audio


PIPELINES = [(stable_audio, run_stable_audio), (ace_step, run_ace_step)]


@pytest.mark.parametrize(("build", "run"), PIPELINES)
def test_a_pipeline_gives_with_the_drop_in_what_it_gives_with_oobleck(
    build: Callable[[Any], Any], run: Callable[..., Tensor], oobleck: Any, drop_in: AutoencoderEarVAE
) -> None:
    expected = run(build(oobleck))
    assert expected.std() > 1e-3
    torch.testing.assert_close(run(build(drop_in)), expected, rtol=1e-4, atol=1e-5)


def test_the_pages_pipeline_before_and_after(oobleck: Any, tmp_path: Path) -> None:
    """Run with a small pipeline in the place of Stable Audio Open."""
    stable_audio(oobleck).save_pretrained(tmp_path / "pipe")
    songs = []
    for code in before_and_after("diffusers.md"):
        code = code.replace("stabilityai/stable-audio-open-1.0", str(tmp_path / "pipe")).replace("100", "2")
        names: dict[str, Any] = {}
        exec(code, names)
        songs.append((type(names["pipe"].vae).__name__, names["audio"]))
    (first, before), (second, after) = songs
    assert (first, second) == ("AutoencoderOobleck", "AutoencoderEarVAE")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_pipeline_with_a_model_of_ours(ours: AutoencoderEarVAE, narrow_vae: EarVAE) -> None:
    pipe = stable_audio(ours)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    songs = run_stable_audio(pipe)
    num_samples = songs.shape[-1]
    assert songs.shape[:2] == (2, 2)
    assert HOP * FRAMES - num_samples in (0, 1)  # it cuts to what it makes of the seconds
    final = pipe(
        prompt="a", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).audios
    audio = pipe(
        prompt="a", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).audios
    torch.testing.assert_close(audio, narrow_vae.decode(final, num_samples))
    pipe.vae.disable_slicing()
    pipe.vae.disable_tiling()


def test_a_saved_pipeline_loads_in_float16_with_the_autoencoder_in_float32(
    ours: AutoencoderEarVAE, narrow_vae: EarVAE, tmp_path: Path
) -> None:
    stable_audio(ours).save_pretrained(tmp_path / "pipe")
    pipe = diffusers.StableAudioPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float16)
    assert isinstance(pipe.vae, AutoencoderEarVAE)
    assert pipe.transformer.dtype == torch.float16
    assert pipe.vae.dtype == torch.float32
    z = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0)).half()
    audio = pipe.vae.decode(z).sample
    assert audio.dtype == torch.float16
    torch.testing.assert_close(audio, narrow_vae.decode(z.float()).half())
    distribution = pipe.vae.encode(audio).latent_dist
    torch.testing.assert_close(distribution.mean, narrow_vae.encode(audio.float()).mean.half())
    assert {t.dtype for t in (distribution.std, distribution.sample(), distribution.kl())} == {torch.float16}

    pipe.vae.to(torch.float16)
    cure = r"weights are in float16.*pipe\.vae\.to\(torch\.float32\)"
    with pytest.raises(EarVAEError, match=cure):
        pipe.vae.decode(z)
    with pytest.raises(EarVAEError, match=cure):
        pipe.vae.encode(audio)
    pipe.vae.to(torch.float32)
    torch.testing.assert_close(pipe.vae.decode(z).sample, audio, rtol=1e-2, atol=1e-2)
    pipe.vae.to(torch.bfloat16)
    assert pipe.vae.decode(z.bfloat16()).sample.dtype == torch.bfloat16


def test_under_autocast_to_float16_it_stays_in_float32(ours: AutoencoderEarVAE) -> None:
    z = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    expected = ours.decode(z).sample
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(ours.decode(z).sample, expected)


def test_the_distribution_is_that_of_oobleck(oobleck: Any, drop_in: AutoencoderEarVAE) -> None:
    audio = 0.3 * torch.randn(2, 2, HOP * 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = oobleck.encode(audio, return_dict=False)[0]
    mine = drop_in.encode(audio, return_dict=False)[0]
    assert isinstance(mine, LatentDistribution)
    for name in ("mean", "std", "var", "logvar", "parameters"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, msg=name)
    assert mine.deterministic is theirs.deterministic is False
    torch.testing.assert_close(mine.kl(), theirs.kl(), rtol=1e-4, atol=1e-5)
    seeds = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    again = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    torch.testing.assert_close(mine.sample(seeds), theirs.sample(again), rtol=1e-4, atol=1e-5)
    assert torch.equal(mine.mode(), mine.mean)


def test_kl_to_another_distribution_is_twice_that_of_torch(drop_in: AutoencoderEarVAE) -> None:
    audio = 0.3 * torch.randn(2, 2, HOP * 12, generator=torch.Generator().manual_seed(1))
    one, other = drop_in.encode(audio).latent_dist, drop_in.encode(audio.flip(-1)).latent_dist
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(one.mean, one.std), torch.distributions.Normal(other.mean, other.std)
    )
    torch.testing.assert_close(one.kl(other), 2 * expected.sum(1).mean(), rtol=1e-4, atol=1e-5)
    assert one.kl(one) == pytest.approx(0, abs=1e-5)


def test_forward_keeps_the_length(oobleck: Any, drop_in: AutoencoderEarVAE) -> None:
    """Oobleck drops what is over a frame, and is equal to ours otherwise."""
    audio = 0.3 * torch.randn(1, 2, HOP * 40 + 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = oobleck(audio[..., : HOP * 40], return_dict=False)[0]
    assert drop_in(audio).sample.shape == audio.shape
    mine = drop_in(audio[..., : HOP * 40], return_dict=False)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    draw = drop_in(audio, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
    torch.manual_seed(1)
    same = drop_in(audio, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
    assert torch.equal(draw, same)
    assert not torch.allclose(draw, drop_in(audio).sample)


def test_save_and_load(ours: AutoencoderEarVAE, narrow_vae: EarVAE, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert (values["downsampling_ratios"], values["decoder_input_channels"]) == ([2, 4, 8], 8)
    loaded = AutoencoderEarVAE.from_pretrained(tmp_path / "model")
    assert loaded.vae.weights_sha256 == narrow_vae.weights_sha256
    assert (loaded.sampling_rate, loaded.hop_length, loaded.config.sampling_rate) == (44_100, 64, 44_100)
    # Ours reads it too.
    assert EarVAE.from_pretrained(tmp_path / "model").weights_sha256 == narrow_vae.weights_sha256


def test_auto_model_from_a_folder_with_remote_code(
    narrow_vae: EarVAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    narrow_vae.save_pretrained(tmp_path / "my-model")
    command = [
        "convert",
        str(tmp_path / "my-model"),
        str(tmp_path / "my-model/diffusers"),
        "--to",
        "diffusers",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "ear_vae", *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    names: dict[str, Any] = {}
    exec(before_and_after("diffusers.md", 1)[1].replace("my-model", str(tmp_path / "my-model")), names)
    model = names["vae"]
    assert isinstance(model, AutoencoderEarVAE)
    assert model.vae.weights_sha256 == narrow_vae.weights_sha256
    assert "auto_map" not in caplog.text  # no complaint of it


@pytest.mark.parametrize("other", [True, False])
def test_the_remote_file_refuses_another_package_of_the_name(
    other: bool, ours: AutoencoderEarVAE, tmp_path: Path
) -> None:
    """A fork that has an encoder and a decoder only, or nothing at all."""
    ours.save_pretrained(tmp_path / "model")
    fork = tmp_path / "fork" / "ear_vae"
    fork.mkdir(parents=True)
    (fork / "__init__.py").write_text("class Encoder: pass\n" if other else "raise ImportError('none')\n")
    first = [str(fork.parent), str(tmp_path / "model")]
    code = f"import sys; sys.path[:0] = {first}; import modeling_ear_vae"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert "ImportError: this model needs the package ear-vae: pip install 'ear-vae[diffusers]'" in last
    assert (f"another ear_vae lies in ['{fork}']: uninstall or move it first" in last) is other


def test_weights_of_another_network(
    ours: AutoencoderEarVAE, oobleck: Any, tmp_path: Path, narrow_vae: EarVAE
) -> None:
    folder = tmp_path / "model"
    ours.save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    for change in (
        {name: tensor for name, tensor in whole.items() if name != "vae.decoder.conv_out.weight"},
        {**whole, "vae.more": torch.zeros(1)},
        {**whole, "vae.decoder.conv_out.weight": torch.zeros(3, 8, 7)},
        {name.removeprefix("vae."): tensor for name, tensor in whole.items()},
    ):
        save_file(change, path)
        with pytest.raises(EarVAEError, match=r"the weights do not fit the config: .*(conv|more)"):
            AutoencoderEarVAE.from_pretrained(folder)
    with pytest.raises(EarVAEError, match="inconsistent values of decoder_channels"):
        AutoencoderEarVAE(encoder_hidden_size=8, decoder_channels=16)
    with pytest.raises(EarVAEError, match=r"expected a batch \[B, channels, length\], got shape \[2, 64\]"):
        ours.encode(torch.zeros(2, 64))


def test_without_diffusers_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "try:\n    import ear_vae.integrations.diffusers\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith('EarVAEError needs diffusers: pip install "ear-vae[diffusers]" (')
