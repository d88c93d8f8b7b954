"""Comparing many pairs: in parallel, resumable, and regardless of single failures."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ear_vae import __version__
from ear_vae._atomic import write_all
from ear_vae.audio.processes import current_folder_off_the_path, prepare_process, processors
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.evaluation.files import Row, compare_files, file_identity, is_row
from ear_vae.evaluation.pairs import Pair
from ear_vae.evaluation.systems.base import System
from ear_vae.limits import parse_json

# Below this many pairs for each process, starting processes takes longer than they save.
_PAIRS_PER_PROCESS = 4


@dataclass(frozen=True)
class Task:
    """One comparison to make.

    Attributes:
        pair: Files to compare.
        system_name: Name of the system in tables.
        system: System that makes the estimate; None where the pair has one.
        align: Take out a delay, see `compare_files`.
    """

    pair: Pair
    system_name: str
    system: System | None = None
    align: bool = False

    @property
    def key(self) -> str:
        """Equal for tasks with the same result."""
        identity = self.system.identity if self.system else None
        files = file_identity(self.pair.target), file_identity(self.pair.estimate)
        return json.dumps([__version__, self.pair.name, self.system_name, identity, *files, self.align])


@dataclass
class Results:
    """Results of tasks, in their order.

    Attributes:
        rows: Rows of `compare_files`, with `system` added.
        failures: `name`, `system` and `error` of each task that failed.
        reused: Number of rows that an earlier run had left.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    reused: int = 0


def run_tasks(
    tasks: Sequence[Task],
    *,
    partial: Path | None = None,
    jobs: int | None = None,
    finished: Callable[[Task, Row | str], None] = lambda task, result: None,
    debug: bool = False,
) -> Results:
    """Makes all comparisons.

    Args:
        tasks: Comparisons; those with a system are made here one after the other, those of two files in
            several processes.
        partial: File of JSON lines to which every finished row is added at once, and from which rows of an
            earlier run are taken as long as their files, systems and options have not changed.
        jobs: Number of processes; by default one for each processor, and fewer for few pairs. With 1 all
            is done in this process.
        finished: Function that is called with each task and its row, or the reason for its failure.
        debug: Raise a failure as it is instead of recording it and continuing; only in this process.

    Raises:
        EarVAEError: `partial` cannot be written.
    """
    rows: dict[int, Row] = {}
    errors: dict[int, str] = {}
    keys = {index: key for index, task in enumerate(tasks) if (key := _key_or_none(task)) is not None}
    known = _read_partial(partial) if partial else {}
    for index, key in keys.items():
        if key in known:
            rows[index] = known[key]
            finished(tasks[index], known[key])
    reused = len(rows)
    waiting = [index for index in range(len(tasks)) if index not in rows]
    with _appending(partial) as keep:
        for index, result in _results(tasks, waiting, jobs, debug):
            if isinstance(result, str):
                errors[index] = result
            else:
                rows[index] = result
                if index in keys:
                    keep({"key": keys[index], "row": result})
            finished(tasks[index], result)
    failures = [
        {"name": tasks[index].pair.name, "system": tasks[index].system_name, "error": errors[index]}
        for index in sorted(errors)
    ]
    return Results([rows[index] for index in sorted(rows)], failures, reused)


def _results(
    tasks: Sequence[Task], waiting: list[int], jobs: int | None, debug: bool
) -> Iterator[tuple[int, Row | str]]:
    here = [index for index in waiting if tasks[index].system is not None]
    elsewhere = [index for index in waiting if tasks[index].system is None]
    processes = min(jobs or max(1, min(processors(), len(elsewhere) // _PAIRS_PER_PROCESS)), len(elsewhere))
    if processes > 1:
        yield from _in_processes(tasks, elsewhere, processes)
    else:
        here = elsewhere + here
    for index in here:
        yield index, _attempt(tasks[index], debug)


def _in_processes(
    tasks: Sequence[Task], indices: list[int], processes: int
) -> Iterator[tuple[int, Row | str]]:
    threads = max(1, processors() // processes)
    with current_folder_off_the_path():
        pool = ProcessPoolExecutor(
            processes,
            # A fork of a process that has used torch can hang.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=prepare_process,
            initargs=(threads,),
        )
        # Starts the processes.
        futures: dict[Future[Row | str], int] = {
            pool.submit(_attempt, tasks[index], False): index for index in indices
        }
    try:
        for future in as_completed(futures):
            error = future.exception()
            result = future.result() if error is None else f"its process ended: {in_one_line(error)}"
            yield futures[future], result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(task: Task, debug: bool) -> Row | str:
    """Returns the row, or in one line why there is none."""
    try:
        row = compare_files(task.pair, align=task.align, system=task.system)
    # Whatever happens with one file, the others are compared.
    except Exception as error:
        if debug:
            raise
        return in_one_line(error)
    return {"name": row.pop("name"), "system": task.system_name, **row}


def _key_or_none(task: Task) -> str | None:
    try:
        return task.key
    except OSError:  # the comparison will say what is wrong with the file
        return None


def _read_partial(partial: Path) -> dict[str, Row]:
    """Reads rows by key; a line that is damaged, or half-written by an interrupted run, is ignored."""
    known: dict[str, Row] = {}
    if not partial.is_file():
        return known
    for line in partial.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = _parsed(line)
        if isinstance(entry, dict) and isinstance(entry.get("key"), str) and is_row(entry.get("row")):
            known[entry["key"]] = entry["row"]
    return known


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


@contextmanager
def _appending(partial: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if partial is None:
        yield lambda entry: None
        return
    try:
        # Unbuffered, so that nothing is left to fail when it is closed.
        file = partial.open("ab", buffering=0)
    except OSError as error:
        raise EarVAEError(f"{partial}: cannot be written: {error.strerror}") from error
    with file:
        if partial.stat().st_size:
            file.write(b"\n")  # ends the line of an interrupted run

        def keep(entry: dict[str, Any]) -> None:
            try:
                write_all(file, f"{json.dumps(entry)}\n".encode())
            except OSError as error:
                raise EarVAEError(f"{partial}: could not be written: {error.strerror}") from error

        yield keep
