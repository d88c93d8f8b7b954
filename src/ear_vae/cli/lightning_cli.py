"""Lightning's command line for our module and data, which `ear-vae fit` runs."""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ear_vae.cli.fit import HELP
from ear_vae.cli.terminal import say
from ear_vae.errors import EarVAEError
from ear_vae.training.callbacks import Checkpoints, ExportModel, ListeningExamples, StepProgressBar
from ear_vae.training.checkpoint_reading import read_checkpoint
from ear_vae.training.data import AudioDataModule
from ear_vae.training.module import EarVAEModule

# What Lightning says that is not about the run, or that the bar shows: advertisements, remarks on a logger
# that it rightly does without, accelerators that are not there, the last step, and the signal that stands for
# Ctrl-C within it. Below, the loggers that say so.
_NOISE = (
    "Tip:",
    "tensorboardX",
    "litlogger",
    "litmodels",
    "TPU available: False",
    "stopped: `max_steps=",
    "Received SIGTERM",
    "Seed set to",
)
_TALKATIVE = (
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.signal_connector",
)


class FitCLI(LightningCLI):
    """LightningCLI that gives the data the model's rate and frame length, and exports the model.

    Args:
        overwrite: Replace the checkpoints and the model of another run in the same folder.
        settings: Arguments of `LightningCLI`.
    """

    def __init__(self, *arguments: Any, overwrite: bool = False, **settings: Any) -> None:
        self.overwrite = overwrite
        super().__init__(*arguments, **settings)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns only `fit` of Lightning's commands."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the given arguments; the parent also looks at `sys.argv` and warns where the two differ.

        Raises:
            EarVAEError: The checkpoint cannot be resumed from, or the folder holds another run.
        """
        assert isinstance(args, list), "main passes a list"
        try:
            self.config = parser.parse_args(args)
        except SystemExit as error:
            if error.code and (meant := self._meant(args)):
                say(f"did you mean {meant}?")
            raise
        # Held back until the options are final: the parent replaces some of them by what stands under
        # `hyper_parameters` in a checkpoint.
        self._checkpoint: str | None = None
        if options := self._options_of_fit():
            self._checkpoint, options.ckpt_path = options.ckpt_path, None
        if self._checkpoint is not None:
            read_checkpoint(Path(self._checkpoint))
        if options and not self.overwrite:
            self._require_no_other_run()

    def before_instantiate_classes(self) -> None:
        """Restores the checkpoint to resume from, which `parse_arguments` held back."""
        if options := self._options_of_fit():
            options.ckpt_path = self._checkpoint

    def instantiate_trainer(self, **settings: Any) -> Any:
        """Builds the Trainer, with our progress bar unless there is another one or none is wanted."""
        given = self._options_of_fit()
        callbacks = (given or self.config).trainer.callbacks or []
        others = [c for c in callbacks if "ProgressBar" in str(getattr(c, "class_path", ""))]
        if given and given.trainer.enable_progress_bar is not False and not others:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [StepProgressBar()]}
        return super().instantiate_trainer(**settings)

    @property
    def last_checkpoint(self) -> Path:
        """Path of the run's newest checkpoint."""
        return self._folder("checkpoints", "checkpoints") / "last.ckpt"

    @property
    def model_folder(self) -> Path:
        """Folder of the model that the run exports."""
        return self._folder("export", "model")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links the settings of the data that follow from the model, and adds our callbacks."""
        for target, fact in (("sample_rate", _sample_rate), ("segment_multiple", _downsampling_ratio)):
            parser.link_arguments("model", f"data.{target}", compute_fn=fact, apply_on="instantiate")
        self._parser_of_fit = parser
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(ListeningExamples, "examples")

    def _meant(self, arguments: Sequence[str]) -> str | None:
        """Returns the option nearest to the first one that there is not."""
        defaults = self._parser_of_fit.get_defaults(skip_validation=True)
        options = {f"--{name}" for name in defaults.keys()}  # noqa: SIM118 - no mapping, cannot be iterated
        options |= set(re.findall(r"--[\w.]+", HELP))
        above = tuple(f"{option}." for option in options)
        for argument in arguments:
            name = argument.partition("=")[0]
            # Below some options, as of a class that is named, lie more than are listed.
            if name.startswith("--") and name not in options and not name.startswith(above):
                return next(iter(difflib.get_close_matches(name, options, n=1, cutoff=0.8)), None)
        return None

    def _options_of_fit(self) -> Any:
        """Returns the options of `fit`; None where the parts are only built (`run=False`)."""
        return self.config.get("fit")

    def _folder(self, group: str, name: str) -> Path:
        options = self._options_of_fit()
        return Path(options[group].directory or Path(options.trainer.default_root_dir or "") / name)

    def _require_no_other_run(self) -> None:
        """Refuses to write over what another run left.

        Raises:
            EarVAEError: The folder holds a checkpoint or a model of another run.
        """
        last, model = self.last_checkpoint, self.model_folder
        if self._checkpoint is not None and Path(self._checkpoint).resolve().parent == last.resolve().parent:
            return
        there = [path for path in (last, model / "config.json") if path.exists()]
        if there:
            go_on = f"go on with it (--ckpt_path {shlex.quote(str(last))}), " if last.exists() else ""
            raise EarVAEError(
                f"{there[0]}: left by another run, which this one would replace; {go_on}"
                "choose another folder (--trainer.default_root_dir FOLDER), or replace it (--force)"
            )


def train(arguments: Sequence[str], typed: Sequence[str], *, overwrite: bool = False) -> int:
    """Trains with Lightning's command line.

    Args:
        arguments: Options of the command, with paths for the names of configs.
        typed: Options as the user typed them, for the command that resumes the run.
        overwrite: Replace the checkpoints and the model of another run in the same folder.

    Returns:
        0, or 128 and the number of the signal that ended the training, after a checkpoint was written.

    Raises:
        EarVAEError: Anything that the module or the data refuses.
        SystemExit: Usage errors, as argparse raises them.
    """
    # Meant for Lightning's authors.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*tensorboardX.*")
    # Steps are counted over epochs, so that short ones are logged as often as long ones.
    warnings.filterwarnings("ignore", message=r".*smaller than the logging interval.*")
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(_is_about_this_run)
    received: list[int] = []
    usual = {number: signal.signal(number, lambda n, _: _end(received, n)) for number in _heeded()}
    cli: FitCLI | None = None

    class Remembered(FitCLI):
        """Makes itself known before training starts; its constructor returns only after training."""

        def before_fit(self) -> None:
            nonlocal cli
            cli = self
            if self.trainer.is_global_zero:
                say(_what_is_trained(self.model, self.trainer))

    try:
        Remembered(
            EarVAEModule,
            AudioDataModule,
            overwrite=overwrite,
            # Last, so that nothing overrides it: a checkpoint to resume from must not run code.
            args=["fit", *arguments, "--weights_only=true"],
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            # Its table counts the average of the weights as a second model, and operations as none.
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={
                "prog": "ear-vae",
                "allow_abbrev": False,
                "fit": {"allow_abbrev": False, "usage": "ear-vae fit [--config NAME_OR_FILE] [options]"},
            },
        )
    except MisconfigurationException as error:
        text = " ".join(str(error).split())
        if "supported gpu backend" in text:
            text = (
                "torch sees no GPU here (ear-vae env says why); for a CPU give --config one_cpu in place of "
                "the config of the machine, or --trainer.accelerator cpu"
            )
        raise EarVAEError(text) from error
    except SIGTERMException:
        _say_what_is_where(cli, typed, stopped=True)
        return 128 + (received[0] if received else signal.SIGTERM)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for logger in loggers:
            logger.removeFilter(_is_about_this_run)
    _say_what_is_where(cli, typed, stopped=False)
    return 0


def _what_is_trained(module: EarVAEModule, trainer: Any) -> str:
    """Says which networks train, how large they are, and where."""
    networks = {"model": module.vae, "discriminator": module.discriminator}
    sizes = [
        f"{name} of {sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2g} M weights"
        for name, network in networks.items()
        if network is not None
    ]
    device = trainer.strategy.root_device
    first = "; compiling first, which takes up to a minute" if module.compiled else ""
    return f"training a {' and a '.join(sizes)} on {device}, up to step {trainer.max_steps}{first}"


def _say_what_is_where(cli: FitCLI | None, typed: Sequence[str], *, stopped: bool) -> None:
    if cli is None or not cli.trainer.is_global_zero:
        return
    if (cli.model_folder / "config.json").exists():
        say(f"model: {cli.model_folder}")
    if not cli.last_checkpoint.exists():
        return
    options = ["--ckpt_path", str(cli.last_checkpoint)]
    steps = cli.trainer.max_steps
    if not stopped and steps > 0:
        options += ["--trainer.max_steps", str(2 * steps)]
    left_out = ("--ckpt_path", "--trainer.max_steps") if len(options) > 2 else ("--ckpt_path",)
    command = shlex.join(["ear-vae", "fit", *_without(typed, left_out), *options])
    say(f"{'stopped after writing a checkpoint; resume' if stopped else 'train further'} with: {command}")


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the arguments without those options and their values."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in names:
            next(rest, None)
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return [argument for argument in kept if argument != "--force"]


def _heeded() -> list[int]:
    """Returns the signals after which a checkpoint is written, besides SIGTERM, which Lightning handles."""
    # Windows has no SIGHUP, which a terminal sends when it closes. What is ignored, as by nohup, stays so.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _end(received: list[int], number: int) -> None:
    """Ends the step and writes a checkpoint on the first signal, as on SIGTERM; stops on the second."""
    received.append(number)
    if len(received) == 1 and callable(signal.getsignal(signal.SIGTERM)):
        if number == signal.SIGINT:
            say("ear-vae: interrupted: ending the step and writing a checkpoint; once more to stop at once")
        signal.raise_signal(signal.SIGTERM)
    else:
        raise KeyboardInterrupt


def _is_about_this_run(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _NOISE)


def _sample_rate(module: EarVAEModule) -> int:
    return module.vae.sample_rate


def _downsampling_ratio(module: EarVAEModule) -> int:
    return module.vae.downsampling_ratio
