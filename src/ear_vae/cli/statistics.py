"""The command `ear-vae statistics`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ear_vae.cli.terminal import is_watched, put_facts, say
from ear_vae.encoding import latent_statistics, open_latents
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import statistics_of, write_statistics
from ear_vae.vae import EarVAE

_SHOWN_DIGITS = 6


def run_statistics(options: argparse.Namespace) -> int:
    """Prints the statistics of a data set, or writes them into a model."""
    if options.into is None and options.force:
        options.refuse("--force is for --into MODEL, which is missing")
    # Before the work.
    if options.into is not None and statistics_of(options.into) is not None and not options.force:
        _require_consent(options.into)
    latents = open_latents(options.dataset)
    if options.into is not None and not options.force:
        own = EarVAE.from_pretrained(options.into).weights_sha256
        if own != latents.weights_sha256:
            raise EarVAEError(
                f"{options.into}: did not make these latents: its weights have the fingerprint {own}, theirs "
                f"{latents.weights_sha256}; give the model that made them, or accept others",
                argument="overwrite",
            )
    statistics = latent_statistics(latents)
    if options.into is not None:
        write_statistics(options.into, mean=statistics.mean.tolist(), std=statistics.std.tolist())
        seconds = statistics.count / latents.latent_rate
        say(f"{options.into}: has the statistics of {statistics.count} frames ({seconds / 3600:.2f} h)")
    if options.into is None or options.json or options.covariance:
        facts: dict[str, Any] = {
            "frames": statistics.count,
            "latents_mean": statistics.mean.tolist(),
            "latents_std": statistics.std.tolist(),
        }
        if options.covariance:
            facts["covariance"] = statistics.covariance.tolist()
        put_facts(facts if options.json else _rounded(facts), as_json=options.json)
    return 0


def _require_consent(model: str) -> None:
    """Asks whether to replace the statistics of a model.

    Raises:
        EarVAEError: Nobody is there to be asked, or the answer is no.
    """
    if not (sys.stdin.isatty() and is_watched()):
        raise EarVAEError(f"{model}: has latent statistics already; replace them (--force)")
    say(f"{model}: has latent statistics already; replace them? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise EarVAEError(f"{model}: keeps the statistics that it has")


def _rounded(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns lists of numbers as text, and lists of such lists as lines."""

    def line(values: list[float]) -> str:
        return " ".join(f"{value:.{_SHOWN_DIGITS}g}" for value in values)

    return {
        name: value
        if not isinstance(value, list)
        else [line(row) for row in value]
        if isinstance(value[0], list)
        else line(value)
        for name, value in facts.items()
    }
