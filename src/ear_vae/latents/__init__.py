"""Latent files: what the encoder returned, with all it takes to decode it."""

from ear_vae.latents.file import Latents, is_latent_file, load_latents, save_latents
from ear_vae.latents.raw import is_raw, load_raw_latents

__all__ = ["Latents", "is_latent_file", "is_raw", "load_latents", "load_raw_latents", "save_latents"]
