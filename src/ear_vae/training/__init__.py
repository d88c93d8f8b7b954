"""Training with Lightning: the module, its settings and the data. The only package that imports lightning."""

from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training.callbacks import StepProgressBar
from ear_vae.training.data import AudioDataModule, LatentDataModule
from ear_vae.training.module import EarVAEModule, ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

__all__ = [
    "AudioDataModule",
    "DiscriminatorConfig",
    "EarVAEModule",
    "LatentDataModule",
    "ObjectiveConfig",
    "OptimizerConfig",
    "StepProgressBar",
]
