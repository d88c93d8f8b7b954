"""Starting processes that work for this one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def current_folder_off_the_path() -> Iterator[None]:
    """Keeps processes that are started in the block from importing what lies in the current folder.

    A spawned process looks there first for the modules that it starts with: a `pickle.py` among somebody's
    songs would run. Python heeds this from 3.11 on.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def prepare_process(threads: int) -> None:
    """Prepares a process that another one has started.

    Args:
        threads: Number of torch's threads.
    """
    # Ctrl-C and closing the terminal reach every process in it; the first one decides.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(threads)
