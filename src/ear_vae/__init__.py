"""εar-VAE: a variational autoencoder for stereo music.

Letters used in every shape of the package: B batch, C audio channels, T samples, D latent channels,
N latent frames, F frequency bins. `sample_rate` is in Hz, `latent_rate` in frames per second, and
`downsampling_ratio` in samples per latent frame. Everything that compares two signals takes
`(estimate, target)` in this order.

The exports are loaded on first use, so that `import ear_vae` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ear_vae.errors import EarVAEError

if TYPE_CHECKING:
    from ear_vae.config import EarVAEConfig
    from ear_vae.posterior import Posterior
    from ear_vae.vae import EarVAE

__version__ = "0.1.0"

__all__ = ["EarVAE", "EarVAEConfig", "EarVAEError", "Posterior", "__version__"]

_EXPORTS = {"EarVAE": "ear_vae.vae", "EarVAEConfig": "ear_vae.config", "Posterior": "ear_vae.posterior"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ear_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
