"""The command `ear-vae encode-dataset`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from ear_vae.cli.models import load_model
from ear_vae.cli.terminal import is_watched, say
from ear_vae.encoding import EncodedDataset, EncodingProgress, encode_dataset
from ear_vae.encoding.encode import FAILURES_FILE
from ear_vae.limits import counted, name_in_a_line

# So that ten thousand unreadable files do not hide the last line.
_MOST_REPORTED = 10


def run_encode_dataset(options: argparse.Namespace) -> int:
    """Encodes audio into a data set of latents."""
    if options.hop_seconds is not None and options.crop_seconds is None:
        options.refuse("--hop-seconds is for --crop; without it nothing is cropped")
    if options.pad_to is not None and options.format == "safetensors":
        options.refuse("--pad-to is for webdataset and stable-audio; a latent file holds no padding")
    vae = load_model(options)
    started = time.monotonic()
    shown = options.progress or (is_watched() and not options.quiet)
    with _goes_on(), _bar(shown=shown) as (progress, encoded_seconds):
        result = encode_dataset(
            options.sources,
            options.output,
            vae,
            format=options.format,
            crop_seconds=options.crop_seconds,
            hop_seconds=options.hop_seconds,
            pad_to=options.pad_to,
            dtype=options.stored_dtype,
            files_per_shard=options.files_per_shard,
            engine=options.engine,
            workers=options.workers or (torch.cuda.device_count() if options.device == "cuda" else None),
            threads=options.threads,
            decoders=options.decoders,
            optimize=options.optimize,
            retry_failed=options.retry_failed,
            overwrite=options.force,
            progress=progress,
        )
    if result.num_failures:
        _report_failures(result)
    if not options.quiet:
        elapsed = time.monotonic() - started
        say(_summary(result, encoded_seconds(), elapsed))
    return 1 if result.num_failures else 0


@contextmanager
def _goes_on() -> Iterator[None]:
    """Says how to go on after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        say("ear-vae: finished shards are kept; the same command, without --force, goes on from there")
        raise


def _summary(result: EncodedDataset, encoded_seconds: float, elapsed: float) -> str:
    what = (
        f"{result.folder}: {counted(result.num_items, 'item')} of {counted(result.num_files, 'file')}, "
        f"{_duration(result.seconds)} of audio, {counted(result.num_shards, 'shard')}"
    )
    if result.num_reused == result.num_shards:
        return f"{what}; all was there already"
    kept = f", {result.num_reused} of them from before" if result.num_reused else ""
    speed = f"{encoded_seconds / max(elapsed, 1e-3):.1f}x real time"
    return f"{what}{kept}; {_duration(encoded_seconds)} encoded in {_duration(elapsed)} ({speed})"


def _report_failures(result: EncodedDataset) -> None:
    path = result.folder / FAILURES_FILE
    with path.open(encoding="ascii") as file:
        for _, line in zip(range(_MOST_REPORTED), file, strict=False):
            failure = json.loads(line)
            say(f"ear-vae: {name_in_a_line(failure['path'], 200)}: {failure['reason']}")
    more = result.num_failures - _MOST_REPORTED
    rest = f"{more} more in {path}" if more > 0 else f"listed in {path}"
    say(f"ear-vae: {result.num_failures} could not be encoded, {rest}; --retry-failed tries files again")


@contextmanager
def _bar(*, shown: bool) -> Iterator[tuple[Callable[[EncodingProgress], None], Callable[[], float]]]:
    """Gives a function that shows how far it is, and one that says how many seconds were encoded so far."""
    started = time.monotonic()
    seconds = 0.0
    # By bytes: how long a file is, nobody knows before it is opened.
    with tqdm(
        total=1,
        disable=not shown,
        leave=False,
        bar_format="{percentage:3.0f}%|{bar}| {desc}",
    ) as bar:

        def show(progress: EncodingProgress) -> None:
            nonlocal seconds
            seconds = progress.seconds
            elapsed = max(time.monotonic() - started, 1e-3)
            left = (progress.total_bytes - progress.num_bytes) * elapsed / max(progress.new_bytes, 1)
            bar.total = max(progress.total_bytes, 1)
            bar.n = progress.num_bytes
            bar.set_description_str(
                f"{progress.num_files}/{progress.total_files} files, {_duration(seconds)} encoded, "
                f"{seconds / elapsed:.1f}x real time, {_duration(left)} left",
                refresh=False,
            )
            bar.update(0)
            if progress.num_files == progress.total_files:
                bar.refresh()  # which so soon after the last time it would not do by itself

        yield show, lambda: seconds


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{seconds / 3600:.1f} h"
