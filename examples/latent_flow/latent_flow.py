"""Train a small flow-matching transformer on latents of some songs, and write what it makes up as audio.

    ear-vae convert ear-vae-tiny model              # a copy, for the statistics
    ear-vae encode-dataset MUSIC latents --model model
    ear-vae statistics latents --into model
    python examples/latent_flow/latent_flow.py latents --model model --out samples

Minutes on a CPU. README.md beside this file says what a real project does otherwise.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from ear_vae import EarVAE
from ear_vae.audio import write_audio
from ear_vae.training import LatentDataModule

FRAMES = 256


class VelocityTransformer(nn.Module):
    """Predicts, for latents on their way from noise to music, in which direction they go on.

    What is best for music without any structure is known; the transformer learns the rest, and has inputs and
    outputs of variance 1 at all times.

    Args:
        latent_dim: Channels D of the latents.
        num_frames: Number of frames N of a window.
        width: Width of the transformer.
        depth: Number of its layers.

    Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
    2206.00364, section 5, for the scales.
    """

    def __init__(self, latent_dim: int, num_frames: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.into = nn.Linear(latent_dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(num_frames, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, 2 * latent_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-1, 1, width // 2), persistent=False)

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        """Returns the velocity [B, D, N] of latents [B, D, N] at times [B], from 0 (noise) to 1 (music)."""
        angles = time[:, None] * self.frequencies
        gain, shift = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))[:, None].chunk(2, dim=-1)
        position = time[:, None, None]
        variance = (1 - position) ** 2 + position**2
        scaled = latents * variance.rsqrt()
        x = self.into(scaled.transpose(1, 2)) * (1 + gain) + shift + self.positions
        # The layers give outputs of one size; a factor lets them follow loud and quiet frames.
        factor, offset = self.out(self.layers(x)).transpose(1, 2).chunk(2, dim=1)
        return (2 * position - 1) / variance * latents + (factor * scaled + offset) * variance.rsqrt()


class LatentFlow(L.LightningModule):
    """Flow matching on straight lines from noise to normalized latents.

    Args:
        network: Velocity of latents [B, D, N] at times [B].
        normalize: Makes latents of a batch normal, `EarVAE.normalize`.
        learning_rate: Highest learning rate.

    Reference: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; for the times, Esser
    et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
    """

    def __init__(
        self, network: nn.Module, normalize: Callable[[Tensor], Tensor], learning_rate: float = 1e-3
    ) -> None:
        super().__init__()
        self.network, self.normalize, self.learning_rate = network, normalize, learning_rate

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Mean square error of the velocity, where the batch has music."""
        music = self.normalize(batch["latents"])
        noise = torch.randn(music.shape, generator=generator, device=music.device)
        # Most often near the middle, where most is to be learnt; spread evenly over a batch.
        shares = torch.rand(len(music), generator=generator, device=music.device)
        shares = (torch.arange(len(music), device=music.device) + shares) / len(music)
        time = torch.special.ndtri(shares.clamp(1e-6, 1 - 1e-6)).sigmoid()
        position = time[:, None, None]
        velocity = self.network((1 - position) * noise + position * music, time)
        error = (velocity - (music - noise)).square().mean(dim=1)
        mask = batch["padding_mask"]
        return (error * mask).sum() / mask.sum()

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Computes the loss of a step; called by the Trainer."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Logs the loss on a song that is not trained on; called by the Trainer."""
        # At many times, and with the same noise in each epoch, so that figures compare.
        repeated = {name: batch[name].repeat_interleave(16, dim=0) for name in ("latents", "padding_mask")}
        generator = torch.Generator(self.device).manual_seed(index)
        self.log("validation/loss", self.loss(repeated, generator), prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Returns AdamW, and a learning rate that rises and falls once; called by the Trainer."""
        optimizer = torch.optim.AdamW(self.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int = 25) -> Tensor:
        """Carries noise [B, D, N] along the flow, with Heun's method, to normalized latents [B, D, N]."""
        latents = noise
        for step in range(steps):
            now, then = (torch.full((len(noise),), (step + n) / steps, device=noise.device) for n in (0, 1))
            velocity = self.network(latents, now)
            ahead = self.network(latents + velocity / steps, then)
            latents = latents + (velocity + ahead) / (2 * steps)
        return latents


def train(
    latents: Path, vae: EarVAE, validation: Path | None, steps: int, out: Path, precision: str = "32-true"
) -> LatentFlow:
    """Trains a flow on a data set of latents of a model.

    Args:
        latents: The output of `ear-vae encode-dataset`.
        vae: The model that made them, with their statistics.
        validation: A folder of other songs, or None.
        steps: Number of steps.
        out: Folder for checkpoints.
        precision: Lightning's; `bf16-mixed` is faster where the processor knows bfloat16.
    """
    data = LatentDataModule(
        latents,
        vae,
        validation,
        crop_frames=FRAMES,
        batch_size=16,
        # Validation comes at the end of an epoch.
        crops_per_epoch=16 * min(steps, 100),
        num_workers=1,
    )
    flow = LatentFlow(VelocityTransformer(vae.latent_dim, FRAMES), vae.normalize)
    trainer = L.Trainer(
        max_steps=steps,
        precision=precision,
        gradient_clip_val=1.0,
        callbacks=[EMAWeightAveraging(decay=0.98)],
        default_root_dir=out,
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(flow, data)
    return flow.eval()


def main() -> None:
    """Trains, samples, decodes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("latents", type=Path, help="the output of ear-vae encode-dataset")
    parser.add_argument("--model", default="model", help="the model that made them (%(default)s)")
    parser.add_argument("--validation", type=Path, help="a folder of other songs")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="steps to train (%(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="number of samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed (%(default)s)")
    options = parser.parse_args()

    L.seed_everything(options.seed)
    vae = EarVAE.from_pretrained(options.model)
    flow = train(options.latents, vae, options.validation, options.steps, options.out, options.precision)
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(options.samples, vae.latent_dim, FRAMES, generator=generator)
    audio = vae.decode(vae.denormalize(flow.sample(noise)))
    options.out.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(audio):
        write_audio(options.out / f"{number}.wav", one, vae.sample_rate, overwrite=True)
    print(f"{len(audio)} samples of {FRAMES / vae.latent_rate:.2f} s in {options.out}")


if __name__ == "__main__":
    main()
