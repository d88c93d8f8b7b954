"""Evaluation of files, folders and models, as a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ear_vae._atomic import same_file
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import Row
from ear_vae.evaluation.pairs import DEFAULT_PATTERN, Pairs, find_pairs, find_targets
from ear_vae.evaluation.results import Evaluation, Inputs, require_replaceable, require_same_comparisons
from ear_vae.evaluation.runner import Task, run_tasks
from ear_vae.evaluation.systems.loading import Model, as_system


@dataclass(frozen=True)
class Progress:
    """Progress of an evaluation, with the comparison that has just ended.

    Attributes:
        done: Number of comparisons that have ended.
        total: Number of comparisons to make.
        name: Name of the file that was compared; empty before the first one.
        system: Name of its system; empty before the first one.
        row: Figures of the comparison; None where it failed.
        error: Reason of its failure; None where it did not fail.
    """

    done: int
    total: int
    name: str = ""
    system: str = ""
    row: Row | None = None
    error: str | None = None


def evaluate(
    targets: str | os.PathLike[str],
    estimates: str | os.PathLike[str] | None = None,
    *,
    models: Sequence[Model] = (),
    pattern: str = DEFAULT_PATTERN,
    align: bool = False,
    variant: str | None = None,
    device: str | torch.device | None = None,
    force_download: bool = False,
    jobs: int | None = None,
    json: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda state: None,
    raise_failures: bool = False,
) -> Evaluation:
    """Measures rebuilt audio against its originals, or models that rebuild the originals first.

    With `json` or `csv`, finished comparisons are kept in a file beside the output (`out.json.partial.jsonl`)
    until all have succeeded: the same call after an interruption continues from there. A comparison that
    fails is part of the result and does not stop the rest.

    Args:
        targets: Folder of originals, searched with its subfolders, or one file.
        estimates: Folder of rebuilt audio, or one file; None where `models` make it.
        models: Models that rebuild the originals: each a folder, bundled name, Hub repository or codec
            (`dac`, `encodec`, `sao`, `agc`), an `EarVAE`, or a `System`.
        pattern: Name of the rebuilt file inside its folder, without extension, with `{name}` for that of the
            original.
        align: Take out a delay of up to 100 ms; otherwise it is only measured.
        variant: Variant of the models that are loaded by name, where their repository holds several.
        device: Device for the models that are loaded by name; the CPU by default.
        force_download: Fetch the models that are loaded by name from the Hub again.
        jobs: Number of processes that compare files; by default one for each processor, and fewer for few
            files. Where it may be more than 1, a script needs an `if __name__ == "__main__":`.
        json: File to write everything to, as `Evaluation.write_json`.
        csv: File to write a line for each file to, as `Evaluation.write_csv`.
        overwrite: Replace any file at `json` and `csv`, and make comparisons of an interrupted run again;
            otherwise only an earlier evaluation that held nothing else is replaced.
        progress: Function that is called before the first comparison and after each of them.
        raise_failures: Raise the first failure instead of recording it and continuing.

    Returns:
        Figures, failures and summaries.

    Raises:
        EarVAEError: Nothing can be compared, a model cannot be loaded, or an output cannot be written.
    """
    if (estimates is not None) == bool(models):
        raise EarVAEError("give either the rebuilt audio or at least one model that makes it")
    outputs = [Path(output) for output in (json, csv) if output is not None]
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise EarVAEError(f"{outputs[0]}: JSON and CSV would write the same file; name two")
    for output in outputs:
        require_replaceable(output, overwrite=overwrite)
    targets = Path(targets)
    without_target: tuple[Path, ...] = ()
    if estimates is not None:
        found = find_pairs(targets, Path(estimates), pattern=pattern)
        without_target = found.without_target
        name = Path(estimates).resolve().name
        tasks = [Task(pair, name, align=align) for pair in found.pairs]
        failures = _known_failures(found, name, f"has no estimate in {os.fspath(estimates)}")
        sources = {}
    else:
        found = find_targets(targets)
        systems = [
            as_system(model, device=device, variant=variant, force_download=force_download)
            for model in _distinct(models)
        ]
        names = [system.name for system in systems]
        if len(set(names)) < len(names):
            raise EarVAEError(f"two models have the same name: {', '.join(names)}")
        tasks = [Task(pair, system.name, system, align) for system in systems for pair in found.pairs]
        failures = [failure for name in names for failure in _known_failures(found, name, "")]
        sources = {name: _absolute(name) for name in names}
    for output in outputs:
        if output.exists() and any(same_file(output, file) for task in tasks for file in _files_of(task)):
            raise EarVAEError(f"{output}: is a file to be measured; choose another name for the output")
        if not overwrite:
            require_same_comparisons(
                output,
                [
                    *((task.pair.name, task.system_name) for task in tasks),
                    *((failure["name"], failure["system"]) for failure in failures),
                ],
            )
    partial = partial_file(json, csv)
    if partial and overwrite:
        partial.unlink(missing_ok=True)
    report = _Counter(progress, len(tasks) + len(failures))
    for failure in failures:
        report.ended(failure["name"], failure["system"], failure["error"])
    results = run_tasks(
        tasks,
        partial=partial,
        jobs=jobs,
        finished=lambda task, result: report.ended(task.pair.name, task.system_name, result),
        debug=raise_failures,
    )
    evaluation = Evaluation(
        results.rows,
        results.failures + failures,
        Inputs(
            target=_absolute(os.fspath(targets)),
            estimate=None if estimates is None else _absolute(os.fspath(estimates)),
            models=sources,
            variant=variant,
            pattern=pattern,
            align=align,
        ),
        results.reused,
        without_target,
    )
    if json is not None:
        evaluation.write_json(json, overwrite=overwrite)
    if csv is not None:
        evaluation.write_csv(csv, overwrite=overwrite)
    if partial and not evaluation.failures:
        partial.unlink(missing_ok=True)
    return evaluation


def partial_file(json: str | os.PathLike[str] | None, csv: str | os.PathLike[str] | None) -> Path | None:
    """Returns the file with finished comparisons until all have succeeded; None without an output."""
    output = json if json is not None else csv
    return None if output is None else Path(f"{os.fspath(output)}.partial.jsonl")


class _Counter:
    """Reports how many comparisons have ended, beginning with none."""

    def __init__(self, progress: Callable[[Progress], None], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(Progress(0, total))

    def ended(self, name: str, system: str, result: Row | str) -> None:
        self._done += 1
        row, error = (None, result) if isinstance(result, str) else (result, None)
        self._progress(Progress(self._done, self._total, name, system, row, error))


def _distinct(models: Sequence[Model]) -> Sequence[Model]:
    """Refuses a name that is given twice, before any model is loaded; returns the models."""
    names = [model for model in models if isinstance(model, str)]
    if len(set(names)) < len(names):
        raise EarVAEError(f"a model is given twice: {', '.join(names)}")
    return models


def _files_of(task: Task) -> list[Path]:
    return [task.pair.target, *([task.pair.estimate] if task.pair.estimate else [])]


def _known_failures(found: Pairs, system: str, without_estimate: str) -> list[dict[str, str]]:
    """Lists failures that are known in advance: originals without an estimate, and unreadable folders."""
    failures = [
        {"name": target, "system": system, "error": without_estimate} for target in found.without_estimate
    ]
    for problem in found.unreadable:
        path, _, reason = problem.rpartition(": ")
        failures.append({"name": path, "system": system, "error": reason})
    return failures


def _absolute(name: str) -> str:
    """Makes the path of an existing file or folder absolute, also after the `=` of a codec."""
    if Path(name).exists():
        return str(Path(name).resolve())
    codec, _, source = name.partition("=")
    return f"{codec}={Path(source).resolve()}" if source and Path(source).exists() else name
