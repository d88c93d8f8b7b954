"""Data sets of latents: their statistics, and reading them."""

from ear_vae.encoding.dataset import LatentDataset
from ear_vae.encoding.reading import LatentFolder, LatentItem, open_latents
from ear_vae.encoding.statistics import LatentStatistics, latent_statistics

__all__ = [
    "LatentDataset",
    "LatentFolder",
    "LatentItem",
    "LatentStatistics",
    "latent_statistics",
    "open_latents",
]
