"""The command `ear-vae evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ear_vae._atomic import same_file
from ear_vae.cli.systems import load_from_options, refuse_options_of_models
from ear_vae.cli.terminal import is_watched, put, say
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import Row
from ear_vae.evaluation.pairs import DEFAULT_PATTERN, Pairs, find_pairs, find_targets
from ear_vae.evaluation.results import Inputs, require_replaceable, shortened, table, write_csv, write_json
from ear_vae.evaluation.runner import Results, Task, run_tasks


def run(options: argparse.Namespace) -> int:
    """Evaluates, writes what is asked for and prints the table.

    Args:
        options: Of the command line: `target`, `estimate` or `model`, `pattern`, `align`, `json`, `csv`,
            `jobs`, `force`, `quiet`, `progress` and `debug`; and `refuse`, which ends with a usage error.

    Returns:
        0, or 1 if a file failed or has no partner.

    Raises:
        EarVAEError: Nothing can be evaluated, or an output cannot be written.
    """
    if bool(options.estimate) == bool(options.model):
        raise EarVAEError("give either the folder of the estimates or at least one --model that makes them")
    refuse_options_of_models(options)
    _refuse_idle_options(options)
    outputs = [Path(output) for output in (options.json, options.csv) if output]
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise EarVAEError(f"{outputs[0]}: --json and --csv would write the same file; name two")
    for output in outputs:
        require_replaceable(output, overwrite=options.force)
    tasks, missing = _paired(options) if options.estimate else _to_be_made(options)
    for output in outputs:
        if any(same_file(output, file) for task in tasks for file in _files_of(task) if output.exists()):
            raise EarVAEError(f"{output}: is a file to be measured; choose another name for the output")
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
        put(table(results))
    total = len(results.rows) + len(results.failures)
    if results.failures and total > 1:
        say(f"ear-vae: {len(results.failures)} of {total} comparisons failed")
    if partial and not results.failures:
        partial.unlink(missing_ok=True)
    return 1 if results.failures else 0


def _refuse_idle_options(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option would do nothing."""
    if options.model and options.jobs is not None:
        options.refuse("--jobs is for files that are there; with --model one is done after the other")
    if options.model and options.pattern is not None:
        options.refuse("--pattern is for a folder of estimates, not for --model")
    if options.pattern is not None and Path(options.target).is_file():
        options.refuse("--pattern is for folders")
    if options.force and not options.json and not options.csv:
        options.refuse("--force is for --json and --csv")


def _files_of(task: Task) -> list[Path]:
    return [task.pair.target, *([task.pair.estimate] if task.pair.estimate else [])]


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
        pattern=options.pattern or DEFAULT_PATTERN,
        align=options.align,
    )


def _paired(options: argparse.Namespace) -> tuple[list[Task], list[dict[str, str]]]:
    """The pairs of two folders or files, and as failures the targets that have no estimate."""
    found = find_pairs(
        Path(options.target), Path(options.estimate), pattern=options.pattern or DEFAULT_PATTERN
    )
    name = Path(options.estimate).resolve().name
    if found.without_target and not options.quiet:
        say(f"without target: {shortened([str(path) for path in found.without_target])}")
    missing = _failures(found, name, options)
    return [Task(pair, name, align=options.align) for pair in found.pairs], missing


def _to_be_made(options: argparse.Namespace) -> tuple[list[Task], list[dict[str, str]]]:
    if len(set(options.model)) < len(options.model):
        raise EarVAEError(f"a model is given twice: {', '.join(options.model)}")
    found = find_targets(Path(options.target))
    systems = [load_from_options(name, options.variant, options) for name in options.model]
    tasks = [Task(pair, system.name, system, options.align) for system in systems for pair in found.pairs]
    return tasks, [failure for system in systems for failure in _failures(found, system.name, options)]


def _failures(found: Pairs, system: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """What is known to fail before any work: originals without an estimate, and what could not be seen."""
    failures = [
        {"name": target, "system": system, "error": f"has no estimate in {options.estimate}"}
        for target in found.without_estimate
    ]
    for problem in found.unreadable:
        path, _, reason = problem.rpartition(": ")
        failures.append({"name": path, "system": system, "error": reason})
    for failure in failures:
        say(f"ear-vae: {failure['name']}: {failure['error']}")
    return failures


def _with_progress(tasks: list[Task], partial: Path | None, options: argparse.Namespace) -> Results:
    shown = options.progress or (is_watched() and not options.quiet)
    with tqdm(total=len(tasks), disable=not shown, leave=False, unit="file") as bar:

        def finished(task: Task, result: Row | str) -> None:
            bar.update()
            who = f"{task.pair.name} ({task.system_name})"
            lines = [f"ear-vae: {who}: {result}"] if isinstance(result, str) else []
            if not isinstance(result, str) and result["notes"] and not options.quiet:
                lines = [f"{who}: {'; '.join(result['notes'])}"]
            bar.clear()
            for line in lines:
                say(line)
            bar.refresh()

        results = run_tasks(tasks, partial=partial, jobs=options.jobs, finished=finished, debug=options.debug)
    if results.reused and not options.quiet:
        say(f"{results.reused} comparisons were there from an earlier run (--force to redo them)")
    return results
