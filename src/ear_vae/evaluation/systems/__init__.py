"""Systems that rebuild audio: our models, and other codecs to compare with."""

from ear_vae.evaluation.systems.base import EarVAESystem, System, rebuild

__all__ = ["EarVAESystem", "System", "rebuild"]
