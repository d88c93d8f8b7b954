"""The command `ear-vae evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ear_vae.errors import EarVAEError
from ear_vae.evaluation.baselines import System
from ear_vae.evaluation.files import Row
from ear_vae.evaluation.pairs import find_pairs, find_targets
from ear_vae.evaluation.report import Inputs, require_replaceable, shortened, table, write_csv, write_json
from ear_vae.evaluation.runner import Results, Task, run_tasks


def run(options: argparse.Namespace, load: Callable[[str], System]) -> int:
    """Evaluates, writes what is asked for and prints the table.

    Args:
        options: Of the command line: `target`, `estimate` or `model`, `pattern`, `align`, `json`, `csv`,
            `jobs`, `force`, `quiet`, `progress` and `debug`.
        load: Makes a system of the name of a model; called when all else is in order.

    Returns:
        0, or 1 if a file failed or has no partner.

    Raises:
        EarVAEError: Nothing can be evaluated, or an output cannot be written.
    """
    if bool(options.estimate) == bool(options.model):
        raise EarVAEError("give either the folder of the estimates or at least one --model that makes them")
    outputs = [Path(output) for output in (options.json, options.csv) if output]
    for output in outputs:
        require_replaceable(output, overwrite=options.force)
    tasks, missing = _paired(options) if options.estimate else _to_be_made(options, load)
    partial = outputs[0].with_name(outputs[0].name + ".partial.jsonl") if outputs else None
    if partial and options.force:
        partial.unlink(missing_ok=True)
    results = _with_progress(tasks, partial, options)
    results.failures += missing
    if options.json:
        write_json(Path(options.json), results, _inputs(options))
    if options.csv:
        write_csv(Path(options.csv), results)
    if results.rows:
        print(table(results))  # noqa: T201
    total = len(results.rows) + len(results.failures)
    if results.failures and total > 1:
        _say(f"ear-vae: {len(results.failures)} of {total} comparisons failed")
    if partial and not results.failures:
        partial.unlink(missing_ok=True)
    return 1 if results.failures else 0


def _inputs(options: argparse.Namespace) -> Inputs:
    def absolute(name: str) -> str:
        if Path(name).exists():
            return str(Path(name).resolve())
        codec, _, source = name.partition("=")
        return f"{codec}={Path(source).resolve()}" if source and Path(source).exists() else name

    return Inputs(
        target=absolute(options.target),
        estimate=absolute(options.estimate) if options.estimate else None,
        models={name: absolute(name) for name in options.model},
        variant=options.variant,
        pattern=options.pattern,
        align=options.align,
    )


def _paired(options: argparse.Namespace) -> tuple[list[Task], list[dict[str, str]]]:
    """The pairs of two folders or files, and as failures the targets that have no estimate."""
    found = find_pairs(Path(options.target), Path(options.estimate), pattern=options.pattern)
    name = Path(options.estimate).resolve().name
    if found.without_target and not options.quiet:
        _say(f"without target: {shortened([str(path) for path in found.without_target])}")
    missing = [
        {"name": target, "system": name, "error": f"has no estimate in {options.estimate}"}
        for target in found.without_estimate
    ]
    for failure in missing:
        _say(f"ear-vae: {failure['name']}: {failure['error']}")
    return [Task(pair, name, align=options.align) for pair in found.pairs], missing


def _to_be_made(
    options: argparse.Namespace, load: Callable[[str], System]
) -> tuple[list[Task], list[dict[str, str]]]:
    if len(set(options.model)) < len(options.model):
        raise EarVAEError(f"a model is given twice: {', '.join(options.model)}")
    originals = find_targets(Path(options.target)).pairs
    systems = [load(name) for name in options.model]
    return [Task(pair, system.name, system, options.align) for system in systems for pair in originals], []


def _with_progress(tasks: list[Task], partial: Path | None, options: argparse.Namespace) -> Results:
    from tqdm import tqdm

    shown = options.progress or (sys.stderr.isatty() and not options.quiet)
    with tqdm(total=len(tasks), disable=not shown, leave=False, unit="file") as bar:

        def finished(task: Task, result: Row | str) -> None:
            bar.update()
            who = f"{task.pair.name} ({task.system_name})"
            lines = [f"ear-vae: {who}: {result}"] if isinstance(result, str) else []
            if not isinstance(result, str) and result["notes"] and not options.quiet:
                lines = [f"{who}: {'; '.join(result['notes'])}"]
            for line in lines:
                bar.write(line, file=sys.stderr)

        results = run_tasks(tasks, partial=partial, jobs=options.jobs, finished=finished, debug=options.debug)
    if results.reused and not options.quiet:
        _say(f"{results.reused} comparisons were there from an earlier run (--force to redo them)")
    return results


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
