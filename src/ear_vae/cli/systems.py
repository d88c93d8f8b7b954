"""Options about the models that `evaluate` and `report` run."""

from __future__ import annotations

import argparse

from ear_vae.cli.models import require_downloadable
from ear_vae.evaluation.systems.codecs import is_codec


def refuse_options_of_models(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option is for models and there are none."""
    names = [name for name in options.model if not is_codec(name)]
    for option, models in (("device", options.model), ("variant", names), ("force_download", names)):
        if getattr(options, option) and not models:
            of = " of εar-VAE" if options.model else ""
            options.refuse(f"--{option.replace('_', '-')} is for a --model{of}")
    if names:
        require_downloadable(names, options)
