"""Data sets of latents: encoding them, their statistics, and reading them."""

from ear_vae.encoding.dataset import LatentDataset
from ear_vae.encoding.encode import EncodedDataset, EncodingProgress, encode_dataset
from ear_vae.encoding.reading import LatentFolder, LatentItem, open_latents
from ear_vae.encoding.statistics import LatentStatistics, latent_statistics

__all__ = [
    "EncodedDataset",
    "EncodingProgress",
    "LatentDataset",
    "LatentFolder",
    "LatentItem",
    "LatentStatistics",
    "encode_dataset",
    "latent_statistics",
    "open_latents",
]
