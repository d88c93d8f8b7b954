"""Encoding a data set: the plan, what of it is done already, the rest, and what went wrong."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ear_vae._atomic import temporary_folder
from ear_vae.audio.processes import content_sha256
from ear_vae.encoding.engines import (
    EncodingJob,
    ShardDone,
    encode_here,
    encode_in_processes,
    encode_with_ray,
    usual_workers,
)
from ear_vae.encoding.plan import (
    EncodingPlan,
    EncodingSettings,
    PlannedEntry,
    differing_entries,
    differing_settings,
    settings_of,
    write_plan,
)
from ear_vae.encoding.reading import FILELIST_FILE, PLAN_FILE, RECEIPTS_FOLDER, SILENCE_FILE
from ear_vae.encoding.shards import FileDone, finished_receipt, receipt_path
from ear_vae.encoding.sources import AudioEntry, base_of, estimated_seconds, list_sources
from ear_vae.encoding.writers import WRITERS, npy_bytes, write_to_disk
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.inference.compiling import activation_compiled, pays_beforehand
from ear_vae.limits import finite_number, first_names, shown, whole_number
from ear_vae.vae import EarVAE

FAILURES_FILE = "failures.jsonl"
# Enough to pad any crop that somebody trains on.
_LEAST_SILENCE_FRAMES = 4096

# What is written of a recording, or of a part of it, and what of a shard.
_MADE = re.compile(
    r"(?P<shard>\d{6,}\.tar)|(?P<name>[^.]+)(\.\d{4,})?\.(npy|std\.npy|json|safetensors)", re.DOTALL
)

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class EncodingProgress:
    """How far it is.

    Attributes:
        num_files: Recordings that are done, those of earlier runs included.
        total_files: Recordings of the plan.
        num_bytes: Size of the recordings that are done.
        total_bytes: Size of all of them.
        seconds: Length in seconds of the audio that this run has encoded.
        new_bytes: Size of the recordings that this run has done.
    """

    num_files: int
    total_files: int
    num_bytes: int
    total_bytes: int
    seconds: float
    new_bytes: int


@dataclass(frozen=True)
class EncodedDataset:
    """What an output holds.

    Attributes:
        folder: Its folder.
        num_files: Recordings that were found.
        num_items: Items that were made of them.
        num_frames: Latent frames of all items, without padding.
        seconds: Length in seconds of the audio that could be encoded.
        num_failures: Lines of `failures.jsonl`.
        num_shards: Shards.
        num_reused: Shards that an earlier run had left.
    """

    folder: Path
    num_files: int
    num_items: int
    num_frames: int
    seconds: float
    num_failures: int
    num_shards: int
    num_reused: int


def encode_dataset(
    sources: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    vae: EarVAE,
    *,
    format: Literal["webdataset", "stable-audio", "safetensors"] = "webdataset",
    crop_seconds: float | None = None,
    hop_seconds: float | None = None,
    pad_to: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    files_per_shard: int = 64,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    threads: int | None = None,
    decoders: int | None = None,
    optimize: bool | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
    progress: Callable[[EncodingProgress], None] | None = None,
) -> EncodedDataset:
    """Encodes audio into a data set of latents: means and standard deviations, with what is known of each.

    A plan is written first, then shard after shard, each whole or not at all. Run again after anything, it
    goes on where it stopped, and what comes out is what would have come out without the interruption.

    Args:
        sources: Folders (searched recursively for audio and tars), manifests (`.csv`, `.jsonl`, `.parquet`
            with a column `path`, relative to the manifest) and webdataset tars. Other columns, and a tar's
            `.json` and `.txt`, are carried over as they are.
        output: Folder to write: new, empty, or of an earlier run of the same.
        vae: Model to encode with.
        format: `webdataset` writes tars with the members `npy`, `std.npy` and `json`; `stable-audio` a folder
            that stable-audio-tools and Stable Audio 3 read; `safetensors` a latent file of each item.
        crop_seconds: Length of an item in seconds, rounded to latent frames; whole recordings by default. The
            latents of the recording are cut, so that only its own ends are edges.
        hop_seconds: Time from the start of one item to that of the next; `crop_seconds` by default.
        pad_to: Latent frames to which shorter items are padded with silence, which their `padding_mask` tells
            apart; not for safetensors.
        dtype: Dtype to store.
        files_per_shard: Recordings in a shard, which is what an interruption costs at most, and in a tar.
        engine: `local`, or `ray` for the cluster that Ray is connected to.
        workers: Processes that encode, on CUDA each with the next GPU; by default this one alone does.
        threads: Threads of each of several workers; by default its share of the processors.
        decoders: Processes that decode audio for each worker; with 0 it decodes itself.
        optimize: Whether workers on a CPU compile the activation; by default they do where the plan holds so
            much audio that it pays, or as the plan says that is there. One that cannot compile encodes
            without, to the same values but for rounding. The model itself stays as it is. With True, several
            workers on GPUs call `EarVAE.optimize_for_inference`.
        retry_failed: Encode shards again in which files have failed; such files may have changed meanwhile.
        overwrite: Remove what another run has left in the folder, and start again.
        progress: Function that is called after each recording.

    Returns:
        What the folder holds. Files that could not be encoded are in `failures.jsonl` there, with reasons.

    Raises:
        EarVAEError: There is nothing to encode; a source cannot be listed; the output belongs to another run,
            or to the same with other settings, another model or sources that have changed, which it names; it
            cannot be written; or an argument is out of range.
    """
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    roots, folder = [Path(source) for source in several], Path(output)
    settings = _settings(vae, format, crop_seconds, hop_seconds, pad_to, dtype, files_per_shard)

    def pays(entries: Iterable[AudioEntry]) -> bool:
        return pays_beforehand(vae, estimated_seconds(entries))

    for name, value, lowest in (("workers", workers, 1), ("threads", threads, 1), ("decoders", decoders, 0)):
        if value is not None:
            whole_number(value, name, lowest=lowest)
    if engine not in ("local", "ray"):
        raise EarVAEError(f"engine must be local or ray, got {shown(engine)}")
    if format == "stable-audio" and ".npy" in str(folder.absolute()):
        raise EarVAEError(
            f"{folder}: stable-audio-tools takes .npy anywhere in a path for the extension; choose another "
            "name"
        )
    run = _Run(roots, folder, settings, retry_failed=retry_failed)
    run.prepare(overwrite=overwrite, compiled=pays if optimize is None else optimize)
    run.find_finished()
    if run.pending:
        shared = usual_workers(vae.device, workers, threads, decoders, optimize=bool(optimize))
        here = engine == "local" and len(shared.devices) == 1
        encode = encode_here if here else encode_with_ray if engine == "ray" else encode_in_processes
        try:
            _write_silence(folder, vae, run.settings)
            encode(
                EncodingJob(
                    folder, run.bases, run.pending, vae, shared, lambda done: run.report(done, progress)
                )
            )
        except BaseException:
            # Also of a run that was interrupted: whoever looks for reasons looks there.
            with suppress(OSError):
                run.write_lists()
            raise
    return run.finish()


def _settings(
    vae: EarVAE,
    format: str,
    crop_seconds: float | None,
    hop_seconds: float | None,
    pad_to: int | None,
    dtype: str,
    files_per_shard: int,
) -> EncodingSettings:
    if format not in WRITERS:
        raise EarVAEError(f"format must be one of {', '.join(WRITERS)}, got {shown(format)}")
    if dtype not in ("float16", "float32"):
        raise EarVAEError(f"dtype must be float16 or float32, got {shown(dtype)}")
    if hop_seconds is not None and crop_seconds is None:
        raise EarVAEError("hop_seconds is for crops; give crop_seconds as well")
    if pad_to is not None and format == "safetensors":
        raise EarVAEError("pad_to is for webdataset and stable-audio: a latent file holds no padding")
    crop_frames = _frames(vae, "crop_seconds", crop_seconds)
    if pad_to is not None:
        pad_to = whole_number(pad_to, "pad_to", lowest=1)
        if crop_frames is not None and pad_to < crop_frames:
            raise EarVAEError(
                f"pad_to is {pad_to} frames, less than the {crop_frames} of a crop: items of two lengths "
                f"would come out; of {vae.name} a second is {vae.latent_rate:.2f} frames"
            )
    return EncodingSettings(
        format=format,
        model=vae.name,
        weights_sha256=vae.weights_sha256,
        sample_rate=vae.sample_rate,
        downsampling_ratio=vae.downsampling_ratio,
        latent_dim=vae.latent_dim,
        compute_dtype=str(vae.dtype).removeprefix("torch."),
        compiled=False,  # which is decided when the sources are known
        dtype=dtype,
        crop_frames=crop_frames,
        hop_frames=crop_frames if hop_seconds is None else _frames(vae, "hop_seconds", hop_seconds),
        pad_to=pad_to,
        files_per_shard=whole_number(files_per_shard, "files_per_shard", lowest=1),
    )


def _frames(vae: EarVAE, name: str, seconds: float | None) -> int | None:
    if seconds is None:
        return None
    if not finite_number(seconds) or seconds <= 0:
        raise EarVAEError(f"{name} must be a number above 0, got {shown(seconds)}")
    frames = round(seconds * vae.latent_rate)
    if frames < 1:
        raise EarVAEError(f"{name} is {seconds:g}, less than a latent frame of {1 / vae.latent_rate:.4f} s")
    return frames


@dataclass
class _Run:
    """One call of `encode_dataset`.

    Attributes:
        roots: Its sources.
        folder: Its output.
        settings: How to encode.
        retry_failed: Whether shards with failures are encoded again.
        pending: Numbers of the shards that are to be encoded.
    """

    roots: list[Path]
    folder: Path
    settings: EncodingSettings
    retry_failed: bool
    pending: list[int] = field(default_factory=list)

    @property
    def bases(self) -> list[Path]:
        """Folders that the paths of the plan are relative to."""
        return [base_of(root) for root in self.roots]

    def prepare(self, *, overwrite: bool, compiled: bool | Callable[[Iterable[AudioEntry]], bool]) -> None:
        """Writes the plan, or finds the one that is there to be the same.

        Args:
            overwrite: Remove what another run has left.
            compiled: Whether activations are compiled, or what decides that where no plan is there yet.

        Raises:
            EarVAEError: There is nothing to encode, or the folder belongs to another run.
        """
        path = self.folder / PLAN_FILE
        if self.folder.exists() and not self.folder.is_dir():
            raise EarVAEError(f"{self.folder}: is no folder; name one to write the data set into")
        new_folder = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary_folder(self.folder) as folder:
                new = folder / PLAN_FILE
                listed = list(list_sources(self.roots, self.folder))
                if callable(compiled) and path.exists() and not overwrite:
                    compiled = settings_of(path).compiled
                elif callable(compiled):
                    compiled = compiled(item for item in listed if isinstance(item, AudioEntry))
                self.settings = replace(self.settings, compiled=compiled)
                entries, left_out = write_plan(new, self.settings, listed)
                if not entries:
                    named = ", ".join(map(str, self.roots))
                    raise EarVAEError(
                        f"{named}: holds nothing to encode"
                        + (f"; {left_out} entries cannot be used: {_first_reason(new)}" if left_out else "")
                    )
                if path.exists() and overwrite:
                    self._remove_other_run()
                elif path.exists():
                    self._require_same(path, new)
                elif other := self._other_files():
                    raise EarVAEError(
                        f"{self.folder}: holds {other} and no {PLAN_FILE}, so it is not the output of an "
                        "earlier run; choose a new folder"
                    )
                write_to_disk([new])
                new.replace(path)
        except OSError as error:
            raise EarVAEError(f"{self.folder}: could not be written: {in_one_line(error)}") from error
        except EarVAEError:
            if new_folder:
                with suppress(OSError):
                    self.folder.rmdir()
            raise
        self.plan = EncodingPlan(path)

    def find_finished(self) -> None:
        """Finds the shards that are left to do.

        Raises:
            EarVAEError: The source of one that is finished has changed.
        """
        self._num_files = self._num_bytes = self._new_bytes = 0
        self._seconds = 0.0
        changed: list[str] = []
        for number in range(self.plan.num_shards):
            receipt = finished_receipt(self.folder, number)
            entries = self.plan.shard(number)
            if receipt is not None and not (self.retry_failed and receipt["failures"]):
                changed += self._changed_since(number, entries, receipt["sources"])
                self._num_files += len(entries)
                self._num_bytes += sum(planned.entry.num_bytes or 0 for planned in entries)
            else:
                self.pending.append(number)
        if changed:
            raise self._has_changed([f"changed: {first_names(changed)}"])

    def report(self, done: FileDone | ShardDone, progress: Callable[[EncodingProgress], None] | None) -> None:
        """Counts what has been done, and passes it on."""
        if isinstance(done, ShardDone):
            return
        self._num_files += 1
        self._num_bytes += done.num_bytes
        self._new_bytes += done.num_bytes
        self._seconds += done.seconds
        if progress is not None:
            progress(
                EncodingProgress(
                    self._num_files,
                    self.plan.num_entries,
                    self._num_bytes,
                    self.plan.num_bytes,
                    self._seconds,
                    self._new_bytes,
                )
            )

    def write_lists(self) -> EncodedDataset:
        """Writes what failed, and for stable-audio the list of all items, of the shards that are finished.

        Returns:
            What these shards hold.

        Raises:
            OSError: The lists cannot be written.
        """
        failures = items = frames = finished = 0
        seconds = 0.0
        with temporary_folder(self.folder) as folder:
            new = folder / FAILURES_FILE
            listed = folder / FILELIST_FILE
            with new.open("w", encoding="ascii") as file, listed.open("w", encoding="utf-8") as names:
                for left_out in self.plan.left_out:
                    file.write(_line({"path": left_out.path, "reason": left_out.reason}))
                    failures += 1
                for number in range(self.plan.num_shards):
                    receipt = finished_receipt(self.folder, number)
                    if receipt is None:
                        continue
                    finished += 1
                    items += receipt["items"]
                    frames += receipt["num_frames"]
                    seconds += receipt["seconds"]
                    for failure in receipt["failures"]:
                        file.write(_line({"path": failure["path"], "reason": failure["reason"]}))
                        failures += 1
                    for name in receipt["files"]:
                        # Of the means only: to stable-audio-tools every array is a sample.
                        if name.endswith(".npy") and not name.endswith(".std.npy"):
                            names.write(f"{name}\n")
            write_to_disk([new, listed])
            new.replace(self.folder / FAILURES_FILE)
            if self.settings.format == "stable-audio":
                listed.replace(self.folder / FILELIST_FILE)
        return EncodedDataset(
            folder=self.folder,
            num_files=self.plan.num_entries,
            num_items=items,
            num_frames=frames,
            seconds=seconds,
            num_failures=failures,
            num_shards=finished,
            num_reused=self.plan.num_shards - len(self.pending),
        )

    def finish(self) -> EncodedDataset:
        """Writes the lists, and sums up.

        Raises:
            EarVAEError: They cannot be written.
        """
        try:
            written = self.write_lists()
        except OSError as error:
            raise EarVAEError(f"{self.folder}: could not be written: {in_one_line(error)}") from error
        if missing := self.plan.num_shards - written.num_shards:
            raise EarVAEError(f"{self.folder}: {missing} shards were removed meanwhile; run the same again")
        return written

    def _require_same(self, path: Path, new: Path) -> None:
        """Refuses a plan that differs from the one that is there, except where a failure is put right."""
        if filecmp.cmp(path, new, shallow=False):
            return
        before, after = EncodingPlan(path), EncodingPlan(new)
        if differences := differing_settings(before.settings, after.settings):
            raise EarVAEError(
                f"{self.folder}: was begun with other settings: {'; '.join(differences)}; choose another "
                "folder, go on with those settings, or start again",
                argument="overwrite",
            )
        differences, resized = differing_entries(before, after)
        same_otherwise = before.num_entries == after.num_entries and before.left_out == after.left_out
        failed = self._failed_keys(before)
        if (
            same_otherwise
            and resized
            and resized <= failed
            and len(resized) == _count_differing(before, after)
        ):
            if self.retry_failed:
                return
            raise EarVAEError(
                f"{self.folder}: files that had failed are others now: {'; '.join(differences)}; encode "
                "their shards again",
                argument="retry_failed",
            )
        raise self._has_changed(differences or ["what is left out of them"])

    def _has_changed(self, differences: list[str]) -> EarVAEError:
        return EarVAEError(
            f"{self.folder}: its sources have changed since it was begun: {'; '.join(differences)}; choose "
            "another folder, or start again",
            argument="overwrite",
        )

    def _failed_keys(self, plan: EncodingPlan) -> set[str]:
        receipts = (finished_receipt(self.folder, number) for number in range(plan.num_shards))
        return {failure["key"] for receipt in receipts if receipt for failure in receipt["failures"]}

    def _changed_since(
        self, number: int, entries: Sequence[PlannedEntry], hashes: dict[str, str | None]
    ) -> list[str]:
        """Names the recordings of a finished shard whose content is another than what was encoded.

        Only files that were written or replaced after the receipt are read again; those of another size are
        not in the plan any more.
        """
        finished = receipt_path(self.folder, number).stat().st_mtime_ns
        changed = []
        for planned in entries:
            location = planned.entry.location(self.bases)
            try:
                status = os.stat(location.path)
            except OSError:
                continue
            touched = max(status.st_mtime_ns, status.st_ctime_ns)
            if touched >= finished and content_sha256(location) != hashes.get(planned.key):
                changed.append(planned.entry.path)
        return changed

    def _other_files(self) -> str:
        """Names something in the folder that no unfinished run leaves."""
        names = sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        return names[0] if names else ""

    def _remove_other_run(self) -> None:
        """Removes what the run of the plan that is there has written, and nothing else."""
        path = self.folder / PLAN_FILE
        names: set[str] = set()
        with suppress(EarVAEError):  # a damaged plan
            names = EncodingPlan(path).names()
        # Also of shards that were in place before their receipt.
        for file in [file for file in self.folder.rglob("*") if file.is_file()]:
            made = _MADE.fullmatch(file.relative_to(self.folder).as_posix())
            if made and (made["shard"] or made["name"] in names):
                file.unlink()
                _remove_empty_folders(file.parent, self.folder)
        shutil.rmtree(self.folder / RECEIPTS_FOLDER, ignore_errors=True)
        for name in (PLAN_FILE, FAILURES_FILE, FILELIST_FILE, SILENCE_FILE):
            (self.folder / name).unlink(missing_ok=True)


def _remove_empty_folders(folder: Path, top: Path) -> None:
    while folder != top and top in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _count_differing(before: EncodingPlan, after: EncodingPlan) -> int:
    return sum(
        one != other
        for number in range(before.num_shards)
        for one, other in zip(before.shard(number), after.shard(number), strict=True)
    )


def _first_reason(plan: Path) -> str:
    left_out = EncodingPlan(plan).left_out[0]
    return f"{left_out.path}: {left_out.reason}"


def _write_silence(folder: Path, vae: EarVAE, settings: EncodingSettings) -> None:
    """Writes latents of silence to pad with, [1, D, M]."""
    num_frames = max(_LEAST_SILENCE_FRAMES, settings.pad_to or 0)
    # The same from every run, whichever of them can compile.
    with activation_compiled(vae, False):
        latents = vae.silence(num_frames).to("cpu", getattr(torch, settings.dtype))
    try:
        with temporary_folder(folder) as temporary:
            path = temporary / SILENCE_FILE
            path.write_bytes(npy_bytes(latents[None]))
            write_to_disk([path])
            path.replace(folder / SILENCE_FILE)
    except OSError as error:
        raise EarVAEError(f"{folder}: could not be written: {in_one_line(error)}") from error


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
