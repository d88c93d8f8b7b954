"""What each command of `ear-vae` does with its options; `cli` says which options there are."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ear_vae import _terminal
from ear_vae._formats import WRITTEN_FORMATS
from ear_vae._walk import Found, find_files
from ear_vae.batch import STREAM, Job, one_line, plan, progress, run
from ear_vae.errors import EarVAEError

if TYPE_CHECKING:
    import torch

    from ear_vae.evaluation.baselines import System
    from ear_vae.vae import EarVAE

AUDIO_FORMATS = tuple(WRITTEN_FORMATS)
LATENT_EXTENSION = "safetensors"
OFFICIAL_EXTENSION = ".pyt"
_LONGEST_FACT = 120


def reconstruct(options: argparse.Namespace) -> int:
    """Audio to the audio that the model makes of it."""
    from ear_vae.audio import stream_audio

    def work(vae: EarVAE, job: Job) -> float:
        with stream_audio(_source(job)) as (info, blocks):
            seconds = info.num_samples / info.sample_rate
            with _at_work(options, job, 2 * seconds, vae):
                counted = _Counted(blocks)
                # Latents are a thousandth of the audio: they are held, it is not.
                latents = [posterior.mean for posterior in vae.encode_stream(counted, info.sample_rate)]
                num_samples = -(-counted.num_samples * vae.sample_rate // info.sample_rate)
                _decode_to_file(
                    vae,
                    latents,
                    job,
                    options,
                    num_samples=num_samples,
                    channels=info.channels,
                    sample_rate=info.sample_rate,
                    source_num_samples=counted.num_samples,
                )
        return counted.num_samples / info.sample_rate

    return _each(options, work, find=_find_audio_files, extension=options.format or "wav")


def encode(options: argparse.Namespace) -> int:
    """Audio to latent files."""
    if options.seed is not None and not options.sample:
        options.refuse("--seed is for --sample; without it nothing is drawn")
    import torch

    from ear_vae.audio import stream_audio
    from ear_vae.latents import Latents, save_latents
    from ear_vae.posterior import Posterior

    weights_sha256 = _fingerprints()

    def work(vae: EarVAE, job: Job) -> float:
        with stream_audio(_source(job)) as (info, blocks):
            counted = _Counted(blocks)
            means, stds = [], []
            with _at_work(options, job, info.num_samples / info.sample_rate, vae):
                for part in vae.encode_stream(counted, info.sample_rate):
                    means.append(part.mean)
                    if options.std or options.sample:
                        stds.append(part.std)
        num_samples, sample_rate = counted.num_samples, info.sample_rate
        mean = torch.cat(means, dim=-1)
        std = torch.cat(stds, dim=-1) if stds else None
        means, stds = [], []
        if options.sample:
            assert std is not None
            mean = Posterior(mean, std).sample(_generator(options.seed, job))
        latents = Latents(
            mean=mean,
            std=std if options.std else None,
            sample_rate=vae.sample_rate,
            downsampling_ratio=vae.downsampling_ratio,
            num_samples=-(-num_samples * vae.sample_rate // sample_rate),
            audio_channels=info.channels,
            source_sample_rate=sample_rate,
            source_num_samples=num_samples,
            model_name=vae.name,
            weights_sha256=weights_sha256(vae),
            sampled=options.sample,
        )
        if job.destination == STREAM:
            save_latents(sys.stdout.buffer, latents)
            _flush()
        else:
            save_latents(job.destination, latents, overwrite=options.force)
        return num_samples / sample_rate

    return _each(options, work, find=_find_audio_files, extension=LATENT_EXTENSION)


def decode(options: argparse.Namespace) -> int:
    """Latent files to audio."""
    from ear_vae.latents import load_latents

    weights_sha256 = _fingerprints()

    def work(vae: EarVAE, job: Job) -> float:
        latents = load_latents(_source(job))
        maker = _terminal.name(latents.model_name)
        facts = (latents.sample_rate, latents.downsampling_ratio, latents.mean.shape[0])
        if facts != (vae.sample_rate, vae.downsampling_ratio, vae.latent_dim):
            raise EarVAEError(
                f"{job.source_name}: made by {maker} at {facts[0]} Hz with {facts[2]} channels "
                f"every {facts[1]} samples, which {vae.name} cannot decode; choose its model with --model"
            )
        if latents.weights_sha256 != weights_sha256(vae) and not options.force:
            raise EarVAEError(
                f"{job.source_name}: made by {maker} (weights {latents.weights_sha256[:12]}), "
                f"not by {vae.name} ({weights_sha256(vae)[:12]}); choose its model with --model, or --force"
            )
        with _at_work(options, job, latents.duration_seconds, vae):
            _decode_to_file(
                vae,
                [latents.mean],
                job,
                options,
                num_samples=latents.num_samples,
                channels=latents.audio_channels,
                sample_rate=latents.source_sample_rate,
                source_num_samples=latents.source_num_samples,
            )
        return latents.duration_seconds

    return _each(options, work, find=_find_latent_files, extension=options.format or "wav")


def _decode_to_file(
    vae: EarVAE,
    latents: list[torch.Tensor],
    job: Job,
    options: argparse.Namespace,
    *,
    num_samples: int,
    channels: int,
    sample_rate: int,
    source_num_samples: int,
) -> None:
    """Latents in pieces [D, n] to an audio file of the source's rate, channels and length."""
    from ear_vae.audio import write_audio_stream
    from ear_vae.resampling import resample_stream

    def decoded() -> Iterator[torch.Tensor]:
        for audio in _first_samples(vae.decode_stream(latents), num_samples):
            yield audio.mean(dim=0, keepdim=True) if channels == 1 else audio

    to_stream = job.destination == STREAM
    write_audio_stream(
        sys.stdout.buffer if to_stream else job.destination,
        _first_samples(resample_stream(decoded(), vae.sample_rate, sample_rate), source_num_samples),
        sample_rate,
        channels=channels,
        num_samples=source_num_samples,
        format=_format(job, options),
        subtype=options.subtype,
        peak=options.peak,
        overwrite=options.force,
    )
    if to_stream:
        _flush()


def _first_samples(blocks: Iterable[torch.Tensor], num_samples: int) -> Iterator[torch.Tensor]:
    for block in blocks:
        if block[..., :num_samples].shape[-1]:
            yield block[..., :num_samples]
        num_samples = max(0, num_samples - block.shape[-1])


class _Counted:
    """Blocks of audio as they come, and how many samples they have been."""

    def __init__(self, blocks: Iterable[torch.Tensor]) -> None:
        self._blocks = blocks
        self.num_samples = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in self._blocks:
            self.num_samples += block.shape[-1]
            yield block


def info(options: argparse.Namespace) -> int:
    """Facts about a model, a latent file or an audio file, on standard output."""
    path = Path(options.thing)
    given = [name for name in ("variant", "revision", "force_download") if getattr(options, name)]
    if path.is_file() and given:
        options.refuse(f"--{given[0].replace('_', '-')} is for models; {options.thing} is a file")
    facts = _file_facts(path) if path.is_file() else _model_facts(path, options)
    _put_facts(facts, as_json=options.json, longest=_LONGEST_FACT)
    return 0


def env(options: argparse.Namespace) -> int:
    """What is installed here, what does not fit, and the cure, on standard output."""
    from ear_vae.environment import facts

    _put_facts(facts(), as_json=options.json)
    return 0


def _put_facts(facts: dict[str, Any], *, as_json: bool, longest: int | None = None) -> None:
    if as_json:
        _terminal.put(json.dumps(facts))
        return
    width = max(map(len, facts))
    lines = []
    for name, value in facts.items():
        # Several lines of text stand below each other.
        parts = value if isinstance(value, list) and all(isinstance(part, str) for part in value) else [value]
        for index, part in enumerate(parts or ["none"]):
            text = _terminal.escaped(str(part))
            text = _terminal.shortened(text, longest) if longest else text
            lines.append(f"{'' if index else name:{width}}  {text}")
    _terminal.put("\n".join(lines))


def convert(options: argparse.Namespace) -> int:
    """A model from one layout to another."""
    import torch

    from ear_vae.export import convert_to_folder, convert_to_official

    common = {"variant": options.variant, "revision": options.revision, "overwrite": options.force}
    _require_elsewhere(options.source, options.destination)
    is_official_file = Path(options.destination).suffix.lower() == OFFICIAL_EXTENSION
    layout = options.to or ("official" if is_official_file else "folder")
    if layout == "folder":
        dtype = getattr(torch, options.dtype)
        convert_to_folder(options.source, options.destination, dtype=dtype, **common)
    elif options.dtype == "float32":
        convert_to_official(options.source, options.destination, **common)
    else:
        raise EarVAEError("--dtype is for our own folders; official weights are float32")
    return 0


def release(options: argparse.Namespace) -> int:
    """A training checkpoint to a folder for users."""
    from ear_vae.training.release import release as write_release

    write_release(
        options.checkpoint,
        options.destination,
        name=options.name_of_model,
        averaged=not options.raw,
        training_state=options.training_state,
        overwrite=options.force,
    )
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Metrics of rebuilt audio against its originals."""
    from ear_vae.evaluation import command
    from ear_vae.evaluation.baselines import load_system

    _refuse_options_of_models(options)

    def load(name: str) -> System:
        return load_system(
            name,
            device=_device(options.device or "cpu"),
            variant=options.variant,
            force_download=options.force_download,
        )

    return command.run(options, load)


def report(options: argparse.Namespace) -> int:
    """A page to listen to."""
    from ear_vae.evaluation import listening_command
    from ear_vae.evaluation.baselines import load_system

    if not options.evaluation:
        _refuse_options_of_models(options)

    def load(name: str, variant: str | None) -> System:
        return load_system(
            name,
            device=_device(options.device or "cpu"),
            variant=variant,
            force_download=options.force_download,
        )

    _require_free(options.output, overwrite=options.force)
    return listening_command.run(options, load)


def _refuse_options_of_models(options: argparse.Namespace) -> None:
    """Ends with a usage error where an option is for models that are not there."""
    from ear_vae.evaluation.codecs import is_codec

    names = [name for name in options.model if not is_codec(name)]
    for option, models in (("device", options.model), ("variant", names), ("force_download", names)):
        if getattr(options, option) and not models:
            of = " of εar-VAE" if options.model else ""
            options.refuse(f"--{option.replace('_', '-')} is for a --model{of}")
    if names:
        _require_downloadable(names, options)


def _fingerprints() -> Callable[[EarVAE], str]:
    """`EarVAE.weights_sha256`, once for all files of a command: nothing changes the weights meanwhile."""
    return functools.cache(lambda vae: vae.weights_sha256)


def _each(
    options: argparse.Namespace,
    work: Callable[[EarVAE, Job], float],
    *,
    find: Callable[[Path], Found],
    extension: str,
) -> int:
    """Plans, refuses what is bound to fail, then loads the model once and works on every file."""
    what = plan(options.input, options.output, find=find, extension=extension, overwrite=options.force)
    for job in what.jobs[:1]:
        if extension != LATENT_EXTENSION:
            _require_writable_format(job, options)
        if not job.relative and job.destination != STREAM:
            _require_free(job.destination, overwrite=options.force)
    return run(what, lambda: _load(options), work, quiet=options.quiet, debug=options.debug)


def _load(options: argparse.Namespace) -> EarVAE:
    import torch

    device = _device(options.device)
    vae = _pretrained(options.model, options)
    try:
        vae.to(device, getattr(torch, options.dtype))
    except RuntimeError as error:  # a full or broken device
        raise EarVAEError(f"cannot put {vae.name} on {device}: {one_line(error)}") from error
    if options.compile:
        vae.compile()
    return vae


def _pretrained(name: str, options: argparse.Namespace) -> EarVAE:
    from ear_vae.vae import EarVAE

    _require_downloadable([name], options)
    return EarVAE.from_pretrained(
        name,
        variant=options.variant,
        revision=options.revision,
        force_download=options.force_download,
    )


def _require_downloadable(names: Sequence[str], options: argparse.Namespace) -> None:
    """Refuses to fetch again where nothing comes from the Hub."""
    from ear_vae.bundled import bundled_checkpoints

    if options.force_download and all(
        Path(name).expanduser().exists() or name in bundled_checkpoints() for name in names
    ):
        options.refuse(f"--force-download is for models on the Hub; {', '.join(names)} is here")


def _device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        EarVAEError: There is none.
    """
    import torch

    kind, _, index = name.partition(":")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if kind not in available or not (index.isdecimal() or name == kind):
        meant = "; for an NVIDIA or AMD GPU write cuda" if kind == "gpu" else ""
        raise EarVAEError(f"no device {name!r}; choose cpu, cuda, cuda:N or mps{meant}")
    if int(index or 0) >= available[kind]:
        here = ", ".join(kind for kind, count in available.items() if count)
        raise EarVAEError(
            f"device {name!r} is not available here; this machine and this torch have: {here} "
            "(ear-vae env says why)"
        )
    return torch.device(name)


def _require_elsewhere(source: str, destination: str) -> None:
    """Refuses to convert a model over itself."""
    from ear_vae._files import same_file

    inside = Path(source).is_dir() and Path(destination).resolve().is_relative_to(Path(source).resolve())
    if same_file(source, destination) or (inside and Path(destination).exists()):
        raise EarVAEError(f"{destination}: would replace the model that is to be converted; choose another")


def _require_free(destination: str, *, overwrite: bool) -> None:
    """Refuses an existing or impossible output before a model is loaded and hours are spent on it."""
    from ear_vae._files import atomic_path

    with suppress(_OnlyLooking), atomic_path(destination, overwrite):
        raise _OnlyLooking


class _OnlyLooking(Exception):
    """Leaves `atomic_path` without writing."""


def _require_writable_format(job: Job, options: argparse.Namespace) -> None:
    """Refuses a format and subtype that cannot be written, by writing a little of it to nowhere."""
    import torch

    from ear_vae.audio import write_audio

    trial = _NamedBytes()
    trial.name = job.destination_name
    write_audio(trial, torch.zeros(2, 4096), 44_100, format=_format(job, options), subtype=options.subtype)


class _NamedBytes(io.BytesIO):
    """Bytes in memory that error messages have a name for."""

    name = "standard input"


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        raise EarVAEError(f"standard output: could not be written: {error.strerror or error}") from error


def _source(job: Job) -> Any:
    # Decoders seek, pipes cannot.
    return _NamedBytes(sys.stdin.buffer.read()) if job.source == STREAM else job.source


def _format(job: Job, options: argparse.Namespace) -> str:
    named = "wav" if job.destination == STREAM else Path(job.destination).suffix[1:]
    return str(options.format or named)


@contextmanager
def _at_work(options: argparse.Namespace, job: Job, audio_seconds: float, vae: EarVAE) -> Iterator[None]:
    """The networks at work on one file: no gradients, and a bar for those who watch."""
    import torch

    shown = options.progress or (_terminal.is_watched() and not options.quiet)
    with torch.inference_mode(), progress(job.source_name, audio_seconds, vae.latent_rate, shown=shown):
        yield


def _generator(seed: int | None, job: Job) -> torch.Generator | None:
    """Source of a file's draw: for one file as in the library, in a folder another one for each file."""
    import torch

    if seed is None:
        return None
    if job.relative:
        # Of the seed and the file only, so that it does not matter what else is in the folder, or was done.
        digest = hashlib.sha256(f"{seed} {job.relative}".encode(errors="surrogateescape")).digest()
        seed = int.from_bytes(digest[:7], "big")
    return torch.Generator().manual_seed(seed)


def _find_audio_files(folder: Path) -> Found:
    from ear_vae.audio import AUDIO_EXTENSIONS

    return find_files(folder, AUDIO_EXTENSIONS)


def _find_latent_files(folder: Path) -> Found:
    return find_files(folder, {f".{LATENT_EXTENSION}"})


def _file_facts(path: Path) -> dict[str, Any]:
    from ear_vae.audio import audio_info
    from ear_vae.latents import is_latent_file, load_latents

    if not is_latent_file(path) and path.suffix.lower() != f".{LATENT_EXTENSION}":
        audio = audio_info(path)
        return {"kind": "audio", **vars(audio), "duration_seconds": audio.duration_seconds}
    latents = load_latents(path)
    names = ["model_name", "weights_sha256", "sample_rate", "downsampling_ratio", "num_samples"]
    names += ["audio_channels", "source_sample_rate", "source_num_samples", "sampled"]
    return {
        "kind": "latents",
        "shape": list(latents.mean.shape),
        "std": latents.std is not None,
        **{name: getattr(latents, name) for name in names},
        "latent_rate": latents.latent_rate,
        "duration_seconds": latents.duration_seconds,
    }


def _model_facts(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from ear_vae.audio import AUDIO_EXTENSIONS

    if not path.exists() and path.suffix.lower() in {*AUDIO_EXTENSIONS, f".{LATENT_EXTENSION}"}:
        raise EarVAEError(f"{path}: no such file")
    vae = _pretrained(options.thing, options)
    return {
        "kind": "model",
        "name": vae.name,
        "weights_sha256": vae.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "latent_rate": vae.latent_rate,
        "downsampling_ratio": vae.downsampling_ratio,
        **vae.config.to_dict(),
    }
