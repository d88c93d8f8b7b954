"""The terms of the training objective and their weighted sum. Every term takes (estimate, target)."""

from ear_vae.losses.objective import ReconstructionObjective

__all__ = ["ReconstructionObjective"]
