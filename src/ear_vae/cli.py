"""The command `ear-vae`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ear_vae import __version__
from ear_vae.batch import STREAM, Job, plan, progress, run
from ear_vae.errors import EarVAEError

if TYPE_CHECKING:
    import torch

    from ear_vae.vae import EarVAE

AUDIO_FORMATS = ("wav", "flac", "ogg", "mp3")
LATENT_EXTENSION = "safetensors"
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; `sys.argv` by default.

    Returns:
        0 when all went well, 1 when a file or the command failed, 130 when interrupted.

    Raises:
        SystemExit: With 2 on wrong usage, with 0 after `--help`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # A terminated process must clean up as an interrupted one does. Outside the main thread Python
    # refuses, and signals are the caller's business.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if given[:1] == ["fit"]:
                from ear_vae.training.cli import main as fit

                return fit([argument for argument in given[1:] if argument != "--debug"])
            options = _parser().parse_args(given)
            return int(options.command(options))
    except EarVAEError as error:
        if debug:
            raise
        print(f"ear-vae: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("ear-vae: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ear-vae", description="Encode, decode and rebuild music with εar-VAE."
    )
    parser.add_argument("--version", action="version", version=f"ear-vae {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument(
        "--model", default="ear-vae-tiny", help="folder, bundled name or Hub repository (%(default)s)"
    )
    group.add_argument("--variant", help="which model of a repository that holds several")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (%(default)s)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("input", metavar="IN", help="a file, a folder, or - for standard input")
    files.add_argument("output", metavar="OUT", help="a file for a file, a folder for a folder, or -")
    files.add_argument("--force", action="store_true", help="rewrite outputs that exist")
    files.add_argument("--quiet", action="store_true", help="report failures only")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show tracebacks")

    audio = argparse.ArgumentParser(add_help=False)
    group = audio.add_argument_group("audio output")
    group.add_argument("--format", choices=AUDIO_FORMATS, help="of folders and standard output (wav)")
    group.add_argument("--subtype", help="encoding such as PCM_16; float32 for wav by default")
    group.add_argument(
        "--peak", choices=("keep", "scale", "clip"), default="keep", help="above full scale (%(default)s)"
    )

    command = commands.add_parser("reconstruct", parents=[files, model, audio, debug], help="rebuild audio")
    command.set_defaults(command=_reconstruct)
    command = commands.add_parser("encode", parents=[files, model, debug], help="audio to latent files")
    command.add_argument("--std", action="store_true", help="store the standard deviations too")
    command.add_argument(
        "--sample", action="store_true", help="store a draw from the posterior, not its mean"
    )
    command.add_argument("--seed", type=int, default=0, help="of --sample (%(default)s)")
    command.set_defaults(command=_encode)
    command = commands.add_parser(
        "decode", parents=[files, model, audio, debug], help="latent files to audio"
    )
    command.description = "--force also decodes latents that another model made."
    command.set_defaults(command=_decode)

    command = commands.add_parser("info", parents=[debug], help="describe a model, latent file or audio file")
    command.add_argument("thing", metavar="THING", help="a path, a bundled name or a Hub repository")
    command.add_argument("--variant", help="which model of a repository that holds several")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_info)

    command = commands.add_parser("convert", parents=[debug], help="official weights to our folder, and back")
    command.add_argument("source", metavar="SOURCE", help="folder, bundled name or Hub repository")
    command.add_argument(
        "destination", metavar="DESTINATION", help="a folder, or a .pyt file with --to official"
    )
    command.add_argument("--variant", help="which model of a repository that holds several")
    command.add_argument(
        "--to", choices=("folder", "official"), default="folder", help="layout (%(default)s)"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="to store (%(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace what exists")
    command.set_defaults(command=_convert)

    commands.add_parser("fit", add_help=False, help="train; see ear-vae fit --help")
    return parser


def _reconstruct(options: argparse.Namespace) -> int:
    from ear_vae.audio import find_audio_files, read_audio

    what = plan(
        options.input,
        options.output,
        find=find_audio_files,
        extension=options.format or "wav",
        overwrite=options.force,
    )
    _require_free(what.jobs, options)
    vae = _load(options) if what.jobs else None

    def work(job: Job) -> float:
        import torch

        assert vae is not None
        audio, sample_rate = read_audio(_source(job))
        seconds = audio.shape[1] / sample_rate
        with torch.inference_mode(), progress(job.source, 2 * seconds, vae.latent_rate, quiet=options.quiet):
            rebuilt = vae.reconstruct(audio, sample_rate=sample_rate)
        del audio
        _write_audio(job, rebuilt, sample_rate, options)
        return seconds

    return run(what, work, quiet=options.quiet, debug=options.debug)


def _encode(options: argparse.Namespace) -> int:
    from ear_vae.audio import find_audio_files, read_audio
    from ear_vae.latents import Latents, save_latents

    what = plan(
        options.input,
        options.output,
        find=find_audio_files,
        extension=LATENT_EXTENSION,
        overwrite=options.force,
    )
    _require_free(what.jobs, options)
    vae = _load(options) if what.jobs else None

    def work(job: Job) -> float:
        import torch

        assert vae is not None
        audio, sample_rate = read_audio(_source(job))
        seconds = audio.shape[1] / sample_rate
        with torch.inference_mode(), progress(job.source, seconds, vae.latent_rate, quiet=options.quiet):
            posterior = vae.encode(audio, sample_rate=sample_rate)
        # Every file has its own draw, the same for one seed whatever else is in the folder.
        generator = torch.Generator().manual_seed(options.seed)
        latents = Latents(
            mean=posterior.sample(generator) if options.sample else posterior.mean,
            std=posterior.std if options.std else None,
            sample_rate=vae.sample_rate,
            downsampling_ratio=vae.downsampling_ratio,
            num_samples=-(-audio.shape[1] * vae.sample_rate // sample_rate),
            audio_channels=audio.shape[0],
            source_sample_rate=sample_rate,
            source_num_samples=audio.shape[1],
            model_name=vae.name,
            weights_sha256=vae.weights_sha256,
            sampled=options.sample,
        )
        if job.destination == STREAM:
            save_latents(sys.stdout.buffer, latents)
        else:
            save_latents(job.destination, latents, overwrite=options.force)
        return seconds

    return run(what, work, quiet=options.quiet, debug=options.debug)


def _decode(options: argparse.Namespace) -> int:
    from ear_vae.audio import resample
    from ear_vae.latents import load_latents

    what = plan(
        options.input,
        options.output,
        find=lambda folder: sorted(folder.rglob(f"*.{LATENT_EXTENSION}")),
        extension=options.format or "wav",
        overwrite=options.force,
    )
    _require_free(what.jobs, options)
    vae = _load(options) if what.jobs else None

    def work(job: Job) -> float:
        import torch

        assert vae is not None
        latents = load_latents(_source(job))
        facts = (latents.sample_rate, latents.downsampling_ratio, latents.mean.shape[0])
        if facts != (vae.sample_rate, vae.downsampling_ratio, vae.latent_dim):
            raise EarVAEError(
                f"{job.source}: made by {latents.model_name} at {facts[0]} Hz with {facts[2]} channels every "
                f"{facts[1]} samples, which {vae.name} cannot decode; choose its model with --model"
            )
        if latents.weights_sha256 != vae.weights_sha256 and not options.force:
            raise EarVAEError(
                f"{job.source}: made by {latents.model_name} (weights {latents.weights_sha256[:12]}), not by "
                f"{vae.name} ({vae.weights_sha256[:12]}); choose its model with --model, or --force"
            )
        seconds = latents.duration_seconds
        with torch.inference_mode(), progress(job.source, seconds, vae.latent_rate, quiet=options.quiet):
            audio = vae.decode(latents.mean, num_samples=latents.num_samples)
            if latents.audio_channels == 1:
                audio = audio.mean(dim=0, keepdim=True)
            audio = resample(audio, latents.sample_rate, latents.source_sample_rate)
        _write_audio(job, audio[:, : latents.source_num_samples], latents.source_sample_rate, options)
        return seconds

    return run(what, work, quiet=options.quiet, debug=options.debug)


def _info(options: argparse.Namespace) -> int:
    from ear_vae.audio import audio_info
    from ear_vae.latents import is_latent_file, load_latents

    path = Path(options.thing)
    facts: dict[str, Any]
    if path.is_file() and (is_latent_file(path) or path.suffix == f".{LATENT_EXTENSION}"):
        latents = load_latents(path)
        names = ["model_name", "weights_sha256", "sample_rate", "downsampling_ratio", "num_samples"]
        names += ["audio_channels", "source_sample_rate", "source_num_samples", "sampled"]
        facts = {"kind": "latents", "shape": list(latents.mean.shape), "std": latents.std is not None}
        facts |= {name: getattr(latents, name) for name in names}
        facts |= {"latent_rate": latents.latent_rate, "duration_seconds": latents.duration_seconds}
    elif path.is_file():
        info = audio_info(path)
        facts = {"kind": "audio", **vars(info), "duration_seconds": info.duration_seconds}
    else:
        from ear_vae.vae import EarVAE

        vae = EarVAE.from_pretrained(options.thing, variant=options.variant)
        facts = {"kind": "model", "name": vae.name, "weights_sha256": vae.weights_sha256}
        facts |= {"parameters": sum(p.numel() for p in vae.parameters()), "latent_rate": vae.latent_rate}
        facts |= {"downsampling_ratio": vae.downsampling_ratio, **vae.config.to_dict()}
    if options.json:
        print(json.dumps(facts))  # noqa: T201
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))  # noqa: T201
    return 0


def _convert(options: argparse.Namespace) -> int:
    import torch

    from ear_vae.export import convert_to_folder, convert_to_official

    common = {"variant": options.variant, "overwrite": options.force}
    if options.to == "folder":
        dtype = getattr(torch, options.dtype)
        convert_to_folder(options.source, options.destination, dtype=dtype, **common)
    elif options.dtype == "float32":
        convert_to_official(options.source, options.destination, **common)
    else:
        raise EarVAEError("--dtype is for our own folders; official weights are float32")
    return 0


def _load(options: argparse.Namespace) -> EarVAE:
    import torch

    from ear_vae.vae import EarVAE

    vae = EarVAE.from_pretrained(options.model, variant=options.variant, revision=options.revision)
    return vae.to(_device(options.device), getattr(torch, options.dtype))


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
    if kind not in available or not (index.isdigit() or name == kind):
        raise EarVAEError(f"no device {name!r}; choose cpu, cuda, cuda:N or mps")
    if int(index or 0) >= available[kind]:
        raise EarVAEError(f"device {name!r} is not available here; this machine has {available}")
    return torch.device(name)


def _require_free(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Refuses an existing or impossible output of a single file before a model is loaded for it."""
    from ear_vae._files import atomic_path

    if len(jobs) == 1 and jobs[0].destination != STREAM and not Path(options.input).is_dir():
        try:
            with atomic_path(jobs[0].destination, options.force):
                raise _OnlyLooking
        except _OnlyLooking:
            pass


class _OnlyLooking(Exception):
    """Leaves `atomic_path` without writing."""


def _source(job: Job) -> Any:
    # Decoders seek, pipes cannot.
    return io.BytesIO(sys.stdin.buffer.read()) if job.source == STREAM else job.source


def _write_audio(job: Job, audio: torch.Tensor, sample_rate: int, options: argparse.Namespace) -> None:
    from ear_vae.audio import write_audio

    to_stream = job.destination == STREAM
    write_audio(
        sys.stdout.buffer if to_stream else job.destination,
        audio,
        sample_rate,
        format=(options.format or "wav") if to_stream else None,
        subtype=options.subtype,
        peak=options.peak,
        overwrite=options.force,
    )


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ear-vae: warning: {' '.join(str(message).split())}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
