"""Pairing inputs with outputs, and working through them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ear_vae._atomic import same_file
from ear_vae.audio.folders import OUTPUT_MARK, REBUILT, Found, find_files
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.cli.terminal import reason, say, say_traceback
from ear_vae.encoding.reading import accompanies_items
from ear_vae.errors import EarVAEError
from ear_vae.inference.tiling import observe_tiles
from ear_vae.latents.raw import RAW_EXTENSIONS
from ear_vae.limits import counted, first_names, name_in_a_line

STREAM = "-"
LATENT_EXTENSION = ".safetensors"
_LONGEST_IN_BAR = 40

_T = TypeVar("_T")


@dataclass(frozen=True)
class Kind:
    """A kind of file that commands read and write.

    Attributes:
        plural: Name of such files in messages.
        extensions: Extensions by which such files are recognised in a folder, in lower case and with the dot.
    """

    plural: str
    extensions: frozenset[str]

    def find(self, folder: Path) -> Found:
        """Lists the files of this kind below a folder; of a data set of latents the items alone."""
        found = find_files(folder, self.extensions)
        return replace(found, files=tuple(path for path in found.files if not accompanies_items(path)))


AUDIO = Kind("audio files", AUDIO_EXTENSIONS)
_LATENT_EXTENSIONS = (LATENT_EXTENSION, *RAW_EXTENSIONS)
LATENTS = Kind(f"latent files ({', '.join(_LATENT_EXTENSIONS)})", frozenset(_LATENT_EXTENSIONS))


@dataclass(frozen=True)
class Job:
    """One input and its output.

    Attributes:
        source: Path, or `-` for standard input.
        destination: Path, or `-` for standard output.
        relative: Path of the source inside the input folder, with `/`; empty for a single file.
    """

    source: str
    destination: str
    relative: str = ""

    @property
    def source_name(self) -> str:
        """Name of the input in messages."""
        return "standard input" if self.source == STREAM else self.source

    @property
    def destination_name(self) -> str:
        """Name of the output in messages."""
        return "standard output" if self.destination == STREAM else self.destination


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what is left out.

    Attributes:
        jobs: Inputs to process, each with its output.
        kept: Outputs that exist already and are kept.
        unreadable: Parts of the folder that could not be read, each with the reason.
        rebuilt: Files that were rebuilt from others in the folder, and are left out.
        marked: Folder to mark as one of rebuilt audio, which later jobs leave out; None for none.
    """

    jobs: tuple[Job, ...]
    kept: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    marked: Path | None = None


def make_plan(
    source: str,
    destination: str | None,
    *,
    reads: Kind,
    extension: str,
    overwrite: bool,
) -> Plan:
    """Pairs inputs with outputs before any work is done.

    Args:
        source: Input: a file, a folder or `-`.
        destination: Output: a file for a file, a folder for a folder, or `-`; None for `NAME.rebuilt` beside
            the input.
        reads: Kind of the inputs.
        extension: Extension of the outputs, with the dot; a single output that is named keeps its own.
        overwrite: Make outputs again that exist already.

    Raises:
        EarVAEError: A missing input, a folder for a file or the reverse, an output that exists or is no
            ordinary file, nothing to do in a folder, two inputs that would have the same output, or an output
            that would replace an input.
    """
    if not source or destination == "":
        raise EarVAEError("the name of the input or of the output is empty; give a file, a folder or -")
    if source != STREAM and not Path(source).exists():
        raise EarVAEError(f"{source}: no such file or folder")
    if destination is None:
        destination = _beside(source, extension)
    if source != STREAM and Path(source).is_dir():
        return _plan_folder(Path(source), destination, reads=reads, extension=extension, overwrite=overwrite)
    if destination != STREAM:
        _require_output_of_a_file(source, destination, extension, overwrite=overwrite)
    return Plan((Job(source, destination),))


def _beside(source: str, extension: str) -> str:
    """Returns the default output: beside the input, and named after it."""
    if source == STREAM:
        raise EarVAEError("standard input has no name for the output to take; name the output, or write to -")
    path = Path(source)
    # A folder such as . or .. has its name elsewhere.
    path = path if path.name not in ("", "..") else path.resolve()
    if path.is_dir():
        return str(path.with_name(path.name + REBUILT))
    return str(path.with_name(path.stem + REBUILT + extension))


def _require_output_of_a_file(source: str, destination: str, extension: str, *, overwrite: bool) -> None:
    """Refuses an output that one file cannot have."""
    output = Path(destination)
    if output.is_dir():
        named = "output" if source == STREAM else Path(source).stem
        raise EarVAEError(
            f"{destination}: is a folder; for one file name the file to write, such as "
            f"{output / (named + extension)}"
        )
    if output.exists() and not output.is_file():
        raise EarVAEError(f"{destination}: is not an ordinary file; write to - and redirect it there")
    if source != STREAM and same_file(source, destination):
        raise EarVAEError(f"{destination}: is the input itself; choose another name for the output")
    if output.exists() and not overwrite:
        raise EarVAEError(
            f"{destination}: exists already, and would be the output of {source}; choose another name, or "
            "replace it with --force"
        )


def _plan_folder(
    source: Path,
    destination: str,
    *,
    reads: Kind,
    extension: str,
    overwrite: bool,
) -> Plan:
    folder = Path(destination)
    if destination == STREAM or (folder.exists() and not folder.is_dir()):
        name = "standard output" if destination == STREAM else destination
        raise EarVAEError(f"{name}: is no folder; {source} is one, and so its output must be one")
    if not folder.exists() and folder.suffix.lower() in AUDIO_EXTENSIONS | {LATENT_EXTENSION}:
        raise EarVAEError(
            f"{destination}: is the name of a file; {source} is a folder, and so its output must be one, "
            f"such as {folder.with_suffix('')}"
        )
    found = reads.find(source)
    inputs, rebuilt = list(found.originals), list(found.rebuilt)
    inner = folder.resolve()
    inside = inner != source.resolve() and inner.is_relative_to(source.resolve())
    if inside:
        # What an earlier run wrote there is no input.
        inputs, rebuilt = (
            [path for path in paths if not path.resolve().is_relative_to(inner)]
            for paths in (inputs, rebuilt)
        )
    if not inputs:
        unseen = f"; {found.unreadable[0]}" if found.unreadable else ""
        besides = f" but {_left_out(rebuilt)}" if rebuilt else ""
        raise EarVAEError(f"{source}: holds no {reads.plural}{besides}{unseen}")
    originals = {path.resolve() for path in inputs} | {_identity(path) for path in inputs}
    outputs: dict[Path, Path] = {}
    for path in inputs:
        output = (folder / path.relative_to(source)).with_suffix(extension)
        if output in outputs:
            raise EarVAEError(f"{outputs[output]} and {path} would both become {output}; rename one of them")
        if output.resolve() in originals or (os.path.exists(output) and _identity(output) in originals):
            raise EarVAEError(
                f"{path}: its output {output} would replace an input; choose another folder or format"
            )
        outputs[output] = path
    # Unlike those of `Path`, these take a name that is too long for one of nothing; its own job will say so.
    kept = tuple(str(output) for output in outputs if os.path.isfile(output) and not overwrite)
    jobs = tuple(
        Job(str(path), str(output), path.relative_to(source).as_posix())
        for output, path in outputs.items()
        if str(output) not in kept
    )
    # A folder that holds something already may hold music.
    is_new = not folder.exists() or not any(folder.iterdir())
    marked = folder if inside and is_new and extension != LATENT_EXTENSION else None
    return Plan(jobs, kept, found.unreadable, tuple(map(str, rebuilt)), marked)


def _left_out(rebuilt: Sequence[Path | str]) -> str:
    """Says which files are no inputs, and how to make them some."""
    return (
        f"{counted(len(rebuilt), 'file')} that {'was' if len(rebuilt) == 1 else 'were'} rebuilt from others "
        f"({first_names(list(map(str, rebuilt)))}); to rebuild such a file or folder again, name it itself"
    )


def _identity(path: Path) -> tuple[int, int]:
    """Returns what is equal for two names of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def run_jobs(
    plan: Plan, start: Callable[[], _T], work: Callable[[_T, Job], float], *, quiet: bool, debug: bool
) -> int:
    """Does every job, reports each on standard error, and goes on after one that failed.

    Args:
        plan: Jobs to do.
        start: Function that makes what all jobs share; called once, and only if there is a job.
        work: Function that does one job with it and returns the length of its audio in seconds.
        quiet: Report failures only.
        debug: Show the traceback of each failure.

    Returns:
        0, or 1 if any job failed or a part of the folder could not be read.
    """
    for problem in plan.unreadable:
        say(f"ear-vae: {problem}")
    if plan.rebuilt:
        _report(f"left out: {_left_out(plan.rebuilt)}", quiet)
    if len(plan.kept) == 1:
        _report(f"{plan.kept[0]}: exists, kept (--force to redo it)", quiet)
    elif plan.kept:
        count = f"{len(plan.kept)} of {len(plan.kept) + len(plan.jobs)} outputs"
        _report(f"{count} exist, kept (--force to redo them): {first_names(plan.kept)}", quiet)
    if not plan.jobs:
        return 1 if plan.unreadable else 0
    shared = start()
    failed = 0
    if plan.marked:
        # Where it cannot be written, neither can the outputs, and their jobs say so.
        with suppress(OSError):
            plan.marked.mkdir(parents=True, exist_ok=True)
            (plan.marked / OUTPUT_MARK).touch()
    for number, job in enumerate(plan.jobs):
        started = time.monotonic()
        try:
            if job.relative:
                os.makedirs(os.path.dirname(job.destination), exist_ok=True)
            seconds = work(shared, job)
        except KeyboardInterrupt:
            if number > failed:
                done = f"{number - failed} of {counted(len(plan.jobs), 'file')}"
                say(f"ear-vae: finished {done}; the same command, without --force, goes on with the rest")
            raise
        # Decoders meet every kind of damage; whatever happens with one file, the others are processed.
        except Exception as error:
            if debug:
                say_traceback(error)
            failed += 1
            say(f"ear-vae: {_failure(job, error)}")
            continue
        elapsed = time.monotonic() - started
        speed = f"{seconds / max(elapsed, 1e-3):.1f}x real time"
        _report(f"{job.destination_name}: {seconds:.1f} s in {elapsed:.1f} s ({speed})", quiet)
    total = len(plan.jobs) + len(plan.kept)
    if failed and total > 1:
        were = "was" if len(plan.kept) == 1 else "were"
        kept = f"; {counted(len(plan.kept), 'output')} existed already and {were} kept" if plan.kept else ""
        say(f"ear-vae: {failed} of {total} files failed{kept}")
    return 1 if failed or plan.unreadable else 0


@contextmanager
def progress(name: str, audio_seconds: float, latent_rate: float, *, shown: bool) -> Iterator[None]:
    """Shows a progress bar for one file on standard error, with its speed in seconds of audio per second.

    Args:
        name: Text before the bar.
        audio_seconds: Seconds of audio that the networks will process, counted once for encoding and once for
            decoding.
        latent_rate: Latent frames per second of the model.
        shown: Whether there is a bar at all.
    """
    with (
        tqdm(
            total=round(audio_seconds, 1),
            desc=name_in_a_line(os.path.basename(name), _LONGEST_IN_BAR),
            disable=not shown,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {rate_noinv_fmt}",
            unit="x real time",
        ) as bar,
        # The last frame may be longer than what is left of the audio.
        observe_tiles(lambda frames, _: bar.update(min(frames / latent_rate, bar.total - bar.n)) and None),
    ):
        yield


def _failure(job: Job, error: BaseException) -> str:
    text = reason(error)
    named = text.startswith((f"{job.source_name}: ", f"{job.destination_name}: "))
    return text if named else f"{job.source_name}: {text}"


def _report(text: str, quiet: bool) -> None:
    if not quiet:
        say(text)
