"""The command `ear-vae report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ear_vae.cli.streams import require_free
from ear_vae.cli.systems import load_from_options, refuse_options_of_models
from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.evaluation.files import Row
from ear_vae.evaluation.listening.excerpts import Excerpt, choose_places, cut, measured
from ear_vae.evaluation.listening.page import Means, fitting, write_page
from ear_vae.evaluation.pairs import DEFAULT_PATTERN, Pair, find_pairs, find_targets
from ear_vae.evaluation.results import read_json, summarize
from ear_vae.evaluation.runner import Task
from ear_vae.evaluation.systems.base import System

# Files are ranked by it where an evaluation has it.
_RANKED_BY = "mel_distance"


@dataclass(frozen=True)
class _Sources:
    """What the page is made of.

    Attributes:
        target: The originals.
        tasks: By system, then by name of the file.
        rows: Of evaluations, by system; empty without.
    """

    target: Path
    tasks: Mapping[str, Mapping[str, Task]]
    rows: Mapping[str, Sequence[Row]]


def run(options: argparse.Namespace) -> int:
    """Writes the page.

    Args:
        options: Of the command line: `output`, `target`, `system`, `model`, `evaluation`, `variant`,
            `pattern`, `align`, `excerpts`, `seconds`, `megabytes`, `title`, `force`, `quiet` and `debug`;
            and `refuse`, which ends with a usage error.

    Returns:
        0, or 1 if an excerpt had to be left out.

    Raises:
        EarVAEError: Nothing can be compared, or the page cannot be written.
    """
    if not options.evaluation:
        refuse_options_of_models(options)
    require_free(options.output, overwrite=options.force)
    _refuse_idle_options(options)
    sources = _from_evaluations(options) if options.evaluation else _from_folders(options)
    files = _common_files(sources, quiet=options.quiet)
    places = choose_places(files, count=options.excerpts, seconds=options.seconds)
    if len(places) < options.excerpts and not options.quiet:
        say(f"the originals hold {len(places)} excerpts of {options.seconds:g} s, not {options.excerpts}")
    excerpts: list[Excerpt] = []
    for place in places:
        tasks = [by_name[place.name] for by_name in sources.tasks.values()]
        try:
            excerpts.append(cut(place, tasks))
        # Whatever one file does, the others are shown.
        except Exception as error:
            if options.debug:
                raise
            say(f"ear-vae: {place.name}: left out: {in_one_line(error)}")
    if not excerpts:
        raise EarVAEError("no excerpt could be made")
    excerpts = [measured(excerpt) for excerpt in fitting(excerpts, options.megabytes)]
    output = Path(options.output)
    title = options.title or sources.target.resolve().name
    write_page(output, excerpts, title=title, means=_means(sources), overwrite=options.force)
    if not options.quiet:
        longest = max(excerpt.seconds for excerpt in excerpts)
        size = output.stat().st_size / 1e6
        say(f"{output}: {len(excerpts)} excerpts of up to {longest:.1f} s, {size:.1f} MB")
    return 0 if len(excerpts) == len(places) else 1


def _refuse_idle_options(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option would do nothing."""
    if options.evaluation:
        for name in ("pattern", "variant", "align"):
            if getattr(options, name):
                options.refuse(f"--{name} is not for --from: an evaluation says that itself")
    elif options.model and not options.system:
        for name in ("pattern", "align"):
            if getattr(options, name):
                options.refuse(f"--{name} is for --system")
    elif options.pattern is not None and options.target and Path(options.target).is_file():
        options.refuse("--pattern is for folders")


def _from_folders(options: argparse.Namespace) -> _Sources:
    if not options.target:
        raise EarVAEError("give the folder of the originals, or an evaluation with --from")
    if not options.system and not options.model:
        raise EarVAEError("give at least one --system NAME=FOLDER or --model NAME to compare with")
    target = Path(options.target)
    tasks: dict[str, dict[str, Task]] = {}
    for given in options.system:
        name, separator, folder = given.partition("=")
        folder = folder if separator else given
        _add(tasks, name if separator else Path(folder).resolve().name)
        pairs = find_pairs(target, Path(folder), pattern=options.pattern or DEFAULT_PATTERN).pairs
        _fill(tasks, pairs, align=options.align)
    for model in options.model:
        _add(tasks, _short(model))
        _fill(tasks, find_targets(target).pairs, system=load_from_options(model, options.variant, options))
    return _Sources(target, tasks, {})


def _from_evaluations(options: argparse.Namespace) -> _Sources:
    if options.target or options.system or options.model:
        raise EarVAEError("an evaluation says itself what to compare; leave out TARGET, --system and --model")
    tasks: dict[str, dict[str, Task]] = {}
    rows: dict[str, list[Row]] = {}
    targets = set()
    makes = False
    for path in map(Path, options.evaluation):
        found, inputs = read_json(path)
        target = Path(inputs.target)
        targets.add(target)
        by_system: dict[str, list[Row]] = {}
        for row in found:
            by_system.setdefault(row["system"], []).append(row)
        for name, theirs in by_system.items():
            shown = _short(name)
            _add(tasks, shown)
            rows[shown] = theirs
            if inputs.estimate is not None:
                pairs, system = find_pairs(target, Path(inputs.estimate), pattern=inputs.pattern).pairs, None
            else:
                pairs, system = (
                    find_targets(target).pairs,
                    load_from_options(inputs.models[name], inputs.variant, options),
                )
                makes = True
            evaluated = {row["name"] for row in theirs}
            kept = [pair for pair in pairs if pair.name in evaluated]
            _fill(tasks, kept, system=system, align=inputs.align)
    if not makes and (options.device or options.force_download):
        option = "device" if options.device else "force-download"
        options.refuse(f"--{option} is for models; the evaluation is of files")
    if not tasks:
        raise EarVAEError(f"{', '.join(options.evaluation)}: no file was evaluated, there is nothing to show")
    if len(targets) > 1:
        raise EarVAEError(
            f"the evaluations are of different originals: {', '.join(map(str, sorted(targets)))}"
        )
    return _Sources(targets.pop(), tasks, rows)


def _add(tasks: dict[str, dict[str, Task]], name: str) -> None:
    if not name:
        raise EarVAEError("a system has no name; write --system NAME=FOLDER")
    if name in tasks:
        raise EarVAEError(f"two systems are called {name}; name them apart with --system NAME=FOLDER")
    tasks[name] = {}


def _fill(
    tasks: dict[str, dict[str, Task]],
    pairs: Sequence[Pair],
    *,
    system: System | None = None,
    align: bool = False,
) -> None:
    """Gives the system that was added last its files."""
    name = list(tasks)[-1]
    tasks[name] = {pair.name: Task(pair, name, system, align) for pair in pairs}


def _short(model: str) -> str:
    """A model's folder by its last part; a name on the Hub as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def _common_files(sources: _Sources, *, quiet: bool) -> list[tuple[str, Path]]:
    """Names and originals of the files that every system has, best first where they have been evaluated."""
    first, *others = sources.tasks.values()
    everywhere = [name for name in first if all(name in theirs for theirs in others)]
    known = {name for theirs in sources.tasks.values() for name in theirs}
    if not everywhere:
        raise EarVAEError(
            f"there is no file that all systems have; {', '.join(sources.tasks)} have "
            f"{', '.join(str(len(theirs)) for theirs in sources.tasks.values())}"
        )
    if len(known) > len(everywhere) and not quiet:
        say(f"{len(known) - len(everywhere)} files are not there for every system and are left out")
    if sources.rows:
        distances = dict.fromkeys(everywhere, 0.0)
        for theirs in sources.rows.values():
            for row in theirs:
                if row["name"] in distances:
                    # Without a value a file is no example of anything.
                    value = row[_RANKED_BY]
                    distances[row["name"]] += float("inf") if value is None else value
        everywhere.sort(key=lambda name: distances[name])
    return [(name, first[name].pair.target) for name in everywhere]


def _means(sources: _Sources) -> Means | None:
    if not sources.rows:
        return None
    counts = {len(rows) for rows in sources.rows.values()}
    files = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{counts.pop()}"
    systems = {
        name: {metric: figures["mean"] for metric, figures in summarize(rows).items()}
        for name, rows in sources.rows.items()
    }
    return Means(f"Means over the whole of {files} files", systems)
