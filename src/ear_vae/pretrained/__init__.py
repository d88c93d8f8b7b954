"""From a name to config and weights, and back: folders, the Hub, the official layout, bundled checkpoints.

This package handles configs, state dicts and folders; `EarVAE.from_pretrained` makes models of them.
"""

from ear_vae.pretrained.bundled import bundled_checkpoints
from ear_vae.pretrained.card import Figures, ModelCardFacts
from ear_vae.pretrained.conversion import convert

__all__ = ["Figures", "ModelCardFacts", "bundled_checkpoints", "convert"]
