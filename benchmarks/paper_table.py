"""The columns of the paper's Table 1 for any folder of originals and rebuilt audio.

    python benchmarks/paper_table.py FOLDER [--layout '{system}/{name}'] [--original gt] [--model NAME ...]

FOLDER holds the originals and what each system made of them. `--layout` says how: `{system}/{name}` for a
folder per system, `{name}/{system}` for a folder per piece, `{name}` where there are originals only, to be
rebuilt by the models. Prints the means as Markdown. With `--rows FILE` every row is kept there as a line of
JSON, and a run that was interrupted, or has another model to add, measures only what is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ear_vae import EarVAEError
from ear_vae.audio import find_audio_files
from ear_vae.evaluation.pairs import Pair
from ear_vae.evaluation.results import summarize
from ear_vae.evaluation.runner import Task, run_tasks
from ear_vae.evaluation.systems.loading import load_system

# The paper's columns, their factor and decimals.
COLUMNS = {
    "mel distance ↓": ("mel_distance", 1, 3),
    "STFT distance ↓": ("stft_distance", 1, 3),
    "ICPC % ↑": ("icpc", 100, 2),
    "CCPC % ↑": ("ccpc", 100, 2),
    "SI-SDR dB ↑": ("si_sdr_db", 1, 2),
    "true peak distance dB ↓": ("true_peak_distance_db", 1, 2),
}


def by_system(folder: Path, layout: str, original: str) -> dict[str, dict[str, Path]]:
    """Files by system, then by name.

    Args:
        folder: Searched with its subfolders.
        layout: Of paths inside it, without extension, with `{name}` and perhaps `{system}`.
        original: The system of files in a layout without `{system}`.

    Raises:
        EarVAEError: A layout without `{name}`, or no file that fits it.
    """
    if "{name}" not in layout:
        raise EarVAEError(f"the layout {layout!r} has no {{name}} in it")
    # A system is one part of a path; a name may be several.
    expression = re.escape(layout).replace(r"\{name\}", "(?P<name>.+)", 1)
    expression = expression.replace(r"\{system\}", "(?P<system>[^/]+)", 1)
    found: dict[str, dict[str, Path]] = {}
    for path in find_audio_files(folder):
        if match := re.fullmatch(expression, path.relative_to(folder).with_suffix("").as_posix()):
            groups = match.groupdict()
            found.setdefault(groups.get("system", original), {})[groups["name"]] = path
    if not found:
        raise EarVAEError(f"{folder}: no file is called like {layout!r}")
    return found


def tasks_of(
    files: Mapping[str, Mapping[str, Path]], original: str, models: Iterable[str], device: torch.device
) -> list[Task]:
    """A task for each original and each system that has it, then for each original and model.

    Raises:
        EarVAEError: There are no originals, a system has none of them, or nothing is to be compared.
    """
    if original not in files:
        raise EarVAEError(f"there are no originals called {original!r}, only {', '.join(sorted(files))}")
    targets = files[original]
    tasks = []
    for system in sorted(files.keys() - {original}):
        pairs = [Pair(name, targets[name], path) for name, path in files[system].items() if name in targets]
        if not pairs:
            raise EarVAEError(f"{system}: none of its files belongs to an original")
        tasks += [Task(pair, system) for pair in pairs]
    for model in models:
        system = load_system(model, device=device)
        tasks += [Task(Pair(name, path), system.name, system) for name, path in targets.items()]
    if not tasks:
        raise EarVAEError("there are originals only; say with --model what is to rebuild them")
    return tasks


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means of every system, best SI-SDR first."""
    lines = [
        "| | " + " | ".join((*COLUMNS, "files")) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    systems = dict.fromkeys(row["system"] for row in rows)
    summaries = {name: summarize([row for row in rows if row["system"] == name]) for name in systems}
    for name in sorted(systems, key=lambda name: -(summaries[name]["si_sdr_db"]["mean"] or -float("inf"))):
        cells = []
        for metric, factor, decimals in COLUMNS.values():
            mean = summaries[name][metric]["mean"]
            cells.append("–" if mean is None else f"{factor * mean:.{decimals}f}")
        count = sum(row["system"] == name for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", default="{system}/{name}")
    parser.add_argument("--original", default="gt", help="what the originals are called (%(default)s)")
    parser.add_argument("--model", action="append", default=[], help="as for ear-vae evaluate; repeatable")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args(arguments)
    try:
        files = by_system(options.folder, options.layout, options.original)
        tasks = tasks_of(files, options.original, options.model, torch.device(options.device))
        results = run_tasks(
            tasks,
            partial=options.rows,
            finished=lambda task, result: print(f"{task.system_name}: {task.pair.name}", file=sys.stderr),
        )
    except EarVAEError as error:
        print(f"paper_table.py: {error}", file=sys.stderr)
        return 1
    print(markdown(results.rows))
    for failure in results.failures:
        print(f"{failure['system']}: {failure['name']}: {failure['error']}", file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
