"""`ear-vae fit`: its arguments, checked before Lightning is imported, which takes seconds."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ear_vae.errors import EarVAEError

_BASE = "base"
HELP = """\
usage: ear-vae fit [--config NAME_OR_FILE ...] --data.folder MUSIC [options]

Trains an εar-VAE, from scratch or from a model. Options override configs, later configs earlier ones.

  -c, --config NAME_OR_FILE         {configs};
                                    or a YAML file, which is code: it names classes to call. Repeatable.
  --print_config                    print the resulting settings, and end
  --ckpt_path FILE                  resume exactly where that checkpoint stopped
  --force                           replace the checkpoints and the model of another run
  --help-all                        all options, with those of Lightning's Trainer
  --debug                           show tracebacks

data
  --data.folder MUSIC               a folder, a manifest (.csv, .jsonl, .parquet), or '[A, B]'
  --data.validation_folder MUSIC    audio to validate on
  --data.batch_size N               segments per batch
  --data.segment_seconds S          length of a segment
  --data.num_workers N              worker processes that read the audio

model
  --model.pretrained NAME           start from this folder, bundled name or Hub repository
  --model.variant NAME              which model of a repository that holds several
  --model.config.channels N         width of a new model
  --model.train_encoder false       keep the encoder, and the latents, as they are
  --model.discriminator.channels N  train against a discriminator of this width
  --model.objective.weights MAP     weights of loss terms, such as '{{waveform: 1.0}}'
  --model.optimizer.learning_rate R
  --model.optimizer.warmup_steps N  steps over which the rate grows from zero
  --model.optimizer.algorithm CLASS an optimizer instead of AdamW, such as torch.optim.SGD
  --model.optimizer.schedule CLASS  a schedule instead of the cosine decay
  --model.accumulate_grad_batches N batches per step
  --model.ema_decay D               decay of the average of the weights; 0 for none

run
  --trainer.default_root_dir FOLDER where checkpoints/last.ckpt, model/ and logs go
  --trainer.max_steps N             steps of the whole training
  --trainer.accelerator NAME        cpu, gpu or auto
  --trainer.devices N               number of GPUs
  --trainer.precision NAME          such as bf16-mixed
  --checkpoints.every_n_steps N     steps between checkpoints
  --checkpoints.keep_every_n_steps N
  --checkpoints.monitor NAME        keep the best too, by a value such as validation/si_sdr_db
  --examples.count N                excerpts to listen to in TensorBoard
"""


def run_fit(arguments: Sequence[str]) -> int:
    """Runs `ear-vae fit`.

    Args:
        arguments: Arguments after `fit`. `--config` takes the name of a shipped config or a file, any number
            of times; later ones override earlier ones. Before the first shipped one comes `base`. A config
            file is code: it names classes to be imported and called (`class_path`).

    Returns:
        0, or 143 when the process was told to terminate, 130 when it was interrupted, 129 when its terminal
        was closed; in these cases it has written a checkpoint to resume from.

    Raises:
        EarVAEError: No such config or folder, a folder that holds another run, or anything that the module or
            the data refuses.
        SystemExit: With 2 on wrong usage, with 0 after `--help` and `--print_config`.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        sys.stdout.write(HELP.format(configs=_in_lines(shipped_configs())))
        sys.stdout.flush()  # help that did not get through is no success
        raise SystemExit(0)
    everything = ["--help" if argument == "--help-all" else argument for argument in arguments]
    resolved = _with_shipped_configs([argument for argument in everything if argument != "--force"])
    if not {"--help", "--print_config"} & set(resolved):
        _require_folders(resolved)
    train = import_module("ear_vae.cli.lightning_cli").train
    return int(train(resolved, arguments, overwrite="--force" in arguments))


def shipped_configs() -> dict[str, Path]:
    """Lists the configs that come with the package, by name."""
    folder = Path(str(files("ear_vae") / "training" / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _in_lines(names: Sequence[str] | dict[str, Path]) -> str:
    """Returns the names of the configs in lines that fit beside the options."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 62:
            lines.append("")
        lines[-1] += f"{name}, "
    return ("\n" + 36 * " ").join(line.strip() for line in lines).rstrip(",")


def _with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Replaces the names of shipped configs after `--config` by their paths, the first by two."""
    shipped = shipped_configs()
    result: list[str] = []
    rest = list(arguments)
    based = False
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option not in ("-c", "--config") or not (equals or rest):
            result.append(option + equals + value)
            continue
        if not equals:
            value = rest.pop(0)
        if value not in shipped:
            if not Path(value).is_file():
                near = difflib.get_close_matches(value, shipped, n=1)
                meant = f"did you mean {near[0]}? Else " if near else ""
                raise EarVAEError(f"no config {value!r}: {meant}give a file, or one of {', '.join(shipped)}")
            result.append(f"--config={value}")
            continue
        names = [value] if based or value == _BASE else [_BASE, value]
        based = True
        result += [f"--config={shipped[name]}" for name in names]
    return result


def _require_folders(arguments: Sequence[str]) -> None:
    """Checks that there is a folder of data, and that all of them exist, from configs and options.

    Raises:
        EarVAEError: None is given, or one of them does not exist.
    """
    found: dict[str, Any] = {}
    is_all = True
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        group, _, name = option.partition(".")
        if option == "--config":
            try:
                data = (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}).get("data") or {}
                found |= {n: v for n, v in data.items() if n in ("folder", "validation_folder")}
            except (OSError, ValueError, AttributeError, yaml.YAMLError):
                is_all = False  # for the parser to complain about
        elif group == "--data" and name in ("folder", "validation_folder"):
            found[name] = value if equals else next(rest, None)
        elif option == "--data":
            is_all = False
    if is_all and "folder" not in found:
        data = [a.partition("=")[0].removeprefix("--data.") for a in arguments if a.startswith("--data.")]
        near = difflib.get_close_matches("folder", data, n=1)
        meant = f" (you wrote --data.{near[0]})" if near else ""
        raise EarVAEError(
            f"give the music to train on: --data.folder MUSIC{meant}; ear-vae fit --help lists the options"
        )
    for name, value in found.items():
        text = isinstance(value, str) and value.startswith("[")
        paths = _list_in(value) if text else value
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and path != "null" and not Path(path).exists():
                raise EarVAEError(f"--data.{name}: {path}: no such file or folder")


def _list_in(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None  # for the parser to complain about
