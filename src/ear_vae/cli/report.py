"""The command `ear-vae report`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ear_vae._atomic import require_free
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.cli.models import device_of
from ear_vae.cli.systems import refuse_options_of_models
from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError
from ear_vae.evaluation.listening.report import write_listening_report
from ear_vae.evaluation.pairs import DEFAULT_PATTERN
from ear_vae.evaluation.results import read_evaluation
from ear_vae.limits import counted


def run_report(options: argparse.Namespace) -> int:
    """Writes the listening report.

    Args:
        options: Parsed options: `output`, `target`, `system`, `model`, `evaluation`, `variant`, `pattern`,
            `align`, `excerpts`, `seconds`, `megabytes`, `title`, `force`, `quiet` and `debug`; and
            `refuse`, which ends with a usage error.

    Returns:
        0, or 1 if an excerpt had to be left out.

    Raises:
        EarVAEError: Nothing can be compared, or the page cannot be written.
    """
    if not options.evaluation:
        refuse_options_of_models(options)
    options.output = _page(options.output)
    require_free(options.output, overwrite=options.force)
    _refuse_idle_options(options)
    report = write_listening_report(
        options.output,
        options.target or None,
        systems=_systems(options.system),
        models=options.model,
        evaluations=options.evaluation,
        pattern=options.pattern or DEFAULT_PATTERN,
        align=options.align,
        variant=options.variant,
        device=device_of(options.device or "cpu"),
        force_download=options.force_download,
        excerpts=options.excerpts,
        seconds=options.seconds,
        megabytes=options.megabytes,
        title=options.title,
        overwrite=options.force,
        raise_failures=options.debug,
    )
    for failure in report.failures:
        say(f"ear-vae: {failure['name']}: left out: {failure['error']}")
    if not options.quiet:
        for note in report.notes:
            say(note)
        excerpts, size = counted(report.excerpts, "excerpt"), report.num_bytes / 1e6
        say(f"{report.path}: {excerpts} of up to {report.seconds:.1f} s, {size:.1f} MB")
    return 1 if report.failures else 0


def _page(name: str) -> str:
    """Returns the name of the page, with the extension by which a browser knows it.

    Raises:
        EarVAEError: The name is that of the originals, or of another kind of file.
    """
    path, extension = Path(name), Path(name).suffix.lower()
    if extension in (".html", ".htm"):
        return name
    if path.is_dir() or path.is_file() or extension in AUDIO_EXTENSIONS:
        raise EarVAEError(
            f"{name}: the page comes first, then the originals: ear-vae report page.html {shlex.quote(name)} "
            "--system NAME=REBUILT"
        )
    return name if path.exists() else f"{name}.html"


def _refuse_idle_options(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option would do nothing, or where what to compare is missing."""
    if options.evaluation:
        if options.target or options.system or options.model:
            raise EarVAEError("the evaluation says what to compare; leave out TARGET, --system and --model")
        for name in ("pattern", "variant", "align"):
            if getattr(options, name):
                options.refuse(f"--{name} is not for --from: the evaluation has its own")
        of_files = all(read_evaluation(Path(path))[1].estimate is not None for path in options.evaluation)
        if of_files and (options.device or options.force_download):
            option = "device" if options.device else "force-download"
            options.refuse(f"--{option} is for models; the evaluation is of files")
        return
    if not options.target:
        raise EarVAEError("give the folder of the originals, or an evaluation with --from")
    if not options.system and not options.model:
        raise EarVAEError(
            "give what to compare with: rebuilt audio with --system NAME=FOLDER, or a model with --model NAME"
        )
    if not options.system:
        for name in ("pattern", "align"):
            if getattr(options, name):
                options.refuse(f"--{name} is for --system")
    elif options.pattern is not None and Path(options.target).is_file():
        options.refuse("--pattern is for folders")


def _systems(given: list[str]) -> dict[str, str]:
    """Returns folders or files by name, from options NAME=FOLDER or FOLDER, which is named after itself."""
    systems: dict[str, str] = {}
    for option in given:
        name, separator, folder = option.partition("=")
        if not separator or Path(option).exists():
            path, folder = Path(option), option
            name = path.stem if path.is_file() else path.resolve().name
        if not name:
            raise EarVAEError("a system has no name; write --system NAME=FOLDER")
        if name in systems:
            raise EarVAEError(f"two systems are called {name}; name them apart with --system NAME=FOLDER")
        systems[name] = folder
    return systems
