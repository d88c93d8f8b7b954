"""Which file becomes which, and going through them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ear_vae.errors import EarVAEError

STREAM = "-"


@dataclass(frozen=True)
class Job:
    """One input and its output; a path, or `-` for a standard stream."""

    source: str
    destination: str


@dataclass(frozen=True)
class Plan:
    """What to do: jobs, and the outputs that exist and are kept."""

    jobs: tuple[Job, ...]
    kept: tuple[str, ...] = ()


def plan(
    source: str,
    destination: str,
    *,
    find: Callable[[Path], Sequence[Path]],
    extension: str | None,
    overwrite: bool,
) -> Plan:
    """Pairs inputs with outputs before any work is done.

    Args:
        source: A file, a folder or `-`.
        destination: A file for a file, a folder for a folder, or `-`.
        find: Lists the inputs of a folder.
        extension: Of the outputs in a folder, without the dot.
        overwrite: Redo outputs that exist.

    Raises:
        EarVAEError: A folder for a file or the reverse, nothing to do in a folder, or two inputs that would
            have the same output.
    """
    if source != STREAM and not Path(source).exists():
        raise EarVAEError(f"{source}: no such file or folder")
    if source == STREAM or destination == STREAM or not Path(source).is_dir():
        if destination != STREAM and Path(destination).is_dir():
            raise EarVAEError(f"{destination}: is a folder; give a file for the output of one file")
        return Plan((Job(source, destination),))
    source_folder, folder = Path(source), Path(destination)
    if folder.exists() and not folder.is_dir():
        raise EarVAEError(f"{destination}: is a file; give a folder for the output of a folder")
    # An output folder inside the input folder holds no inputs.
    inputs = [path for path in find(source_folder) if not path.resolve().is_relative_to(folder.resolve())]
    if folder.resolve() == source_folder.resolve():
        inputs = list(find(source_folder))
    if not inputs:
        raise EarVAEError(f"{source}: holds no files of a kind that this command reads")
    outputs: dict[Path, Path] = {}
    for path in inputs:
        output = (folder / path.relative_to(source_folder)).with_suffix(f".{extension}")
        if output in outputs:
            raise EarVAEError(f"{outputs[output]} and {path} would both become {output}; rename one of them")
        if output.resolve() == path.resolve():
            raise EarVAEError(f"{path}: would be replaced by its own output; choose another folder")
        outputs[output] = path
    kept = tuple(str(output) for output in outputs if output.exists() and not overwrite)
    jobs = tuple(Job(str(path), str(output)) for output, path in outputs.items() if str(output) not in kept)
    return Plan(jobs, kept)


def run(plan: Plan, work: Callable[[Job], float], *, quiet: bool, debug: bool) -> int:
    """Does every job, reports each on standard error, and goes on after one that failed.

    Args:
        plan: What to do.
        work: Does one job and returns the seconds of audio in it.
        quiet: Report failures only.
        debug: Let exceptions through with their traceback.

    Returns:
        0, or 1 if any job failed.
    """
    for output in plan.kept:
        _report(f"{output}: exists, kept (--force to redo it)", quiet)
    failed = 0
    for job in plan.jobs:
        started = time.monotonic()
        try:
            if job.destination != STREAM and len(plan.jobs) + len(plan.kept) > 1:
                os.makedirs(os.path.dirname(job.destination) or ".", exist_ok=True)
            seconds = work(job)
        except (EarVAEError, OSError, MemoryError, RuntimeError) as error:
            if debug:
                raise
            failed += 1
            _report(f"ear-vae: {_failure(job.source, error)}", quiet=False)
            continue
        elapsed = time.monotonic() - started
        speed = f"{seconds / elapsed:.1f}x real time"
        _report(f"{job.destination}: {seconds:.1f} s in {elapsed:.1f} s ({speed})", quiet)
    if failed and len(plan.jobs) > 1:
        _report(f"ear-vae: {failed} of {len(plan.jobs)} files failed", quiet=False)
    return 1 if failed else 0


@contextmanager
def progress(name: str, audio_seconds: float, latent_rate: float, *, quiet: bool) -> Iterator[None]:
    """A bar over one file on a terminal, its rate in seconds of audio per second.

    Args:
        name: Shown before the bar.
        audio_seconds: What the networks will go through, counted once for each direction.
        latent_rate: Of the model.
        quiet: Show none.
    """
    from tqdm import tqdm

    from ear_vae.tiling import observe_tiles

    with (
        tqdm(
            total=round(audio_seconds, 1),
            desc=os.path.basename(name),
            disable=quiet or not sys.stderr.isatty(),
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {rate_noinv_fmt}",
            unit="x real time",
        ) as bar,
        observe_tiles(lambda frames: bar.update(frames / latent_rate) and None),
    ):
        yield


def _failure(source: str, error: BaseException) -> str:
    """One line that names the file."""
    if isinstance(error, MemoryError):
        return f"{source}: not enough memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines) if isinstance(error, EarVAEError) else lines[0]
    return text if text.startswith(source) else f"{source}: {text}"


def _report(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)  # noqa: T201
