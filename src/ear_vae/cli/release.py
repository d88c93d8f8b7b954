"""The command `ear-vae release`."""

from __future__ import annotations

import argparse
import shlex

from ear_vae.cli.terminal import say
from ear_vae.training.release import release_model


def run_release(options: argparse.Namespace) -> int:
    """Turns a training checkpoint into a folder for users."""
    release_model(
        options.checkpoint,
        options.destination,
        name=options.name_of_model,
        averaged=not options.raw,
        training_state=options.training_state,
        overwrite=options.force,
    )
    what = "a model and its training state" if options.training_state else "a model"
    say(f"{options.destination}: {what}; use it with --model {shlex.quote(options.destination)}")
    return 0
