"""Which options each command of `ear-vae` has."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NoReturn

from ear_vae import __version__
from ear_vae.audio.formats import WRITTEN_FORMATS
from ear_vae.limits import escaped

_LARGEST_SEED = 2**63 - 1


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints show what they were given without doing what it says to a terminal."""

    def __init__(self, **options: Any) -> None:
        # A shortened option would become another one, or none, with the next one that is added.
        super().__init__(allow_abbrev=False, **options)

    def print_help(self, file: Any = None) -> None:
        # Not the parent's way, which takes no notice of output that does not get through.
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `fit`; a command's name is in `name`, its usage error in `refuse`."""
    parser = _Parser(prog="ear-vae", description="Encode, decode and rebuild music with εar-VAE.")
    parser.add_argument("--version", action="version", version=f"ear-vae {__version__}")
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parents: _Parser) -> _Parser:
        added = subparsers.add_parser(name, parents=[*parents, debug], help=help)
        added.set_defaults(refuse=added.error)
        return added

    files, weights, download, model, audio, debug = _shared_options()
    add("reconstruct", "rebuild audio", files, weights, download, model, audio)

    command = add("encode", "audio to latent files", files, weights, download, model)
    command.add_argument("--std", action="store_true", help="store the standard deviations too")
    command.add_argument(
        "--sample", action="store_true", help="store a draw from the posterior, not its mean"
    )
    command.add_argument("--seed", type=_seed, help="makes the draws of --sample repeatable, file by file")

    command = add("decode", "latent files to audio", files, weights, download, model, audio)
    command.description = "--force also decodes latents that another model made."

    command = add("info", "describe a model, latent file or audio file", weights, download)
    command.add_argument("thing", metavar="THING", help="a path, a bundled name or a Hub repository")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("evaluate", "measure rebuilt audio against its originals", download)
    _add_evaluation(command)

    command = add("report", "a page to listen to originals and rebuilt audio", download)
    _add_report(command)

    command = add("convert", "official weights to our folder, and back", weights)
    command.add_argument("source", metavar="SOURCE", help="folder, bundled name or Hub repository")
    command.add_argument("destination", metavar="DESTINATION", help="a folder, or a .pyt file")
    command.add_argument(
        "--to", choices=("folder", "official"), help="layout; official for a .pyt file, else folder"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="to store (%(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace what exists")

    command = add("release", "training checkpoint to a folder for users")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of ear-vae fit")
    command.add_argument("destination", metavar="DESTINATION", help="a folder")
    command.add_argument("--name", dest="name_of_model", help="of the model, by default the folder's")
    command.add_argument("--raw", action="store_true", help="the last weights instead of their average")
    command.add_argument(
        "--training-state", action="store_true", help="also the discriminator and the optimizers, to train on"
    )
    command.add_argument("--force", action="store_true", help="replace what exists")

    command = add("env", "what is installed here, what does not fit, and the cure")
    command.add_argument("--json", action="store_true", help="print JSON")

    subparsers.add_parser("fit", add_help=False, help="train; see ear-vae fit --help")
    return parser


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Both signals are cut to the shorter; SI-SDR and spectral metrics are taken at 44.1 kHz, loudness "
        "and peaks at each file's own rate. Differences in length, rate, channels or time are reported."
    )
    command.add_argument("target", metavar="TARGET", help="the originals: a folder or a file")
    command.add_argument("estimate", metavar="ESTIMATE", nargs="?", help="the same of rebuilt audio")
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="make the estimates with this folder, bundled name, Hub repository or other codec (dac, "
        "encodec, sao, agc); repeatable",
    )
    command.add_argument("--variant", help="which model of a repository that holds several")
    command.add_argument("--device", help="for the models: cpu (default), cuda, cuda:N or mps")
    command.add_argument(
        "--pattern", help="how the estimate of {name} is called, such as {name}_rebuilt; {name} by default"
    )
    command.add_argument("--align", action="store_true", help="take out a delay of up to 100 ms")
    command.add_argument("--json", metavar="OUT.json", help="write all figures and their summary")
    command.add_argument("--csv", metavar="OUT.csv", help="write a line for each file")
    command.add_argument("--jobs", type=_count, help="pairs of files at a time; by default by processors")
    command.add_argument("--force", action="store_true", help="replace outputs, redo finished files")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="report failures only")
    group.add_argument("--progress", action="store_true", help="show a bar even when this is no terminal")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes one HTML file that opens in any browser, without a server. Excerpts are taken where the "
        "originals are loudest: of files evenly spaced by name, with --from by their mel distance."
    )
    command.add_argument("output", metavar="OUT.html", help="the page")
    command.add_argument("target", metavar="TARGET", nargs="?", help="the originals: a folder or a file")
    command.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="rebuilt audio, and what to call it; repeatable",
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="rebuild the excerpts with this, as for ear-vae evaluate; repeatable",
    )
    command.add_argument(
        "--from",
        dest="evaluation",
        action="append",
        default=[],
        metavar="OUT.json",
        help="show what ear-vae evaluate --json compared, instead of TARGET; repeatable",
    )
    command.add_argument("--variant", help="which model of a repository that holds several")
    command.add_argument("--device", help="for the models: cpu (default), cuda, cuda:N or mps")
    command.add_argument(
        "--pattern", help="how the estimate of {name} is called, such as {name}_rebuilt; {name} by default"
    )
    command.add_argument("--align", action="store_true", help="take out a delay of up to 100 ms")
    command.add_argument("--excerpts", type=_count, default=4, help="number of excerpts (%(default)s)")
    command.add_argument(
        "--seconds", type=_positive, default=10.0, help="length of each in seconds (%(default)g)"
    )
    command.add_argument(
        "--megabytes",
        type=_positive,
        default=10.0,
        help="excerpts are shortened to keep the page below this size (%(default)g)",
    )
    command.add_argument("--title", help="title of the page; by default names of the systems and of TARGET")
    command.add_argument("--force", action="store_true", help="replace the page if it exists")
    command.add_argument("--quiet", action="store_true", help="report failures only")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _shared_options() -> tuple[_Parser, ...]:
    """Parsers of the options that several commands have: files, weights, Hub, model, audio output, debug."""
    files, weights, download, model, audio, debug = (_Parser(add_help=False) for _ in range(6))
    files.add_argument("input", metavar="IN", help="a file, a folder, or - for standard input")
    files.add_argument("output", metavar="OUT", help="a file for a file, a folder for a folder, or -")
    files.add_argument("--force", action="store_true", help="rewrite outputs that exist")
    group = files.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="report failures only")
    group.add_argument("--progress", action="store_true", help="show bars even when this is no terminal")

    weights.add_argument("--variant", help="which model of a repository that holds several")
    weights.add_argument("--revision", help="branch, tag or commit on the Hub")

    download.add_argument("--force-download", action="store_true", help="fetch the model from the Hub again")

    model.add_argument(
        "--model", default="ear-vae-tiny", help="folder, bundled name or Hub repository (%(default)s)"
    )
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (%(default)s)")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (%(default)s)"
    )
    model.add_argument(
        "--optimize",
        action="store_true",
        help="optimize the model for speed first: some seconds once, then faster on a CPU",
    )

    audio.add_argument(
        "--format",
        choices=tuple(WRITTEN_FORMATS),
        help="by default what OUT's extension says, wav in folders and on standard output",
    )
    audio.add_argument("--subtype", help="encoding such as PCM_16; by default float32 for wav")
    audio.add_argument(
        "--peak",
        choices=("keep", "scale", "clip"),
        default="keep",
        help="what to do with peaks above full scale (%(default)s)",
    )
    debug.add_argument("--debug", action="store_true", help="show tracebacks")
    return files, weights, download, model, audio, debug


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {_LARGEST_SEED}")
    return int(text)
