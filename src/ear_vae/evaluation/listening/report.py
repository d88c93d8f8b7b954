"""The listening report of files, folders, models or evaluations, as a function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ear_vae._atomic import require_free, same_file
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.evaluation.files import Row
from ear_vae.evaluation.listening.excerpts import Excerpt, ExcerptSpan, choose_spans, cut, measured
from ear_vae.evaluation.listening.page import Means, fitting, write_page
from ear_vae.evaluation.pairs import DEFAULT_PATTERN, Pair, find_pairs, find_targets
from ear_vae.evaluation.results import read_evaluation, summarize
from ear_vae.evaluation.runner import Task
from ear_vae.evaluation.systems.base import System
from ear_vae.evaluation.systems.loading import Model, as_system
from ear_vae.limits import counted

DEFAULT_EXCERPTS, DEFAULT_SECONDS, DEFAULT_MEGABYTES = 4, 10.0, 10.0
# Files are ranked by it where an evaluation has it.
_RANKED_BY = "mel_distance"
_SYSTEMS_IN_TITLE = 3


@dataclass(frozen=True)
class ListeningReport:
    """What a listening report holds.

    Attributes:
        path: Path of the page.
        excerpts: Number of excerpts on it.
        seconds: Length of the longest excerpt in seconds.
        num_bytes: Size of the page.
        failures: `name` and `error` of each excerpt that had to be left out.
        notes: What differs from what was asked for, a sentence each.
    """

    path: Path
    excerpts: int
    seconds: float
    num_bytes: int
    failures: list[dict[str, str]]
    notes: list[str]


@dataclass
class _Sources:
    """Sources of the page.

    Attributes:
        target: Path of the originals.
        tasks: Comparisons by system, then by name of the file.
        rows: Rows of evaluations by system; empty without.
    """

    target: Path
    tasks: dict[str, dict[str, Task]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def add(
        self, name: str, pairs: Sequence[Pair], *, system: System | None = None, align: bool = False
    ) -> None:
        """Adds a system with its files."""
        if not name:
            raise EarVAEError("a system has no name; give it one")
        if name in self.tasks:
            raise EarVAEError(f"two systems are called {name}; give them different names")
        self.tasks[name] = {pair.name: Task(pair, name, system, align) for pair in pairs}


def write_listening_report(
    path: str | os.PathLike[str],
    targets: str | os.PathLike[str] | None = None,
    *,
    systems: Mapping[str, str | os.PathLike[str]] | None = None,
    models: Sequence[Model] = (),
    evaluations: Sequence[str | os.PathLike[str]] = (),
    pattern: str = DEFAULT_PATTERN,
    align: bool = False,
    variant: str | None = None,
    device: str | torch.device | None = None,
    force_download: bool = False,
    excerpts: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    megabytes: float = DEFAULT_MEGABYTES,
    title: str | None = None,
    overwrite: bool = False,
    raise_failures: bool = False,
) -> ListeningReport:
    """Writes one HTML file in which a browser plays excerpts of originals and of what systems made of them.

    Excerpts are taken where the originals are loudest, of files evenly spaced by name, with evaluations by
    their mel distance. An excerpt that fails is left out.

    Args:
        path: HTML file to write.
        targets: Folder of originals, searched with its subfolders, or one file; None with `evaluations`.
        systems: Folder of rebuilt audio, or one file, by the name of the system that made it.
        models: Models that rebuild the excerpts, as for `ear_vae.evaluation.evaluate`.
        evaluations: JSON files of evaluations, whose originals, systems and models are shown instead.
        pattern: Name of the rebuilt file inside its folder, without extension, with `{name}` for that of the
            original.
        align: Take out a delay of up to 100 ms.
        variant: Variant of the models that are loaded by name, where their repository holds several.
        device: Device for the models that are loaded by name; the CPU by default.
        force_download: Fetch the models that are loaded by name from the Hub again.
        excerpts: Number of excerpts; by default 4, or fewer where the originals hold fewer.
        seconds: Length of each excerpt in seconds.
        megabytes: Largest size of the page in 10⁶ bytes; excerpts are shortened to keep it.
        title: Title of the page; by default made of the names of the systems and of the originals.
        overwrite: Replace an existing file.
        raise_failures: Raise the first failure instead of leaving its excerpt out.

    Returns:
        What the page holds.

    Raises:
        EarVAEError: Nothing can be compared, a model cannot be loaded, no excerpt can be made, or the page
            cannot be written.
    """
    path = Path(path)
    require_free(path, overwrite=overwrite)
    if evaluations:
        if targets is not None or systems or models:
            raise EarVAEError("an evaluation says what to compare; give no originals, systems or models")
        sources = _from_evaluations([Path(each) for each in evaluations], device, force_download)
    elif targets is None:
        raise EarVAEError("give the originals, or an evaluation of them")
    elif not systems and not models:
        raise EarVAEError("give at least one system or model to compare with the originals")
    else:
        sources = _Sources(Path(targets))
        for name, folder in (systems or {}).items():
            pairs = find_pairs(sources.target, Path(folder), pattern=pattern).pairs
            sources.add(name, pairs, align=align)
        for model in models:
            system = as_system(model, device=device, variant=variant, force_download=force_download)
            sources.add(_short(system.name), find_targets(sources.target).pairs, system=system)
    _require_no_input(path, sources, evaluations)
    notes: list[str] = []
    spans = choose_spans(_common_files(sources, notes), count=excerpts or DEFAULT_EXCERPTS, seconds=seconds)
    if excerpts is not None and len(spans) < excerpts:
        held = counted(len(spans), "excerpt")
        notes.append(f"the originals hold {held} of {seconds:g} s, not {excerpts}")
    made: list[Excerpt] = []
    failures: list[dict[str, str]] = []
    for span in spans:
        result = _attempt(span, sources, raise_failures=raise_failures)
        if isinstance(result, str):
            failures.append({"name": span.name, "error": result})
        else:
            made.append(result)
    if not made:
        raise EarVAEError(f"no excerpt could be made; {failures[0]['name']}: {failures[0]['error']}")
    fitted = fitting(made, megabytes)
    longest = max(excerpt.seconds for excerpt in fitted)
    if longest < max(excerpt.seconds for excerpt in made):
        notes.append(f"excerpts were shortened to {longest:.1f} s to keep the page below {megabytes:g} MB")
    write_page(
        path,
        [measured(excerpt) for excerpt in fitted],
        title=title or _title(sources),
        means=_means(sources),
        overwrite=overwrite,
    )
    return ListeningReport(path, len(fitted), longest, path.stat().st_size, failures, notes)


def _require_no_input(path: Path, sources: _Sources, evaluations: Sequence[str | os.PathLike[str]]) -> None:
    """Refuses to write the page over what it is made of."""
    pairs = [task.pair for by_name in sources.tasks.values() for task in by_name.values()]
    inputs = [file for pair in pairs for file in (pair.target, pair.estimate) if file is not None]
    if path.exists() and any(same_file(path, file) for file in (*inputs, *evaluations)):
        raise EarVAEError(f"{path}: is shown or read by the page itself; choose another name for the page")


def _attempt(span: ExcerptSpan, sources: _Sources, *, raise_failures: bool) -> Excerpt | str:
    """Returns the excerpt, or in one line why there is none."""
    try:
        return cut(span, [by_name[span.name] for by_name in sources.tasks.values()])
    # Whatever happens with one file, the others are shown.
    except Exception as error:
        if raise_failures:
            raise
        return in_one_line(error)


def _from_evaluations(
    paths: Sequence[Path], device: str | torch.device | None, force_download: bool
) -> _Sources:
    read = [read_evaluation(path) for path in paths]
    targets = sorted({inputs.target for _, inputs in read})
    if len(targets) > 1:
        raise EarVAEError(f"the evaluations are of different originals: {', '.join(targets)}")
    sources = _Sources(Path(targets[0]))
    for rows, inputs in read:
        by_system: dict[str, list[Row]] = {}
        for row in rows:
            by_system.setdefault(row["system"], []).append(row)
        for name, theirs in by_system.items():
            system = None
            if inputs.estimate is not None:
                pairs = find_pairs(sources.target, Path(inputs.estimate), pattern=inputs.pattern).pairs
            else:
                pairs = find_targets(sources.target).pairs
                system = as_system(
                    inputs.models[name],
                    device=device,
                    variant=inputs.variant,
                    force_download=force_download,
                )
            evaluated = {row["name"] for row in theirs}
            kept = [pair for pair in pairs if pair.name in evaluated]
            sources.add(_short(name), kept, system=system, align=inputs.align)
            sources.rows[_short(name)] = theirs
    if not sources.tasks:
        raise EarVAEError(f"{', '.join(map(str, paths))}: no file was evaluated, there is nothing to show")
    return sources


def _short(model: str) -> str:
    """Returns the last part of a model's folder; a name on the Hub as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def _title(sources: _Sources) -> str:
    """Makes a title of the names of the systems and of the originals."""
    names = list(sources.tasks)
    more = len(names) - _SYSTEMS_IN_TITLE
    if more > 0:
        names = [*names[:_SYSTEMS_IN_TITLE], counted(more, "other system")]
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    target = sources.target.resolve()
    return f"{joined} beside {target.name if target.is_file() else f'the originals of {target.name}'}"


def _common_files(sources: _Sources, notes: list[str]) -> list[tuple[str, Path]]:
    """Lists names and originals of the files that every system has, best first if they were evaluated."""
    first, *others = sources.tasks.values()
    everywhere = [name for name in first if all(name in theirs for theirs in others)]
    known = {name for theirs in sources.tasks.values() for name in theirs}
    if not everywhere:
        raise EarVAEError(
            f"there is no file that all systems have; {', '.join(sources.tasks)} have "
            f"{', '.join(str(len(theirs)) for theirs in sources.tasks.values())}"
        )
    if left_out := len(known) - len(everywhere):
        are = "is" if left_out == 1 else "are"
        notes.append(f"{counted(left_out, 'file')} that not every system has {are} left out")
    if sources.rows:
        distances = dict.fromkeys(everywhere, 0.0)
        for theirs in sources.rows.values():
            for row in theirs:
                if row["name"] in distances:
                    # A file without a value comes last.
                    value = row[_RANKED_BY]
                    distances[row["name"]] += float("inf") if value is None else value
        everywhere.sort(key=lambda name: distances[name])
    return [(name, first[name].pair.target) for name in everywhere]


def _means(sources: _Sources) -> Means | None:
    if not sources.rows:
        return None
    counts = {len(rows) for rows in sources.rows.values()}
    files = counted(max(counts), "file")
    if len(counts) > 1:
        files = f"{min(counts)} to {files}"
    systems = {
        name: {metric: figures["mean"] for metric, figures in summarize(rows).items()}
        for name, rows in sources.rows.items()
    }
    return Means(
        "Figures of the whole file" if files == "1 file" else f"Means over the whole of {files}", systems
    )
