"""The listening report: one HTML file that needs no server, no network and nothing beside it.

Names of files and systems reach the page as JSON in a block that is not executed, and its script shows them
as text only. A content security policy lets nothing run but that script, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

from ear_vae import __version__
from ear_vae._atomic import atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.listening.excerpts import Excerpt
from ear_vae.evaluation.metrics import METRICS
from ear_vae.evaluation.results import HIGHER_IS_BETTER
from ear_vae.limits import counted

_SCRIPTS = ("player.js", "pictures.js", "abx.js", "report.js")
_FULL_SCALE = 2**15
# All that is not audio.
_PAGE_BYTES = 200_000
_SHORTEST_SECONDS = 1.0


@dataclass(frozen=True)
class _Shown:
    """How a metric is shown.

    Attributes:
        label: Name of the metric.
        unit: Unit of the figures shown.
        decimals: Decimals of the figures shown.
        about: Explanation, shown below the name.
        difference: Smallest difference, in the unit shown, by which a system is called better.
            docs/evaluation.md says where each comes from.
        factor: Factor from the metric to the figure shown.
    """

    label: str
    unit: str
    decimals: int
    about: str
    difference: float
    factor: float = 1.0


_SHOWN = {
    "si_sdr_db": _Shown("SI-SDR", "dB", 2, "the waveform, whatever its level", 0.3),
    "mel_distance": _Shown("Mel distance", "", 3, "magnitudes in 64 mel bands, A-weighted", 0.02),
    "stft_distance": _Shown("STFT distance", "", 3, "magnitudes in all frequency bins, A-weighted", 0.02),
    "icpc": _Shown("ICPC", "%", 2, "how well the phase of each channel agrees with the original's", 0.3, 100),
    "ccpc": _Shown(
        "CCPC", "%", 2, "how well the phase between left and right agrees with the original's", 0.7, 100
    ),
    "true_peak_distance_db": _Shown("True peak distance", "dB", 2, "how far the highest peaks differ", 0.2),
    "loudness_distance_lu": _Shown("Loudness distance", "LU", 2, "how far the loudness differs", 0.1),
    "loudness_range_distance_lu": _Shown(
        "Loudness range distance", "LU", 2, "how far the range from soft to loud differs", 1.0
    ),
}


@dataclass(frozen=True)
class Means:
    """A table over many files.

    Attributes:
        caption: Caption of the table, which says what the means are over.
        systems: Metrics by system; None where there is no value.
    """

    caption: str
    systems: Mapping[str, Mapping[str, float | None]]


def means_of(excerpts: Sequence[Excerpt]) -> Means:
    """Computes the mean of every metric over the excerpts that have a value."""
    systems: dict[str, dict[str, float | None]] = {}
    for index, signal in enumerate(excerpts[0].signals[1:], start=1):
        systems[signal.name] = {}
        for metric in METRICS:
            found = [excerpt.signals[index].figures[metric] for excerpt in excerpts]
            values = [value for value in found if value is not None]
            systems[signal.name][metric] = statistics.fmean(values) if values else None
    several = len(excerpts) > 1
    return Means(
        f"Means over the {len(excerpts)} excerpts below" if several else "Figures of the excerpt below",
        systems,
    )


def fitting(excerpts: Sequence[Excerpt], megabytes: float) -> list[Excerpt]:
    """Cuts all excerpts to one shorter length if the page would exceed a size.

    Args:
        excerpts: Excerpts as `ear_vae.evaluation.listening.excerpts.cut` returns them.
        megabytes: Largest size of the page in 10⁶ bytes.

    Raises:
        EarVAEError: Even one second of each excerpt is too much.
    """
    budget = 1e6 * megabytes - _PAGE_BYTES
    seconds = max(excerpt.seconds for excerpt in excerpts)
    fitted = list(excerpts)
    while (size := _audio_bytes(fitted)) > budget:
        if seconds <= _SHORTEST_SECONDS:
            raise EarVAEError(
                f"a page of {megabytes:g} MB cannot hold {counted(len(excerpts), 'excerpt')} with "
                f"{len(excerpts[0].signals)} signals each; ask for fewer excerpts or for more megabytes"
            )
        # A little less than would be enough if all seconds were alike.
        seconds = max(_SHORTEST_SECONDS, int(10 * seconds * min(0.97, 0.98 * budget / size)) / 10)
        fitted = [excerpt.shortened(seconds) for excerpt in excerpts]
    return fitted


def write_page(
    path: Path,
    excerpts: Sequence[Excerpt],
    *,
    title: str,
    means: Means | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the page, complete or not at all.

    Args:
        path: HTML file to write.
        excerpts: Excerpts as `ear_vae.evaluation.listening.excerpts.measured` returns them, all with the same
            systems.
        title: Title of the page.
        means: Table at the top of the page; by default the means over the excerpts.
        overwrite: Replace an existing file.

    Raises:
        EarVAEError: The path exists and is not to be overwritten, or cannot be written.
    """
    page = page_text(excerpts, title=title, means=means or means_of(excerpts))
    with atomic_path(path, overwrite) as temporary:
        # Names of files need not be UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def page_text(excerpts: Sequence[Excerpt], *, title: str, means: Means) -> str:
    """Makes the whole HTML document; equal for equal arguments."""
    folder = resources.files("ear_vae.evaluation.listening") / "assets"
    style = _file(folder, "style.css")
    parts = "\n".join(_file(folder, name) for name in _SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}}})();\n'
    data = {
        "version": __version__,
        "title": title,
        "systems": [signal.name for signal in excerpts[0].signals],
        "means": {"caption": means.caption, "rows": _table(list(means.systems.values()))},
        "excerpts": [_excerpt(excerpt) for excerpt in excerpts],
    }
    audio = "\n".join(
        f'<script type="text/plain" id="audio-{row}-{column}">{text}</script>'
        for row, excerpt in enumerate(excerpts)
        for column, text in enumerate(_base64(excerpt))
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{_sha256(script)}'; style-src 'sha256-{_sha256(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {
        "policy": html.escape(policy),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": _json(data),
        "audio": audio,
    }
    # In one pass, so that a name that looks like a placeholder stays a name.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _file(folder, "template.html"))


def _excerpt(excerpt: Excerpt) -> dict[str, Any]:
    peaks = [_peak(signal.audio) for signal in excerpt.signals]
    matched = [10 ** (signal.gain_db / 20) for signal in excerpt.signals]
    # One attenuation for all, so that none clips and their levels stay matched.
    headroom = [
        1 / max(1.0, *(peak * gain for peak, gain in zip(peaks, gains, strict=True)))
        for gains in (matched, [1.0] * len(peaks))
    ]
    signals = [
        {
            "gainDb": signal.gain_db,
            # What was taken off the file to fit into 16 bits is put on again.
            "matched": max(1.0, peak) * gain * headroom[0],
            "plain": max(1.0, peak) * headroom[1],
            "correlation": signal.correlation,
            "sideDb": signal.side_db,
            "notes": list(signal.notes),
        }
        for signal, peak, gain in zip(excerpt.signals, peaks, matched, strict=True)
    ]
    return {
        "name": excerpt.span.name,
        "start": excerpt.span.start_seconds,
        "seconds": excerpt.seconds,
        "rate": excerpt.sample_rate,
        "headroom": headroom[0],
        "signals": signals,
        "rows": _table([signal.figures for signal in excerpt.signals[1:]]),
    }


def _table(systems: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """Makes a row for each metric, with a cell for each system and the best ones marked.

    A system that is not noticeably behind the best one counts as best too; where all are, none is marked.
    """
    rows = []
    for metric in METRICS:
        shown = _SHOWN[metric]
        higher = metric in HIGHER_IS_BETTER
        values = [figures.get(metric) for figures in systems]
        valued = [value * shown.factor for value in values if value is not None]
        leader = (max if higher else min)(valued, default=0.0)
        best = [
            value is not None and abs(value * shown.factor - leader) < shown.difference for value in values
        ]
        decided = sum(best) < len(valued)
        rows.append(
            {
                "metric": metric,
                "label": shown.label,
                "unit": shown.unit,
                "about": shown.about,
                "higher": higher,
                "cells": [
                    {"text": _figure(value, shown), "best": is_best and decided}
                    for value, is_best in zip(values, best, strict=True)
                ],
            }
        )
    return rows


def _figure(value: float | None, shown: _Shown) -> str:
    if value is None:
        return "–"
    # Rounding may leave a negative zero.
    return f"{round(value * shown.factor, shown.decimals) + 0.0:.{shown.decimals}f}".replace("-", "−")


def _peak(audio: Tensor) -> float:
    return float(audio.abs().max())


def _flac(audio: Tensor, sample_rate: int) -> bytes:
    """Encodes audio [C, T] as 16-bit FLAC, lowered to full scale if it exceeds it.

    Every browser decodes it sample by sample, without a delay.
    """
    samples = (audio / max(1.0, _peak(audio)) * _FULL_SCALE).round().clamp(-_FULL_SCALE, _FULL_SCALE - 1)
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", sample_rate, audio.shape[0], subtype="PCM_16", format="FLAC"
    ) as file:
        file.write(samples.short().T.contiguous().numpy())
    return buffer.getvalue()


def _base64(excerpt: Excerpt) -> list[str]:
    """Returns the file of each signal as text."""
    files = (_flac(signal.audio, excerpt.sample_rate) for signal in excerpt.signals)
    return [base64.b64encode(file).decode("ascii") for file in files]


def _audio_bytes(excerpts: Sequence[Excerpt]) -> int:
    return sum(len(text) for excerpt in excerpts for text in _base64(excerpt))


def _json(data: Any) -> str:
    """Writes JSON that cannot end the block it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _file(folder: Any, name: str) -> str:
    return str((folder / name).read_text(encoding="utf-8"))
