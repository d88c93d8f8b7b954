"""What a busy or limited CPU leaves of the advantage over the straight path, and which waiting keeps it.

    python benchmarks/busy.py [--seconds 2] [--channels 32] [--load 4] [--quota 1] [--json OUT.json]

OpenMP's threads wait for each other after every operation. While they spin they keep those they wait for from
running, as soon as there are more of them than processors for them. Each row is one way of waiting, set
before torch is loaded. Each column is the time of the straight path, which waits as torch does by default,
over that of the row: idle, and beside `--load` processes for each processor that do nothing but compute. In
each turn all contenders run one after the other, and the ratio is that of the medians over the turns.

`--quota` adds a column in which each contender has that many processors' time, though it sees all of them.
It needs the right to make a control group of the first version under /sys/fs/cgroup/cpu.

"Idle" is as idle as the machine was: the load average before the start is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from inference import DIRECTIONS, OURS, STRAIGHT, Contender

from ear_vae._atomic import atomic_path

# What a contender is, and the environment that it starts in.
CONTENDERS: dict[str, tuple[str, dict[str, str]]] = {
    "straight, torch's default": (STRAIGHT, {}),
    "straight, passive": (STRAIGHT, {"OMP_WAIT_POLICY": "passive"}),
    "ear_vae, torch's default": (OURS, {}),
    "ear_vae, passive": (OURS, {"OMP_WAIT_POLICY": "passive"}),
    "ear_vae, GOMP_SPINCOUNT=1000": (OURS, {"GOMP_SPINCOUNT": "1000"}),
    "ear_vae, GOMP_SPINCOUNT=10000": (OURS, {"GOMP_SPINCOUNT": "10000"}),
}
REFERENCE = "straight, torch's default"
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CONTROL_GROUPS = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 100_000


def start(name: str, arguments: argparse.Namespace) -> Contender:
    """A process of that contender; OpenMP reads its environment when torch is loaded there."""
    implementation, environment = CONTENDERS[name]
    before = {variable: os.environ.pop(variable, None) for variable in _WAITING}
    os.environ.update(environment)
    try:
        return Contender(implementation, arguments, "float32")
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


def spin(parent: int) -> None:
    """Computes for as long as the benchmark lives."""
    while os.getppid() == parent:
        pass


@contextmanager
def load(count: int) -> Iterator[None]:
    """That many processes that compute beside the block."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=spin, args=(os.getpid(),), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        time.sleep(2 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def quota(processors: float, contender: Contender) -> Iterator[None]:
    """Gives a contender's process that many processors' time."""
    group = _CONTROL_GROUPS / f"ear-vae-busy-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(processors * _PERIOD_US)))
        (group / "cgroup.procs").write_text(str(contender.process_id))
        yield
    finally:
        (_CONTROL_GROUPS / "cgroup.procs").write_text(str(contender.process_id))
        group.rmdir()


def ratios(
    contenders: dict[str, Contender], direction: str, arguments: argparse.Namespace, processors: float | None
) -> dict[str, float]:
    """How many times faster than the reference each contender is now."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + arguments.repeats):
        for name, contender in contenders.items():
            if processors is None:
                result = contender.run(direction, arguments.seconds, 1, False)
            else:
                with quota(processors, contender):
                    result = contender.run(direction, arguments.seconds, 1, False)
            if turn:  # the first one is for warming up
                times[name].append(result[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: medians[REFERENCE] / median for name, median in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the clip")
    parser.add_argument("--channels", type=int, default=32, help="width of the network; published: 128")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--load", type=int, default=4, help="computing processes for each processor")
    parser.add_argument("--quota", type=float, help="also with this many processors' time")
    parser.add_argument("--repeats", type=int, default=3, help="turns, after one that is not counted")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.device = "cpu"
    processors = os.cpu_count() or 1
    print(
        f"{platform.processor() or 'CPU'}, {processors} processors, {arguments.threads} threads, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, load average {os.getloadavg()[0]:.1f}"
    )
    busy = f"load {arguments.load} per core"
    situations: list[tuple[str, int, float | None]] = [("idle", 0, None), (busy, arguments.load, None)]
    if arguments.quota is not None:
        situations.append((f"{arguments.quota:g} processors' time", 0, arguments.quota))
    columns = [f"{direction}, {name}" for direction in DIRECTIONS for name, _, _ in situations]
    contenders = {name: start(name, arguments) for name in CONTENDERS}
    found: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for situation, count, limit in situations:
        with load(count * processors):
            for direction in DIRECTIONS:
                for name, ratio in ratios(contenders, direction, arguments, limit).items():
                    found[name][f"{direction}, {situation}"] = ratio
                    print(f"{name}, {direction}, {situation}: {ratio:.2f}", file=sys.stderr, flush=True)
    for contender in contenders.values():
        contender.close()
    print("| times as fast as the straight path | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |")
    if arguments.json:
        rows: list[dict[str, Any]] = [{"contender": name, **row} for name, row in found.items()]
        with atomic_path(arguments.json, overwrite=True) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
