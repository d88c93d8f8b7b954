"""Which options each command of `ear-vae` has."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ear_vae import __version__
from ear_vae.audio.formats import AUDIO_EXTENSIONS, WRITTEN_FORMATS
from ear_vae.cli.fit import HELP, shipped_configs
from ear_vae.limits import escaped

# Set by the functions that argcomplete gives a shell.
_COMPLETING = "_ARGCOMPLETE"
_LARGEST_SEED = 2**63 - 1
_COMPUTE_DTYPES = ("float32", "bfloat16")
_FOLDER_INSTEAD = "for several files give their folder"
_INSTEAD_OF_MORE = {
    "reconstruct": _FOLDER_INSTEAD,
    "encode": _FOLDER_INSTEAD,
    "decode": _FOLDER_INSTEAD,
    "evaluate": "for several files give two folders",
    "info": "give one at a time",
    "report": "rebuilt audio goes after --system",
}
# What may be left out, and may stand behind options all the same.
_LAST_ARGUMENT = {"reconstruct": "output", "evaluate": "estimate", "report": "target"}
_MODEL = (
    "a folder, a file of weights, ear-vae-tiny (bundled), ear_vae_44k or ear_vae_v2_48k (the authors'), or a "
    "Hub repository"
)


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages escape the control characters in what they were given."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation would mean another option, or none, once a new option is added.
        super().__init__(allow_abbrev=False, **options)

    def print_help(self, file: Any = None) -> None:
        # The parent ignores output that cannot be written.
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


class _NamedModel(argparse.Action):
    """Stores a model's name, and that it was given: raw latents are not decoded with a default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.model_is_named = True


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of every command but `fit`.

    Args:
        arguments: Arguments without the program's name.

    Returns:
        The options, with the command's name in `name` and the function that ends with its usage error in
        `refuse`.

    Raises:
        SystemExit: With 2 on wrong usage, with 0 after `--help` or `--version`.
    """
    parser, commands = _command_parser()
    if _COMPLETING in os.environ:
        _complete(parser, commands["fit"])
    first = arguments[0] if arguments else ""
    if not first:
        parser.error("give a command; ear-vae --help lists them")
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        parser.error(f"give a command first, and {first} after it; ear-vae --help lists the commands")
    if not first.startswith("-") and first not in commands:
        parser.error(_no_command(first, list(commands)))
    options, left = parser.parse_known_args(arguments)
    # argparse takes an argument that may be left out before the options only.
    last = _LAST_ARGUMENT.get(options.name)
    if last and len(left) == 1 and getattr(options, last) is None and _is_no_option(left[0]):
        setattr(options, last, left.pop())
    if left:
        options.refuse(_left_over(options.name, left, options.help_text()))
    return options


def _complete(parser: argparse.ArgumentParser, fit: argparse.ArgumentParser) -> NoReturn:
    """Answers a shell that asks what may stand where the cursor is."""
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    # What `fit` takes is Lightning's business, and takes seconds to find out: what its help shows is enough.
    for short, option, value in re.findall(r"^  (?:(-\w), )?(--[\w.-]+)( [A-Z_]+)?", HELP, re.MULTILINE):
        names = [name for name in (short, option) if name]
        if not value:
            fit.add_argument(*names, action="store_true")
        else:
            fit.add_argument(*names, choices=list(shipped_configs()) if option == "--config" else None)
    argcomplete.autocomplete(parser)
    raise SystemExit(1)


def _is_no_option(argument: str) -> bool:
    """Whether it names something, `-` a standard stream."""
    return argument == "-" or not argument.startswith("-")


def _left_over(command: str, left: Sequence[str], help_text: str) -> str:
    """Returns what to say of arguments that a command does not take."""
    unknown = [argument.partition("=")[0] for argument in left if not _is_no_option(argument)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], re.findall(r"--[a-z-]+", help_text), n=1)
        meant = f"; did you mean {near[0]}?" if near else f"; ear-vae {command} --help lists the options"
        return f"there is no option {unknown[0]}{meant}"
    instead = _INSTEAD_OF_MORE.get(command)
    return f"too many arguments, from {left[0]!r} on" + (f"; {instead}" if instead else "")


def _no_command(word: str, commands: Sequence[str]) -> str:
    """Returns what to say of a word in place of a command, by what it seems to be."""
    path, extension = Path(word), Path(word).suffix.lower()
    quoted = shlex.quote(word)
    if extension == ".safetensors":
        return f"{word} is not a command; to decode it: ear-vae decode {quoted} OUTPUT.wav"
    if extension in AUDIO_EXTENSIONS:
        return f"{word} is not a command; to rebuild it: ear-vae reconstruct {quoted}"
    if path.is_dir():
        what, command = (
            ("describe", "info") if (path / "config.json").exists() else ("rebuild", "reconstruct")
        )
        return f"{word} is not a command; to {what} it: ear-vae {command} {quoted}"
    if near := difflib.get_close_matches(word.lower(), commands, n=1):
        return f"there is no command {word!r}; did you mean {near[0]}?"
    return f"there is no command {word!r}; choose one of {', '.join(commands)}"


def _command_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser and those of the commands by name."""
    parser = _Parser(
        prog="ear-vae",
        description="Encode, decode and rebuild music with εar-VAE.",
        epilog="To begin: ear-vae reconstruct song.mp3",
    )
    parser.add_argument("--version", action="version", version=f"ear-vae {__version__}")
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parents: _Parser) -> _Parser:
        added = subparsers.add_parser(name, parents=[*parents, debug], help=help)
        added.set_defaults(refuse=added.error, help_text=added.format_help)
        return added

    files, weights, download, model, computing, audio, debug = _shared_options()
    command = add(
        "reconstruct", "rebuild audio through the model", files, weights, download, model, computing, audio
    )
    command.description = "The output has the sample rate, length and channels of the input."
    command.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        help="an audio file for a file, a folder for a folder, or - for standard output; by default "
        "song.rebuilt.wav beside song.mp3, and album.rebuilt beside the folder album",
    )

    command = add("encode", "turn audio into latent files", files, weights, download, model, computing)
    command.add_argument(
        "output",
        metavar="OUTPUT",
        help="a .safetensors file for a file, a folder for a folder, or - for standard output",
    )
    command.add_argument(
        "--std", action="store_true", help="store the posterior's standard deviations as well as its means"
    )
    command.add_argument(
        "--sample", action="store_true", help="store a draw from the posterior instead of its mean"
    )
    command.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="seed that makes the draws of --sample repeatable, file by file",
    )

    command = add(
        "encode-dataset", "encode audio into a data set of latents to train on", weights, download, model
    )
    _add_dataset(command)

    command = add("decode", "turn latent files into audio", files, weights, download, model, computing, audio)
    command.description = (
        "With --force, latents that another model made are decoded too. Raw latents (.npy, .npz, .pt, or "
        "safetensors of other programs), an array [D, N] or [1, D, N], do not tell their model: name it with "
        "--model."
    )
    command.add_argument("--time-first", action="store_true", help="raw latents are [N, D] instead of [D, N]")
    command.add_argument(
        "output",
        metavar="OUTPUT",
        help="an audio file for a file, a folder for a folder, or - for standard output",
    )

    command = add("info", "describe a model, a latent file or an audio file", weights, download)
    command.add_argument(
        "subject",
        metavar="MODEL_OR_FILE",
        help=f"{_MODEL}, an audio file, a latent file, raw latents, or - for standard input",
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("evaluate", "measure rebuilt audio against its originals", download)
    _add_evaluation(command)

    command = add("report", "make a page to compare originals and rebuilt audio by ear", download)
    _add_report(command)

    command = add("statistics", "measure the latents of a data set, for a model to normalize with")
    command.description = (
        "Prints mean and standard deviation of each latent channel over all frames of the data set; with "
        "--into it writes them into a model."
    )
    command.add_argument("dataset", metavar="DATASET", help="the output of ear-vae encode-dataset")
    command.add_argument(
        "--into",
        metavar="MODEL",
        help="folder of the model that made the data set, to write them into its config.json",
    )
    command.add_argument("--covariance", action="store_true", help="print the channels' covariance as well")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--force",
        action="store_true",
        help="replace statistics that the model has, and accept those of another model's latents",
    )

    command = add("convert", "write a model in another layout, or for another program", weights)
    command.add_argument("source", metavar="MODEL", help=_MODEL)
    command.add_argument(
        "destination",
        metavar="FOLDER_OR_FILE",
        help="a folder, or a .pyt file for the weights alone",
    )
    command.add_argument(
        "--to",
        choices=("folder", "official", "diffusers", "onnx", "torch-export"),
        help="layout to write: folder is this package's, official the authors', diffusers for its pipelines, "
        "onnx and torch-export to run without this package; by default official for a .pyt file, else folder",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype in which weights are stored, of a folder or, float16 only, of ONNX files (%(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace a model that is already there")

    command = add("release", "turn a training checkpoint into a model for users")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of ear-vae fit")
    command.add_argument("destination", metavar="DESTINATION", help="a folder")
    command.add_argument("--name", dest="name_of_model", help="name of the model; by default the folder's")
    command.add_argument("--raw", action="store_true", help="take the last weights instead of their average")
    command.add_argument(
        "--training-state",
        action="store_true",
        help="write the discriminator and the optimizers too, for further training",
    )
    command.add_argument("--force", action="store_true", help="replace a model that is already there")
    card = command.add_argument_group("what the model card says beside what the checkpoint tells")
    card.add_argument("--license", metavar="ID", help="licence of the weights, such as apache-2.0")
    card.add_argument("--data", metavar="TEXT", help="what it was trained on, and under which licences")
    card.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="a data set on the Hub that it was trained on; repeatable",
    )
    card.add_argument(
        "--base-model", metavar="OWNER/NAME", help="model on the Hub that it was fine-tuned from"
    )
    card.add_argument("--evaluation", metavar="JSON", help="figures, from ear-vae evaluate --json")

    command = add("env", "show what is installed, what does not work together, and how to fix it")
    command.add_argument("--json", action="store_true", help="print JSON")

    subparsers.add_parser("fit", add_help=False, help="train a model; see ear-vae fit --help")
    return parser, dict(subparsers.choices)


def _add_dataset(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Stores means and standard deviations of the posterior, with what is known of each item. Run the "
        "same again after an interruption: it goes on where it stopped. What could not be encoded is "
        "listed in OUT/failures.jsonl."
    )
    command.add_argument(
        "sources",
        metavar="SRC",
        nargs="+",
        help="folders, manifests with a column path (.csv, .jsonl, .parquet) and webdataset tars",
    )
    command.add_argument("output", metavar="OUT", help="folder of the data set: new, or of the same run")
    command.add_argument(
        "--format",
        choices=("webdataset", "stable-audio", "safetensors"),
        default="webdataset",
        help="webdataset writes tars, stable-audio a folder that stable-audio-tools and Stable Audio 3 read, "
        "safetensors a latent file of each item (%(default)s)",
    )
    command.add_argument(
        "--crop",
        dest="crop_seconds",
        type=_positive,
        metavar="SECONDS",
        help="length of an item, rounded to latent frames; by default a whole file is one",
    )
    command.add_argument(
        "--hop-seconds",
        type=_positive,
        metavar="SECONDS",
        help="time from the start of one crop to that of the next; by default the crop's length",
    )
    command.add_argument(
        "--pad-to", type=_count, metavar="FRAMES", help="pad shorter items to that many latent frames"
    )
    command.add_argument(
        "--dtype",
        dest="stored_dtype",
        choices=("float16", "float32"),
        default="float16",
        help="dtype to store latents in (%(default)s)",
    )
    command.add_argument(
        "--compute-dtype",
        dest="dtype",
        choices=_COMPUTE_DTYPES,
        default="float32",
        help="dtype to compute in (%(default)s)",
    )
    command.add_argument(
        "--files-per-shard",
        type=_count,
        default=64,
        metavar="N",
        help="files that are encoded and put in place together (%(default)s)",
    )
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster of Ray"
    )
    command.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that encode; by default one for each GPU, and one on a CPU",
    )
    command.add_argument(
        "--threads", type=_count, metavar="N", help="threads of each of several workers; by default its share"
    )
    command.add_argument(
        "--decoders",
        type=_whole,
        metavar="N",
        help="processes that decode audio for each worker; 0 for none beside it",
    )
    command.add_argument(
        "--retry-failed", action="store_true", help="try files again that failed in an earlier run"
    )
    command.add_argument(
        "--force", action="store_true", help="remove what another run has left in OUT, and start again"
    )
    _add_verbosity(command)


def _add_verbosity(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="report failures only")
    group.add_argument(
        "--progress", action="store_true", help="show progress bars even if this is not a terminal"
    )


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Both signals are cut to the length of the shorter; SI-SDR and spectral metrics are computed at "
        "44.1 kHz, loudness and peaks at each file's own rate. Differences in length, rate, channels or time "
        "are reported."
    )
    command.add_argument("target", metavar="TARGET", help="the originals: a folder or a file")
    command.add_argument(
        "estimate", metavar="ESTIMATE", nargs="?", help="the rebuilt audio: a folder or a file"
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="make the estimates with this folder, bundled name, Hub repository or other codec (dac, "
        "encodec, sao, agc); repeatable",
    )
    _add_comparison(command)
    command.add_argument(
        "--json",
        metavar="OUT.json",
        help="write all figures and their summary; until all comparisons have succeeded, finished ones are "
        "kept in OUT.json.partial.jsonl, from which the same command goes on",
    )
    command.add_argument(
        "--csv",
        metavar="OUT.csv",
        help="write a line for each file; finished ones are kept likewise",
    )
    command.add_argument(
        "--jobs",
        type=_count,
        help="number of pairs to compare at a time; by default as many as suit the processors",
    )
    command.add_argument("--force", action="store_true", help="replace outputs, redo finished files")
    _add_verbosity(command)


def _add_comparison(command: argparse.ArgumentParser) -> None:
    """Adds what `evaluate` and `report` have in common."""
    command.add_argument("--variant", help="which model to take from a repository that holds several")
    command.add_argument("--device", help="device for the models: cpu (default), cuda, cuda:N or mps")
    command.add_argument(
        "--pattern", help="name of the estimate of {name}, such as {name}_rebuilt; {name} by default"
    )
    command.add_argument("--align", action="store_true", help="take out a delay of up to 100 ms")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes one HTML file that opens in any browser, without a server. Excerpts are taken where the "
        "originals are loudest: of files evenly spaced by name, with --from by their mel distance."
    )
    command.add_argument("output", metavar="OUT.html", help="the page; without an extension .html is added")
    command.add_argument("target", metavar="TARGET", nargs="?", help="the originals: a folder or a file")
    command.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="rebuilt audio, a folder or a file, and its name on the page, by default its own; repeatable",
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="rebuild the excerpts with this model, as for ear-vae evaluate; repeatable",
    )
    command.add_argument(
        "--from",
        dest="evaluation",
        action="append",
        default=[],
        metavar="OUT.json",
        help="show what ear-vae evaluate --json compared, instead of TARGET; repeatable",
    )
    _add_comparison(command)
    command.add_argument("--excerpts", type=_count, help="number of excerpts (4, or what the originals hold)")
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


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _shared_options() -> tuple[_Parser, ...]:
    """Returns parsers of shared options: files, weights, Hub, model, its dtype, audio output, debug."""
    files, weights, download, model, computing, audio, debug = (_Parser(add_help=False) for _ in range(7))
    files.add_argument("input", metavar="INPUT", help="a file, a folder, or - for standard input")
    files.add_argument("--force", action="store_true", help="replace outputs that exist")
    _add_verbosity(files)

    weights.add_argument(
        "--variant", metavar="NAME", help="name of the model in a repository that holds several"
    )
    weights.add_argument(
        "--config",
        metavar="CONFIG",
        help="config of a bare file of weights: a JSON file, ear_vae_44k or ear_vae_v2_48k; by default the "
        ".json beside it, or what the weights tell",
    )
    weights.add_argument(
        "--revision", metavar="REVISION", help="branch, tag or commit of the Hub repository to take"
    )

    download.add_argument(
        "--force-download", action="store_true", help="download the model from the Hub again"
    )

    model.add_argument(
        "--model",
        metavar="MODEL",
        action=_NamedModel,
        default="ear-vae-tiny",
        help=f"{_MODEL} (default: %(default)s)",
    )
    model.set_defaults(model_is_named=False)
    model.add_argument(
        "--device",
        metavar="DEVICE",
        default="cpu",
        help="where to compute: cpu, cuda, cuda:N or mps (default: %(default)s)",
    )
    computing.add_argument(
        "--dtype",
        choices=(*_COMPUTE_DTYPES, "auto"),
        default="float32",
        help="dtype to compute in (default: %(default)s); auto takes bfloat16 where a short trial shows "
        "that it is faster here and exact enough, and says which it is",
    )
    model.add_argument(
        "--optimize",
        action=argparse.BooleanOptionalAction,
        help="compile the activation on a CPU, which takes some seconds and makes it faster afterwards, and "
        "record graphs on a GPU; by default a CPU compiles where the work is long enough for that to pay",
    )

    audio.add_argument(
        "--format",
        choices=tuple(WRITTEN_FORMATS),
        help="audio format to write; by default what the extension of OUTPUT says, and wav in folders and on "
        "standard output",
    )
    audio.add_argument(
        "--subtype", metavar="SUBTYPE", help="sample encoding such as PCM_16; by default float32 for wav"
    )
    audio.add_argument(
        "--peak",
        choices=("keep", "scale", "clip"),
        default="keep",
        help="what to do with peaks above full scale: keep them where the format can, scale the whole file "
        "down, or clip them (default: %(default)s)",
    )
    debug.add_argument(
        "--debug",
        action="store_true",
        help="show tracebacks, and messages of C libraries",
    )
    return files, weights, download, model, computing, audio, debug


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {_LARGEST_SEED}")
    return int(text)
