"""How well audio is rebuilt: `evaluate`, metrics, distortion, robustness of latents, listening reports.

Functions on signals take `(estimate, target)` in this order. The exports are loaded on first use.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ear_vae.evaluation.evaluator": ("Progress", "evaluate"),
    "ear_vae.evaluation.listening.report": ("ListeningReport", "write_listening_report"),
    "ear_vae.evaluation.results": ("Evaluation", "Inputs"),
    "ear_vae.evaluation.systems.base": ("EarVAESystem", "System"),
    "ear_vae.evaluation.metrics": (
        "METRICS",
        "ccpc",
        "icpc",
        "loudness_distance_lu",
        "loudness_range_distance_lu",
        "measure",
        "mel_distance",
        "si_sdr_db",
        "stft_distance",
        "true_peak_distance_db",
        "why_undefined",
    ),
    "ear_vae.evaluation.torchmetrics_wrappers": (
        "Ccpc",
        "Icpc",
        "LoudnessDistance",
        "LoudnessRangeDistance",
        "MelDistance",
        "ReconstructionMetrics",
        "SiSdr",
        "StftDistance",
        "TruePeakDistance",
    ),
    "ear_vae.evaluation.thd": (
        "SWEEP_DBFS",
        "SWEEP_HZ",
        "ToneDistortion",
        "distortion_sweep",
        "residual_spectrum",
        "tone_distortion",
    ),
    "ear_vae.evaluation.robustness": ("RobustnessPoint", "latent_robustness"),
    "ear_vae.dsp.loudness": ("integrated_loudness", "loudness_range", "true_peak_dbtp"),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ear_vae.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
