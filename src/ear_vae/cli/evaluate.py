"""The command `ear-vae evaluate`."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from ear_vae.cli.models import device_of
from ear_vae.cli.systems import refuse_options_of_models
from ear_vae.cli.terminal import is_watched, put, say
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.evaluator import Progress, evaluate, partial_file
from ear_vae.evaluation.pairs import DEFAULT_PATTERN
from ear_vae.evaluation.results import Evaluation
from ear_vae.limits import counted, first_names


def run_evaluate(options: argparse.Namespace) -> int:
    """Evaluates, writes what is asked for and prints the table.

    Args:
        options: Parsed options: `target`, `estimate` or `model`, `pattern`, `align`, `json`, `csv`, `jobs`,
            `force`, `quiet`, `progress` and `debug`; and `refuse`, which ends with a usage error.

    Returns:
        0, or 1 if a file failed or has no partner.

    Raises:
        EarVAEError: Nothing can be evaluated, or an output cannot be written.
    """
    if bool(options.estimate) == bool(options.model):
        both = ", not both" if options.model else ""
        raise EarVAEError(
            f"give either the folder of the estimates or at least one --model that makes them{both}"
        )
    refuse_options_of_models(options)
    _refuse_idle_options(options)
    partial = partial_file(options.json or None, options.csv or None)
    go_on = f"finished comparisons are kept in {partial}, from which the same command goes on"
    try:
        evaluation = _with_progress(options)
    except KeyboardInterrupt:
        if partial and partial.exists():
            say(go_on)
        raise
    if evaluation.without_target and not options.quiet:
        say(f"without target: {first_names([str(path) for path in evaluation.without_target])}")
    if evaluation.reused and not options.quiet:
        were, them = ("was", "it") if evaluation.reused == 1 else ("were", "them")
        there = f"{counted(evaluation.reused, 'comparison')} {were} there"
        say(f"{there} from an earlier run (--force to make {them} again)")
    if evaluation.rows:
        put(evaluation.table())
    failed, total = len(evaluation.failures), len(evaluation.rows) + len(evaluation.failures)
    if failed and total > 1:
        say(f"ear-vae: {failed} of {total} comparisons failed")
    if failed and partial and not options.quiet:
        say(go_on)
    return 1 if failed else 0


def _refuse_idle_options(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option would do nothing."""
    if options.model and options.jobs is not None:
        options.refuse("--jobs is for a folder of estimates; with --model files are done one after the other")
    if options.model and options.pattern is not None:
        options.refuse("--pattern is for a folder of estimates, not for --model")
    if options.pattern is not None and Path(options.target).is_file():
        options.refuse("--pattern is for folders")
    if options.force and not options.json and not options.csv:
        options.refuse("--force is for --json and --csv")


def _with_progress(options: argparse.Namespace) -> Evaluation:
    """Evaluates, with a progress bar on a terminal and a line for each failure and note."""
    shown = options.progress or (is_watched() and not options.quiet)
    bar: tqdm[NoReturn] | None = None
    with ExitStack() as stack:

        def ended(state: Progress) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(
                    tqdm(total=state.total, disable=not shown, leave=False, unit="file")
                )
            line = ""
            if state.error is not None:
                line = f"ear-vae: {state.name} ({state.system}): {state.error}"
            elif state.row and state.row["notes"] and not options.quiet:
                line = f"{state.name} ({state.system}): {'; '.join(state.row['notes'])}"
            bar.update(state.done - bar.n)
            bar.clear()
            if line:
                say(line)
            bar.refresh()

        return evaluate(
            options.target,
            options.estimate or None,
            models=options.model,
            pattern=options.pattern or DEFAULT_PATTERN,
            align=options.align,
            variant=options.variant,
            device=device_of(options.device or "cpu"),
            force_download=options.force_download,
            jobs=options.jobs,
            json=options.json or None,
            csv=options.csv or None,
            overwrite=options.force,
            progress=ended,
            raise_failures=options.debug,
        )
