"""Audio files, and latents of them, as training and validation data."""

from ear_vae.training.data.latents import LatentDataModule
from ear_vae.training.data.module import AudioDataModule

__all__ = ["AudioDataModule", "LatentDataModule"]
