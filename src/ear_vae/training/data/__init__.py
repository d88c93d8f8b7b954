"""Audio files as training and validation data."""

from ear_vae.training.data.module import AudioDataModule

__all__ = ["AudioDataModule"]
