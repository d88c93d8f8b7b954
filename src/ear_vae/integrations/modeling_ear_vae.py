"""What diffusers' `AutoModel` finds beside the weights: the class of `pip install "ear-vae[diffusers]"`."""

try:
    import ear_vae as package
except ImportError:
    package = None  # type: ignore[assignment]

# A fork and copies inside of other projects bear the same name.
if not hasattr(package, "EarVAEConfig"):
    others = list(getattr(package, "__path__", []))
    raise ImportError(
        "this model needs the package ear-vae: pip install 'ear-vae[diffusers]'"
        + (f"; another ear_vae lies in {others}: uninstall or move it first" if others else "")
    )

from ear_vae.integrations.diffusers import AutoencoderEarVAE

__all__ = ["AutoencoderEarVAE"]
