"""A ComfyUI node that loads εar-VAE.

Copy this file into ComfyUI's folder `custom_nodes`, and `pip install ear-vae` into its environment. Connect
its output to VAE Encode Audio and VAE Decode Audio.
"""

from __future__ import annotations

from typing import Any

try:
    import ear_vae
except ImportError:
    ear_vae = None  # type: ignore[assignment]

# A fork and copies inside of other custom nodes bear the same name.
if not hasattr(ear_vae, "EarVAEConfig"):
    others = list(getattr(ear_vae, "__path__", []))
    raise ImportError(
        "this node needs the package ear-vae: pip install ear-vae"
        + (f"; another ear_vae lies in {others}: uninstall or move it first" if others else "")
    )

from ear_vae import EarVAE
from ear_vae.integrations.comfyui import ComfyVAE


class EarVAELoader:
    """Loads a model by the name that `EarVAE.from_pretrained` takes."""

    CATEGORY = "loaders/audio"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        return {
            "required": {
                "model": ("STRING", {"default": "ear-vae-tiny"}),
                "device": (["auto", "cpu", "cuda", "mps"],),
            },
            "optional": {"variant": ("STRING", {"default": ""})},
        }

    def load(self, model: str, device: str = "auto", variant: str = "") -> tuple[ComfyVAE]:
        """Loads the model; on a GPU where there is one, unless told otherwise."""
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        return (ComfyVAE(EarVAE.from_pretrained(model, variant=variant or None, device=device)),)


NODE_CLASS_MAPPINGS = {"EarVAELoader": EarVAELoader}
NODE_DISPLAY_NAME_MAPPINGS = {"EarVAELoader": "Load εar-VAE"}
