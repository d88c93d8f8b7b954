"""Training with Lightning: module, data, command line. The only package that imports lightning."""

from ear_vae.training.data import AudioDataModule
from ear_vae.training.module import EarVAEModule

__all__ = ["AudioDataModule", "EarVAEModule"]
