"""The command `ear-vae release`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ear_vae.cli.terminal import say
from ear_vae.evaluation.results import Evaluation, read_evaluation
from ear_vae.pretrained import ModelCardFacts
from ear_vae.training.release import release_model


def run_release(options: argparse.Namespace) -> int:
    """Turns a training checkpoint into a folder for users."""
    figures = []
    if options.evaluation:
        rows, inputs = read_evaluation(Path(options.evaluation))
        figures.append(Evaluation(rows, [], inputs).figures())
    release_model(
        options.checkpoint,
        options.destination,
        name=options.name_of_model,
        averaged=not options.raw,
        training_state=options.training_state,
        overwrite=options.force,
        card=ModelCardFacts(
            license=options.license,
            datasets=options.dataset,
            data=options.data,
            base_model=options.base_model,
            figures=figures,
        ),
    )
    what = "a model and its training state" if options.training_state else "a model"
    say(f"{options.destination}: {what}; use it with --model {shlex.quote(options.destination)}")
    return 0
