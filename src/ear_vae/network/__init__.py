"""The plain modules of the network: no weight norm, no files, no configuration beyond widths and strides."""

from ear_vae.network.autoencoder import ARCHITECTURES, Autoencoder
from ear_vae.network.decoder import Decoder
from ear_vae.network.encoder import Encoder
from ear_vae.network.transformer import LatentTransformer

__all__ = ["ARCHITECTURES", "Autoencoder", "Decoder", "Encoder", "LatentTransformer"]
