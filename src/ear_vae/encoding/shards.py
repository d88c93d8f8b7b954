"""Encoding one shard: a function of its number and the plan alone, whose files appear whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_vae._atomic import temporary_folder
from ear_vae.audio.processes import (
    AudioBlock,
    AudioEnd,
    AudioFailure,
    AudioProcesses,
    AudioRestart,
)
from ear_vae.encoding.plan import EncodingPlan, EncodingSettings, PlannedEntry
from ear_vae.encoding.reading import OWN_FACTS, RECEIPTS_FOLDER
from ear_vae.encoding.statistics import LatentStatistics
from ear_vae.encoding.writers import WRITERS, EncodedItem, write_to_disk
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.inference.compiling import activation_compiled
from ear_vae.inference.tiling import encoder_reach
from ear_vae.inference.windows import BatchEncoder
from ear_vae.limits import parse_json
from ear_vae.posterior import Posterior
from ear_vae.vae import EarVAE


@dataclass(frozen=True)
class FileDone:
    """What is reported when a file has been encoded, or has failed.

    Attributes:
        num_bytes: Its size.
        seconds: Length of its audio in seconds; 0 where it failed.
    """

    num_bytes: int
    seconds: float


class ShardEncoder:
    """Encodes shards of a plan with one model, which meanwhile runs compiled, or not, as the plan says.

    Args:
        output: Folder of the output.
        plan: Its plan.
        bases: Folders that the paths of the plan's sources are relative to.
        vae: Model to encode with.
        decoders: Number of processes that decode audio; with 0 it is decoded in this one.
    """

    def __init__(
        self, output: Path, plan: EncodingPlan, bases: Sequence[Path], vae: EarVAE, *, decoders: int
    ) -> None:
        self._output, self._plan, self._bases, self._vae = output, plan, bases, vae
        self._audio = AudioProcesses(decoders, vae.sample_rate)
        self._dtype: torch.dtype = getattr(torch, plan.settings.dtype)
        with activation_compiled(vae, False):
            silence = _silence(vae)
        self._prepared = ExitStack()
        self._prepared.enter_context(activation_compiled(vae, plan.settings.compiled))
        self._silence = Posterior(silence.mean.to(self._dtype), silence.std.to(self._dtype))

    def close(self) -> None:
        """Ends the processes that decode, and leaves the model as it was."""
        self._audio.close()
        self._prepared.close()

    def encode(self, number: int, report: Callable[[FileDone], None]) -> None:
        """Encodes a shard, and puts it and then its receipt in place.

        Args:
            number: Number of the shard.
            report: Function that is called with each file.

        Raises:
            EarVAEError: It cannot be written.
        """
        self._encoder = BatchEncoder(self._vae, self._vae.encode)
        try:
            with temporary_folder(self._output) as folder:
                self._encode(number, folder, report)
        except OSError as error:
            raise EarVAEError(
                f"{self._output}: could not be written: {in_one_line(error)}; when that is put right, run "
                "the same again, it goes on where it stopped"
            ) from error

    def _encode(self, number: int, folder: Path, report: Callable[[FileDone], None]) -> None:
        settings = self._plan.settings
        statistics = LatentStatistics(settings.latent_dim)
        writer = WRITERS[settings.format](folder, number, settings)
        entries = self._plan.shard(number)
        failures: list[dict[str, str]] = []
        hashes: dict[str, str | None] = {}
        items = frames = 0
        seconds = 0.0
        # Closed whatever happens: on Windows a file that is open cannot be removed.
        with closing(writer):
            for planned, result in self._results(entries):
                hashes[planned.key] = result.sha256
                if isinstance(result, AudioFailure):
                    failures.append({"key": planned.key, "path": planned.entry.path, "reason": result.reason})
                    report(FileDone(planned.entry.num_bytes or 0, 0.0))
                    continue
                for item in _items(planned, result, settings, self._silence):
                    writer.add(item)
                    statistics.update(item.mean[:, : item.num_frames])
                    items, frames = items + 1, frames + item.num_frames
                seconds += result.seconds
                report(FileDone(planned.entry.num_bytes or 0, result.seconds))
            receipt = {
                "shard": number,
                "items": items,
                "num_frames": frames,
                "seconds": seconds,
                "files": writer.finish(self._output),
                "sources": hashes,
                "failures": failures,
                "statistics": statistics.to_dict(),
            }
        path = folder / "receipt.json"
        path.write_text(json.dumps(receipt) + "\n", encoding="ascii")
        write_to_disk([path])
        destination = receipt_path(self._output, number)
        destination.parent.mkdir(exist_ok=True)
        path.replace(destination)

    def _results(
        self, entries: Sequence[PlannedEntry]
    ) -> Iterator[tuple[PlannedEntry, _Encoded | AudioFailure]]:
        """Yields what became of each recording, in their order."""
        results: dict[int, _Encoded | AudioFailure] = {}
        ends: dict[int, AudioEnd] = {}
        following = 0
        locations = [planned.entry.location(self._bases) for planned in entries]
        for message in self._audio.read(locations):
            self._take(message, results, ends)
            self._collect(results, ends)
            while following in results:
                yield entries[following], results.pop(following)
                following += 1
        self._encoder.flush()
        self._collect(results, ends)
        for index in range(following, len(entries)):
            yield entries[index], results[index]

    def _take(
        self,
        message: AudioBlock | AudioEnd | AudioFailure | AudioRestart,
        results: dict[int, _Encoded | AudioFailure],
        ends: dict[int, AudioEnd],
    ) -> None:
        index = message.index
        if isinstance(message, AudioBlock):
            self._encoder.push(index, message.audio)
        elif isinstance(message, AudioEnd):
            ends[index] = message
            self._encoder.finish(index)
        else:
            self._encoder.drop(index)
            if isinstance(message, AudioFailure):
                results[index] = message

    def _collect(self, results: dict[int, _Encoded | AudioFailure], ends: dict[int, AudioEnd]) -> None:
        for index, posterior in self._encoder.done():
            assert isinstance(index, int)
            end = ends.pop(index)
            mean, std = posterior.mean.to(self._dtype), posterior.std.to(self._dtype)
            if bool(mean.isfinite().all() and std.isfinite().all()):
                results[index] = _Encoded(mean, std, end)
            else:
                reason = f"its latents are not finite in {self._plan.settings.dtype}"
                if bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
                    reason += "; store them in float32"
                results[index] = AudioFailure(index, reason, end.sha256)


@dataclass(frozen=True)
class _Encoded:
    """A recording as a whole: its latents [D, N], and what is known about its file."""

    mean: Tensor
    std: Tensor
    end: AudioEnd

    @property
    def seconds(self) -> float:
        return self.end.num_samples / self.end.info.sample_rate

    @property
    def sha256(self) -> str:
        return self.end.sha256


def receipt_path(output: Path, number: int) -> Path:
    """Where the receipt of a shard lies."""
    return output / RECEIPTS_FOLDER / f"{number:06d}.json"


def finished_receipt(output: Path, number: int) -> dict[str, Any] | None:
    """Reads the receipt of a shard; None where it is not finished, or its files are not there any more."""
    try:
        receipt = parse_json(receipt_path(output, number).read_bytes())
        for name, facts in receipt["files"].items():
            if (output / name).stat().st_size != facts["bytes"]:
                return None
        return dict(receipt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _items(
    planned: PlannedEntry, encoded: _Encoded, settings: EncodingSettings, silence: Posterior
) -> Iterator[EncodedItem]:
    """Cuts a recording into items."""
    num_frames = encoded.mean.shape[1]
    for number, start in enumerate(crop_starts(num_frames, settings.crop_frames, settings.hop_frames)):
        cropped = settings.crop_frames is not None
        frames = slice(start, start + settings.crop_frames if settings.crop_frames else num_frames)
        mean, std = encoded.mean[:, frames], encoded.std[:, frames]
        key = f"{planned.key}_{number:04d}" if cropped else planned.key
        values = _values(key, planned, encoded.end, settings, start, mean.shape[1])
        yield EncodedItem(
            key=key,
            # The only dot, so that it is nobody else's name.
            name=f"{planned.name}.{number:04d}" if cropped else planned.name,
            mean=_padded(mean, silence.mean, settings.pad_to),
            std=_padded(std, silence.std, settings.pad_to),
            values=values,
        )


def crop_starts(num_frames: int, crop_frames: int | None, hop_frames: int | None) -> Iterator[int]:
    """Yields the first frames of the items of a recording: up to one that reaches its end.

    Args:
        num_frames: Frames of the recording.
        crop_frames: Frames of an item; None for the whole.
        hop_frames: Frames from one to the next.
    """
    start = 0
    yield start
    if crop_frames is None or hop_frames is None:
        return
    while start + crop_frames < num_frames and start + hop_frames < num_frames:
        start += hop_frames
        yield start


def _values(
    key: str,
    planned: PlannedEntry,
    end: AudioEnd,
    settings: EncodingSettings,
    start: int,
    num_frames: int,
) -> dict[str, Any]:
    """Returns what is said of an item in JSON: in the words of stable-audio-tools, and in ours."""
    rate, ratio = settings.sample_rate, settings.downsampling_ratio
    source_rate = end.info.sample_rate
    whole = -(-end.num_samples * rate // source_rate)
    start_sample = start * ratio
    num_samples = min(whole - start_sample, num_frames * ratio)
    padding = max(0, (settings.pad_to or 0) - num_frames)
    values: dict[str, Any] = {
        "path": planned.entry.path,
        "relpath": planned.entry.path,
        "timestamps": [start_sample / rate, (start_sample + num_samples) / rate],
        "seconds_start": start_sample // rate,
        "seconds_total": math.ceil(end.num_samples / source_rate),
        "sample_rate": rate,
        "padding_mask": [1] * num_frames + [0] * padding,
    }
    own: dict[str, Any] = {
        "key": key,
        "model": settings.model,
        "weights_sha256": settings.weights_sha256,
        "latent_dim": settings.latent_dim,
        "downsampling_ratio": ratio,
        "dtype": settings.dtype,
        "num_frames": num_frames,
        "num_samples": num_samples,
        "start_sample": start_sample,
        "source_sample_rate": source_rate,
        "source_num_samples": end.num_samples,
        "source_channels": end.info.channels,
        "source_sha256": end.sha256,
    }
    # A column of the user's that is called like one of ours is kept where nobody takes it for ours.
    taken = {*values, OWN_FACTS}
    columns = planned.entry.columns
    if shadowed := {name: value for name, value in columns.items() if name in taken}:
        own["columns"] = shadowed
    return {**columns, **values, OWN_FACTS: own}


def _padded(latents: Tensor, silence: Tensor, num_frames: int | None) -> Tensor:
    missing = (num_frames or 0) - latents.shape[1]
    return latents if missing <= 0 else torch.cat([latents, silence.expand(-1, missing)], dim=1)


def _silence(vae: EarVAE) -> Posterior:
    """The latent of silence that no edge of the audio is near, [D, 1]."""
    ratio = vae.downsampling_ratio
    before, after = (-(-reach // ratio) for reach in encoder_reach(vae.encoder, ratio))
    with torch.inference_mode():
        posterior = vae.encode(torch.zeros(vae.audio_channels, (before + 1 + after) * ratio))
    return Posterior(*(tensor[:, before : before + 1] for tensor in (posterior.mean, posterior.std)))
