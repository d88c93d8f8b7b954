"""Results of many files: summary, JSON, CSV and a table for the terminal."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ear_vae._atomic import atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import QUANTITIES, Row
from ear_vae.evaluation.metrics import METRICS
from ear_vae.evaluation.pairs import DEFAULT_PATTERN
from ear_vae.evaluation.runner import Results

HIGHER_IS_BETTER = frozenset({"si_sdr_db", "icpc", "ccpc"})
_DECIMALS = {"si_sdr_db": 2, "true_peak_distance_db": 2, "loudness_distance_lu": 2}
_WORST_SHOWN = 3
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Inputs:
    """What an evaluation compared; enough to find the audio again.

    Attributes:
        target: The originals, an absolute path.
        estimate: The rebuilt ones, an absolute path; None where models made them.
        models: Where each model came from, by the name that the rows have: an absolute path, a bundled name
            or a Hub repository.
        variant: Of the models.
        pattern: As for `find_pairs`.
        align: As for `compare_files`.
    """

    target: str
    estimate: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    variant: str | None = None
    pattern: str = DEFAULT_PATTERN
    align: bool = False


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Mean, median and standard deviation (over all, not of a sample) of every metric and quantity.

    Returns:
        By metric `mean`, `median`, `std` (None where no file has a value), `count`, and `undefined` with
        the names of the files that have no value and are left out.
    """
    summary = {}
    for metric in (*METRICS, *QUANTITIES):
        values = [row[metric] for row in rows if row[metric] is not None]
        summary[metric] = {
            "mean": statistics.fmean(values) if values else None,
            "median": statistics.median(values) if values else None,
            "std": statistics.pstdev(values) if values else None,
            "count": len(values),
            "undefined": [row["name"] for row in rows if row[metric] is None],
        }
    return summary


def worst(rows: Sequence[Row], metric: str, count: int = _WORST_SHOWN) -> list[str]:
    """Names of the files with the worst values, worst first."""
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    valued = sorted((row for row in rows if row[metric] is not None), key=lambda row: sign * row[metric])
    return [row["name"] for row in valued[:count]]


def as_json(results: Results, inputs: Inputs) -> dict[str, Any]:
    """The whole evaluation.

    Returns:
        `files`, `failed`, `inputs` (what was compared), and `summary` by metric for one system or
        `summaries` by system for several.
    """
    systems = _systems(results.rows)
    summaries = {name: summarize(rows) for name, rows in systems.items()}
    report: dict[str, Any] = {
        "files": results.rows,
        "failed": results.failures,
        "inputs": asdict(inputs),
    }
    if len(summaries) > 1:
        return {**report, "summaries": summaries}
    return {**report, "summary": next(iter(summaries.values()), summarize([]))}


def write_json(path: Path, results: Results, inputs: Inputs) -> None:
    """Writes `as_json`, complete or not at all.

    Raises:
        EarVAEError: The path cannot be written.
    """
    text = json.dumps(as_json(results, inputs), indent=1, allow_nan=False) + "\n"
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> tuple[list[Row], Inputs]:
    """The rows of an evaluation, and what was compared.

    Raises:
        EarVAEError: The file is missing, or no evaluation.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows, inputs = report["files"], Inputs(**report["inputs"])
        complete = all({"name", "system", *METRICS} <= row.keys() for row in rows)
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(
            f"{path}: is no evaluation; expected what ear-vae evaluate --json writes, in this version"
        ) from error
    if not complete:
        raise EarVAEError(f"{path}: rows lack metrics; evaluate again with this version")
    return rows, inputs


def write_csv(path: Path, results: Results) -> None:
    """Writes a line for each file, failed ones with an `error`, complete or not at all.

    Raises:
        EarVAEError: The path cannot be written.
    """
    columns = _columns()
    with (
        atomic_path(path, overwrite=True) as temporary,
        # Names of files need not be UTF-8.
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in results.rows:
            writer.writerow({**row, "notes": "; ".join(row["notes"])})
        writer.writerows(results.failures)


def require_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuses an impossible output, before hours are spent on it.

    Args:
        path: What is to be written.
        overwrite: Replace whatever file is there; otherwise only an earlier evaluation is replaced.

    Raises:
        EarVAEError: The folder is missing, or there is something else at the path.
    """
    if not path.parent.is_dir():
        raise EarVAEError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise EarVAEError(f"{path}: is a folder, expected the path of a file to write")
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            head = file.read(64)
        if not head.startswith((b'{\n "files": [', ",".join(_columns()[:3]).encode())):
            raise EarVAEError(f"{path}: exists and is no evaluation; choose another name, or --force")


def table(results: Results) -> str:
    """Every metric's mean, median and spread, and its worst files, system by system."""
    return "\n\n".join(_system_table(name, rows) for name, rows in _systems(results.rows).items())


def _system_table(name: str, rows: Sequence[Row]) -> str:
    summary = summarize(rows)
    lines = [["metric", "mean", "median", "std", "files", f"worst {min(_WORST_SHOWN, len(rows))}"]]
    for metric in METRICS:
        figures = summary[metric]
        decimals = _DECIMALS.get(metric, 4)
        shown = [
            "-" if figures[k] is None else f"{figures[k]:.{decimals}f}" for k in ("mean", "median", "std")
        ]
        lines.append([metric, *shown, str(figures["count"]), ", ".join(worst(rows, metric))])
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    body = [
        "  ".join([line[0].ljust(widths[0]), *(line[c].rjust(widths[c]) for c in range(1, 5)), line[5]])
        for line in lines
    ]
    undefined = [
        f"without {metric}: {shortened(summary[metric]['undefined'])}"
        for metric in METRICS
        if summary[metric]["undefined"]
    ]
    return "\n".join([name, *(line.rstrip() for line in body), *undefined])


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many more there are: a terminal is no place for thousands."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _systems(rows: Iterable[Row]) -> dict[str, list[Row]]:
    systems: dict[str, list[Row]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    return systems


def _columns() -> list[str]:
    facts = ["sample_rate", "estimate_sample_rate", "seconds", "estimate_seconds", "channels", "delay_ms"]
    return ["name", "system", *METRICS, *QUANTITIES, *facts, "notes", "error"]
