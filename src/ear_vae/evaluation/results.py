"""Results over many files: summary, JSON, CSV and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ear_vae._atomic import atomic_path
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.files import QUANTITIES, Row, is_row
from ear_vae.evaluation.metrics import METRICS
from ear_vae.evaluation.pairs import DEFAULT_PATTERN
from ear_vae.limits import counted, escaped, first_names, parse_json
from ear_vae.pretrained import Figures

HIGHER_IS_BETTER = frozenset({"si_sdr_db", "icpc", "ccpc"})
_DECIMALS = {"si_sdr_db": 2, "true_peak_distance_db": 2, "loudness_distance_lu": 2, "icpc": 2, "ccpc": 2}
# As in the literature's tables.
_PERCENT = frozenset({"icpc", "ccpc"})
_WORST_SHOWN = 3


@dataclass(frozen=True)
class Inputs:
    """What an evaluation compared; enough to find the audio again.

    Attributes:
        target: Absolute path of the originals.
        estimate: Absolute path of the rebuilt audio; None where models made it.
        models: Source of each model by the name that its rows have: an absolute path, a bundled name or a
            Hub repository; for a model that was given as an object only its name.
        variant: Variant of the models, where their repository holds several.
        pattern: Name of the rebuilt file of `{name}`, see `find_pairs`.
        align: Whether delays were taken out.
    """

    target: str
    estimate: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    variant: str | None = None
    pattern: str = DEFAULT_PATTERN
    align: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation, file by file and in summary.

    Attributes:
        rows: Figures of each file and system, as in `ear_vae.evaluation.files.compare_files`, with `system`.
        failures: `name`, `system` and `error` of each comparison that failed.
        inputs: What was compared.
        reused: Number of rows that an earlier, interrupted run had left.
        without_target: Rebuilt files that belong to no original.
    """

    rows: list[Row]
    failures: list[dict[str, str]]
    inputs: Inputs
    reused: int = 0
    without_target: tuple[Path, ...] = ()

    @property
    def summaries(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Results of `summarize` by name of the system."""
        return {name: summarize(rows) for name, rows in _by_system(self.rows).items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns what `write_json` writes.

        Returns:
            `files`, `failed`, `inputs` (what was compared), and `summary` by metric for one system or
            `summaries` by system for several.
        """
        report: dict[str, Any] = {
            "files": self.rows,
            "failed": self.failures,
            "inputs": asdict(self.inputs),
        }
        summaries = self.summaries
        if len(summaries) > 1:
            return {**report, "summaries": summaries}
        return {**report, "summary": next(iter(summaries.values()), summarize([]))}

    def table(self) -> str:
        """Returns mean, median, spread and worst files of every metric as text, system by system.

        The worst files only where there are more, and for a system with a single file only the values. ICPC
        and CCPC are in per cent.
        """
        return "\n\n".join(_system_table(name, rows) for name, rows in _by_system(self.rows).items())

    def figures(self) -> Figures:
        """Returns the means of every metric for a model card, a column for each system.

        Names of files and folders, which are the user's own, are left out.

        Raises:
            EarVAEError: There are no results.
        """
        systems = self.summaries
        if not systems:
            raise EarVAEError("the evaluation has no results for a card")
        models = [f"--model {shlex.quote(name)}" for name in systems if name in self.inputs.models]
        command = " ".join(["ear-vae evaluate ORIGINALS", *(models or ["REBUILT"])])
        numbers = {summary[metric]["count"] for summary in systems.values() for metric in METRICS}
        # Within a code span nothing but its end means anything.
        code = escaped(command).replace("`", "'")
        return Figures(
            description=f"`{code}`, means over {counted(max(numbers), 'file')}:",
            rows=(
                ("", *systems),
                *(
                    (
                        f"{metric} %" if metric in _PERCENT else metric,
                        *(_shown(summary[metric]["mean"], metric) for summary in systems.values()),
                    )
                    for metric in METRICS
                ),
            ),
            metrics=METRICS,
        )

    def write_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes everything as JSON, complete or not at all.

        Args:
            path: File to write.
            overwrite: Replace any file; otherwise only an earlier evaluation is replaced.

        Raises:
            EarVAEError: The path holds something else, or cannot be written.
        """
        require_replaceable(Path(path), overwrite=overwrite)
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes a line for each file, failed ones with an `error`, complete or not at all.

        Args:
            path: File to write.
            overwrite: Replace any file; otherwise only an earlier evaluation is replaced.

        Raises:
            EarVAEError: The path holds something else, or cannot be written.
        """
        require_replaceable(Path(path), overwrite=overwrite)
        with (
            atomic_path(path, overwrite=True) as temporary,
            # Names of files need not be UTF-8.
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            writer = csv.DictWriter(file, _columns(), restval="")
            writer.writeheader()
            for row in self.rows:
                writer.writerow({**row, "notes": "; ".join(row["notes"])})
            writer.writerows(self.failures)


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Summarizes every metric and quantity over files.

    Args:
        rows: Rows of one system.

    Returns:
        By metric `mean`, `median` and `std` (the standard deviation of the population; all three None where
        no file has a value), `count`, and `undefined` with the names of the files that have no value and are
        left out.
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
    """Returns the names of the files with the worst values, worst first."""
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    valued = sorted((row for row in rows if row[metric] is not None), key=lambda row: sign * row[metric])
    return [row["name"] for row in valued[:count]]


def read_evaluation(path: Path) -> tuple[list[Row], Inputs]:
    """Reads the rows of an evaluation, and what was compared.

    Args:
        path: File that `Evaluation.write_json` wrote.

    Raises:
        EarVAEError: The file is missing, or is not an evaluation.
    """
    try:
        if path.exists() and not path.is_file():
            raise EarVAEError(f"{path}: is no ordinary file; expected JSON that an evaluation wrote")
        report = parse_json(path.read_text(encoding="utf-8"))
        rows, inputs = report["files"], Inputs(**report["inputs"])
        if not isinstance(rows, list) or not _are_inputs(inputs):
            raise TypeError
        complete = all(map(is_row, rows)) and (
            inputs.estimate is not None or {row["system"] for row in rows} <= inputs.models.keys()
        )
    except OSError as error:
        raise EarVAEError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EarVAEError(
            f"{path}: is no evaluation; expected JSON that an evaluation by this version wrote"
        ) from error
    if not complete:
        raise EarVAEError(
            f"{path}: its rows lack what this version writes, or hold something else; evaluate again"
        )
    return rows, inputs


def _are_inputs(inputs: Inputs) -> bool:
    """Whether the fields, which come from a file, are of their types."""
    return (
        isinstance(inputs.target, str)
        and isinstance(inputs.estimate, (str, type(None)))
        and isinstance(inputs.models, dict)
        and all(isinstance(source, str) for source in inputs.models.values())
        and isinstance(inputs.variant, (str, type(None)))
        and isinstance(inputs.pattern, str)
        and isinstance(inputs.align, bool)
    )


def require_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuses an impossible output, before hours are spent on it.

    Args:
        path: File to write.
        overwrite: Replace any file; otherwise only an earlier evaluation is replaced.

    Raises:
        EarVAEError: The folder is missing, or there is something else at the path.
    """
    if not path.parent.is_dir():
        raise EarVAEError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise EarVAEError(f"{path}: is a folder, expected the path of a file to write")
    if path.exists() and not path.is_file():
        raise EarVAEError(f"{path}: is a pipe or a device, expected the path of a file to write")
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            head = file.read(64)
        if not head.startswith((b'{\n "files": [', ",".join(_columns()[:3]).encode())):
            raise EarVAEError(
                f"{path}: exists and is no evaluation; choose another name, or overwrite it",
                argument="overwrite",
            )


def require_same_comparisons(path: Path, comparisons: Collection[tuple[str, str]]) -> None:
    """Refuses to replace an earlier evaluation of something else.

    Args:
        path: File that an evaluation may have written, JSON or CSV.
        comparisons: Name and system of all that is compared now.

    Raises:
        EarVAEError: The file holds a comparison that is not among them.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if text.startswith("{"):
            rows = parse_json(text)["files"]
        else:
            # Nothing is lost with what failed.
            rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if not row.get("error")]
        # As they are in CSV, of names that are not UTF-8 too.
        there, new = (
            {tuple(word.encode(errors="backslashreplace") for word in pair) for pair in pairs}
            for pairs in ([(row["name"], row["system"]) for row in rows], comparisons)
        )
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise EarVAEError(
            f"{path}: exists and is a damaged evaluation; choose another name, or overwrite it",
            argument="overwrite",
        ) from error
    if lost := there - new:
        name, system = (escaped(word.decode()) for word in min(lost))
        raise EarVAEError(
            f"{path}: holds an evaluation of something else ('{name}' by '{system}'); choose another name, "
            "or overwrite it",
            argument="overwrite",
        )


def _system_table(name: str, rows: Sequence[Row]) -> str:
    summary = summarize(rows)
    several = len(rows) > 1
    columns = ["mean", "median", "std"] if several else ["mean"]
    # The worst of no more files than are listed would be all of them.
    ranked = len(rows) > _WORST_SHOWN
    head = [*columns, "files", *([f"worst {_WORST_SHOWN}"] if ranked else [])] if several else ["value"]
    lines = [["metric", *head]]
    for metric in METRICS:
        figures = summary[metric]
        shown = [_shown(figures[column], metric) for column in columns]
        if several:
            if figures["count"] < 2:
                shown[-1] = "-"  # one value has no spread
            shown.append(str(figures["count"]))
        if ranked:
            shown.append(", ".join(map(escaped, worst(rows, metric))))
        lines.append([f"{metric} %" if metric in _PERCENT else metric, *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if ranked:
        widths[-1] = 0  # names are as long as they are
    body = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    undefined = [
        f"without {metric}: {first_names(summary[metric]['undefined'])}"
        for metric in METRICS
        if summary[metric]["undefined"]
    ]
    heading = escaped(name if several else f"{name}: {rows[0]['name']}")
    return "\n".join([heading, *body, *undefined])


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value if metric in _PERCENT else value:.{_DECIMALS.get(metric, 4)}f}"


def _by_system(rows: Iterable[Row]) -> dict[str, list[Row]]:
    systems: dict[str, list[Row]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    return systems


def _columns() -> list[str]:
    facts = ["sample_rate", "estimate_sample_rate", "seconds", "estimate_seconds", "channels", "delay_ms"]
    return ["name", "system", *METRICS, *QUANTITIES, *facts, "notes", "error"]
