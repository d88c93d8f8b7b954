"""`ear-vae fit`: the Lightning command line over our module and data."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ear_vae.errors import EarVAEError
from ear_vae.training.callbacks import Checkpoints, ExportModel, ListeningExamples
from ear_vae.training.checkpoint import read_checkpoint
from ear_vae.training.data import AudioDataModule
from ear_vae.training.module import EarVAEModule

_LOG = logging.getLogger(__name__)
_BASE = "base"
_EXIT_TERMINATED = 128 + signal.SIGTERM
_EXIT_INTERRUPTED = 128 + signal.SIGINT


class FitCLI(LightningCLI):
    """LightningCLI that gives the data the model's rate and frame length, and exports the model."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses what it is given; the parent also looks at `sys.argv` and warns that the two differ.

        Raises:
            EarVAEError: The checkpoint to resume from cannot be.
        """
        assert isinstance(args, list), "main passes a list"
        self.config = parser.parse_args(args)
        # Held back until the options are final: the parent replaces some of them by what stands under
        # `hyper_parameters` in a checkpoint.
        self._checkpoint: str | None = None
        if options := self._options_of_fit():
            self._checkpoint, options.ckpt_path = options.ckpt_path, None
        if self._checkpoint is not None:
            read_checkpoint(Path(self._checkpoint))

    def before_instantiate_classes(self) -> None:
        """Gives back the checkpoint to resume from."""
        if options := self._options_of_fit():
            options.ckpt_path = self._checkpoint

    def _options_of_fit(self) -> Any:
        """None where the parts are only built (`run=False`)."""
        return self.config.get("fit")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what the model decides about the data, and adds our callbacks."""
        for target, fact in (("sample_rate", _sample_rate), ("segment_multiple", _downsampling_ratio)):
            parser.link_arguments("model", f"data.{target}", compute_fn=fact, apply_on="instantiate")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(ListeningExamples, "examples")


def main(arguments: Sequence[str]) -> int:
    """Runs `ear-vae fit`.

    Args:
        arguments: What follows `fit`. `--config` takes the name of a shipped config or a file, any number
            of times; later ones override earlier ones. Before the first shipped one comes `base`. A config
            file is code: it names classes to be imported and called (`class_path`).

    Returns:
        0, or 143 when the process was told to terminate, 130 when it was interrupted; it has written a
        checkpoint to resume from then.

    Raises:
        EarVAEError: No such config, or anything that the module or the data refuses.
        SystemExit: Usage errors, as argparse raises them.
    """
    # Lightning's own, to its authors.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    interrupts: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: _interrupt(interrupts, number))
    try:
        FitCLI(
            EarVAEModule,
            AudioDataModule,
            # Last, so that nothing overrides it: a checkpoint to resume from must not run code.
            args=["fit", *_with_shipped_configs(arguments), "--weights_only=true"],
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )
    except MisconfigurationException as error:
        raise EarVAEError(" ".join(str(error).split())) from error
    except SIGTERMException:
        _LOG.warning("stopped after writing a checkpoint; go on with --ckpt_path FOLDER/last.ckpt")
        return _EXIT_INTERRUPTED if interrupts else _EXIT_TERMINATED
    finally:
        signal.signal(signal.SIGINT, usual)
    return 0


def _interrupt(interrupts: list[int], number: int) -> None:
    """The first Ctrl-C lets the step end and a checkpoint be written, as SIGTERM does."""
    interrupts.append(number)
    if len(interrupts) == 1 and callable(signal.getsignal(signal.SIGTERM)):
        _LOG.warning("interrupted: ending the step and writing a checkpoint; once more to stop at once")
        signal.raise_signal(signal.SIGTERM)
    else:
        raise KeyboardInterrupt


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    folder = Path(str(files("ear_vae.training") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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
                raise EarVAEError(f"no config {value!r}: give a file, or one of {', '.join(shipped)}")
            result.append(f"--config={value}")
            continue
        names = [value] if based or value == _BASE else [_BASE, value]
        based = True
        result += [f"--config={shipped[name]}" for name in names]
    return result


def _sample_rate(module: EarVAEModule) -> int:
    return module.vae.sample_rate


def _downsampling_ratio(module: EarVAEModule) -> int:
    return module.vae.downsampling_ratio
