"""The LightningModule that trains an εar-VAE."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ear_vae._dtype import available_device
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError, first_line
from ear_vae.evaluation import ReconstructionMetrics
from ear_vae.limits import escaped, finite_number, whole_number
from ear_vae.losses import ReconstructionObjective, adversarial
from ear_vae.losses.balancer import LossBalancer
from ear_vae.losses.objective import (
    ADVERSARIAL_TERMS,
    DEFAULT_LOSS_WEIGHTS,
    DEFAULT_WINDOW_SIZES,
    MagnitudeChannels,
    Weighting,
)
from ear_vae.network.blocks import Snake
from ear_vae.network.discriminator import Discriminator, DiscriminatorConfig
from ear_vae.network.snake import compile_snake_with_gradients
from ear_vae.training import filter_bank
from ear_vae.training.checkpoint_reading import (
    FACTS,
    changes,
    read_checkpoint,
    require_content,
    require_like,
    require_moments,
    require_own_files,
    require_state,
)
from ear_vae.training.data import AudioDataModule
from ear_vae.training.ema import EMA
from ear_vae.training.optimization import OptimizerConfig, SkippedSteps, skips_by_itself, trained
from ear_vae.training.training_state import load_training_state, restore_moments
from ear_vae.training.weight_norm import apply_weight_norm, load_plain_weights, plain_weights
from ear_vae.vae import EarVAE, Reconstruction

_LOG = logging.getLogger(__name__)
_FILTER_BANK_SEGMENTS = 192
_FILTER_BANK_FRAMES = 96
# Terms that do not depend on the rebuilt audio; the balancer leaves them as they are.
_PENALTIES = ("kl",)
# Arguments that say where the model comes from.
_ORIGINS = {"config", "pretrained", "variant", "training_state", "initialization"}
_VALIDATION_METRICS = ("si_sdr_db", "mel_distance", "stft_distance", "icpc", "ccpc")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective: loss terms, their weights and how they are computed.

    Args:
        weights: Weights of loss terms by name; other terms keep those of
            `losses.objective.DEFAULT_LOSS_WEIGHTS`.
        window_sizes: STFT window sizes in samples.
        weighting: Filter ahead of the reconstruction terms: `k`, `a` or `none`.
        magnitude_channels: Channels whose magnitudes are compared: mid, side, left and right (`mslr`), or
            left and right alone (`lr`).
        balanced: Make each weight a share of the gradient on the rebuilt audio (`losses.balancer`).
    """

    weights: dict[str, float] = field(default_factory=dict)
    window_sizes: tuple[int, ...] = DEFAULT_WINDOW_SIZES
    weighting: Weighting = "k"
    magnitude_channels: MagnitudeChannels = "mslr"
    balanced: bool = False


class _Optimization(NamedTuple):
    optimizer: Any
    schedule: Any
    parameters: list[nn.Parameter]
    clip: float
    what: str


@dataclass
class _Accumulation:
    """The batches of a step so far.

    Attributes:
        batches: Audio of the batches, each [B, 2, T].
        values: Values to log, summed over the batches.
    """

    batches: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value.detach()


class EarVAEModule(L.LightningModule):
    """The VAE, its discriminator and the losses, for `lightning.Trainer`.

    Each step trains the discriminator on the detached output of the VAE, then the VAE on the same output.
    `Trainer(max_steps=...)`, checkpoints and schedules count the steps of the VAE. All randomness of a
    step follows from `seed` and its number, so that a resumed run continues as if it had never stopped.

    Weight norm is applied at construction and folded away by `export`, so that neither the files nor the
    public class know of it. Terms are logged as `train/NAME` and `validation/NAME`; validation uses
    the average of the weights where there is one, which is what `export` writes.

    Args:
        config: Architecture of a new model; the published one by default.
        pretrained: Name or folder of a model to continue from, instead of `config`.
        variant: Which model of `pretrained` to take, where it holds several.
        training_state: File that `ear-vae release --training-state` wrote beside `pretrained`: the raw
            weights, discriminator and optimizers to continue with.
        objective: Loss terms and their weights.
        optimizer: Optimizer and learning-rate schedule of the VAE.
        discriminator: Architecture of the discriminator; without one the adversarial terms are left out, and
            may not be given weights.
        discriminator_optimizer: Optimizer and learning-rate schedule of the discriminator, if there is one.
        adversarial_after: Number of steps in which a discriminator learns before its terms count.
        accumulate_grad_batches: Number of batches whose gradients make one step, as if they were one batch of
            that many times the size. With a discriminator the VAE runs forward twice for each of them,
            because the discriminator takes its step before the VAE's gradient is computed.
        ema_decay: Decay of the exponential moving average of the VAE's weights; 0 for no average.
        train_encoder: Whether the encoder is trained; False keeps it, and with it the latents, exactly as it
            is.
        initialization: Start of a new model: `random`, the default, or `filter_bank` (see
            `ear_vae.training.filter_bank`), which needs the Trainer's data to choose its bands from.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them, see
            `EarVAE.gradient_checkpointing`.
        compiled: Compile the activation (on a CPU) and the reconstruction terms (where they are not balanced)
            before the first step, which takes up to a minute; where torch cannot, there is a warning.
        max_skipped_steps: Number of consecutive steps with a gradient that is not finite that ends training.
        seed: Seed of the draws from the posterior.

    Raises:
        EarVAEError: An argument that would do nothing beside the others, such as both `config` and
            `pretrained`; an unknown loss term, no terms, or a value out of range.
    """

    def __init__(
        self,
        config: EarVAEConfig | None = None,
        pretrained: str | None = None,
        variant: str | None = None,
        training_state: str | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        discriminator: DiscriminatorConfig | None = None,
        discriminator_optimizer: OptimizerConfig = OptimizerConfig(),
        adversarial_after: int = 0,
        accumulate_grad_batches: int = 1,
        ema_decay: float = 0.999,
        train_encoder: bool = True,
        initialization: Literal["random", "filter_bank"] | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        max_skipped_steps: int = 20,
        seed: int = 0,
        *,
        _vae: EarVAE | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if initialization not in (None, "random", "filter_bank"):
            raise EarVAEError(f"initialization must be random or filter_bank, got {initialization!r}")
        if not finite_number(ema_decay) or not 0 <= ema_decay < 1:
            raise EarVAEError(f"ema_decay must be in [0, 1), got {ema_decay}")
        lowest = {"accumulate_grad_batches": 1, "adversarial_after": 0, "max_skipped_steps": 1, "seed": 0}
        given = (accumulate_grad_batches, adversarial_after, max_skipped_steps, seed)
        for (name, least), value in zip(lowest.items(), given, strict=True):
            whole_number(value, name, lowest=least)
        if accumulate_grad_batches > 1 and objective.balanced:
            raise EarVAEError(
                "objective.balanced takes the gradients of a whole batch: accumulate_grad_batches must be 1"
            )
        if _vae is not None:
            pass  # from a checkpoint, which was made with arguments that fitted
        elif pretrained is None:
            if not train_encoder:
                raise EarVAEError("an encoder that is not trained must come from a pretrained model")
            if variant is not None:
                raise EarVAEError("variant chooses among the models of pretrained, which is missing")
            if training_state is not None:
                raise EarVAEError(
                    "training_state goes on with the model that was released with it; give that as pretrained"
                )
        elif config is not None:
            raise EarVAEError("give either a config for a new model or a pretrained one to continue from")
        elif initialization is not None:
            raise EarVAEError("initialization is for a new model; a pretrained one has its weights")
        if config is not None and config.latents_mean is not None:
            raise EarVAEError("a new model has no latents yet: leave latents_mean and latents_std out")
        weights = _weights_in_use(
            objective.weights, discriminator is not None, adversarial_after, train_encoder
        )
        if _vae is not None:
            self.vae = _vae
        elif pretrained is None:
            self.vae = EarVAE(config)
        else:
            self.vae = _pretrained(pretrained, variant)
        if train_encoder:
            # Its latents will be others.
            self.vae.config = replace(self.vae.config, latents_mean=None, latents_std=None)
        if self.vae.audio_channels != 2:
            raise EarVAEError(
                f"training compares left and right: audio_channels must be 2, got {self.vae.audio_channels}"
            )
        self.vae.train().requires_grad_(True)
        self.vae.gradient_checkpointing = gradient_checkpointing
        self.ema = EMA(self.vae, ema_decay) if ema_decay else None
        self.initialization = initialization or ("random" if pretrained is None else "pretrained")
        self.train_encoder = train_encoder
        self.vae.encoder.requires_grad_(train_encoder)
        # A kernel g · v / ‖v‖ is rounded again: what must not change by a bit gets no weight norm.
        apply_weight_norm(self.vae if train_encoder else self.vae.decoder)
        self.objective = ReconstructionObjective(
            self.vae.sample_rate,
            weights=weights,
            window_sizes=objective.window_sizes,
            weighting=objective.weighting,
            magnitude_channels=objective.magnitude_channels,
        )
        self.discriminator = None if discriminator is None else Discriminator(discriminator)
        self.metrics = ReconstructionMetrics(self.vae.sample_rate, _VALIDATION_METRICS)
        if objective.balanced and not self._terms_of_output():
            raise EarVAEError(
                f"objective.balanced has nothing to balance: only {', '.join(_PENALTIES)} has a weight"
            )
        self.balancer = LossBalancer(self._terms_of_output()) if objective.balanced else None
        self.optimizer_config = optimizer
        self.discriminator_optimizer_config = discriminator_optimizer
        self.adversarial_after = adversarial_after
        self.seed = seed
        self.training_state = training_state
        self.accumulate_grad_batches = accumulate_grad_batches
        self.compiled = compiled
        self._from_checkpoint = _vae is not None
        self._accumulation = _Accumulation()
        self._accumulated_gradients: dict[str, Tensor] = {}
        self._moments: dict[str, Any] | None = None
        self.skipped = {name: SkippedSteps(max_skipped_steps) for name in ("vae", "discriminator")}
        # As a dictionary, because the command line would add the classes that it built them from.
        self.save_hyperparameters(
            {
                "config": self.vae.config.to_dict(),
                "pretrained": pretrained,
                "variant": variant,
                "objective": _plain(asdict(objective)),
                "optimizer": _plain_optimizer(optimizer),
                "discriminator": None if discriminator is None else _plain(asdict(discriminator)),
                "discriminator_optimizer": _plain_optimizer(discriminator_optimizer),
                "adversarial_after": adversarial_after,
                "accumulate_grad_batches": accumulate_grad_batches,
                "ema_decay": ema_decay,
                "train_encoder": train_encoder,
                "gradient_checkpointing": gradient_checkpointing,
                "compiled": compiled,
                "max_skipped_steps": max_skipped_steps,
                "seed": seed,
            }
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # narrower: nothing is imported by name, or unpickled
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device = "cpu",
        *,
        weights_only: bool | None = True,
        **settings: Any,
    ) -> EarVAEModule:
        """Builds the module that wrote a checkpoint, with its weights.

        To continue training exactly, give the checkpoint to `Trainer.fit(ckpt_path=...)`, which restores
        optimizers and counters. An optimizer or schedule given by class is not in the file; give it again.

        Args:
            checkpoint_path: A `.ckpt` file that `ear-vae fit` or a Trainer wrote.
            map_location: Device to put the module on.
            weights_only: Must not be false: a checkpoint is never unpickled.
            settings: Arguments of the constructor to use instead of those in the checkpoint, but for where
                the model comes from, which is the checkpoint.

        Raises:
            EarVAEError: The checkpoint is unreadable, damaged, names classes to import, was written by
                another program, or does not fit the settings; or there is no such device.
        """
        if elsewhere := sorted(settings.keys() & _ORIGINS):
            raise EarVAEError(f"{', '.join(elsewhere)}: the model is that of the checkpoint; leave it out")
        device = available_device(map_location)
        if weights_only is False:
            raise EarVAEError("weights_only must not be false: a checkpoint is never unpickled")
        path = Path(checkpoint_path)
        content = read_checkpoint(path)
        try:
            given = _from_plain(content["hyper_parameters"])
            module = cls(**{**given, **settings}, _vae=EarVAE(given.pop("config")))
        except (TypeError, KeyError, AttributeError) as error:
            raise EarVAEError(f"{path}: does not fit this version or the settings: {error}") from error
        except EarVAEError as error:
            raise EarVAEError(f"{path}: {error}") from error
        require_state(path, content["state_dict"], module.state_dict())
        module.load_state_dict(content["state_dict"])
        return module.to(device)

    def setup(self, stage: str) -> None:
        """Starts a new model from the filter bank or a training state, unless a checkpoint is resumed from.

        Raises:
            EarVAEError: The training state does not fit, or there is no data to choose the filters by.
        """
        if stage != "fit" or self.trainer.ckpt_path is not None or self._from_checkpoint:
            return
        if self.initialization == "filter_bank":
            self._start_from_filter_bank(getattr(self.trainer, "datamodule", None))
        if self.training_state is not None:
            self._moments = load_training_state(self, Path(self.training_state))

    def configure_optimizers(self) -> Any:
        """Builds the optimizer of the VAE, and that of the discriminator."""
        settings = (self.optimizer_config, self.discriminator_optimizer_config)
        built = [
            config.build(trained(network), self._total_steps())
            for network, config in zip(self._networks().values(), settings, strict=False)
        ]
        if self._moments is not None:
            for (name, network), (optimizer, _) in zip(self._networks().items(), built, strict=True):
                restore_moments(optimizer, network, self._moments.get(name, {}))
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]

    def forward(self, audio: Tensor) -> Reconstruction:
        """Rebuilds audio [B, 2, T] as `reconstruct` does."""
        return self.reconstruct(audio)

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        """Trains on a batch [B, 2, T]; with the last one of a step, steps the discriminator, then the VAE."""
        optimizations = self._optimizations()
        accumulation = self._accumulation
        if not accumulation.batches:
            for optimization in optimizations:
                optimization.optimizer.zero_grad()
        place = sum(map(len, accumulation.batches))
        accumulation.batches.append(batch)
        is_last = len(accumulation.batches) == self.accumulate_grad_batches
        if self.discriminator is None:
            self._vae_gradient(batch, self._reconstruct_draw(batch, place))
        else:
            # The VAE's gradient waits for the discriminator's step, and that for the last of the batches.
            with torch.set_grad_enabled(self.accumulate_grad_batches == 1):
                drawn = self._reconstruct_draw(batch, place)
            judged_estimate = self.discriminator(drawn.audio.detach())
            loss = adversarial.discriminator_loss(judged_estimate, self.discriminator(batch))
            accumulation.add({"discriminator": loss})
            self._backward(loss, "discriminator")
        if is_last:
            self._step(optimizations, drawn if self.discriminator is not None else None)

    def _step(self, optimizations: list[_Optimization], drawn: Reconstruction | None) -> None:
        """Ends a step whose batches are complete.

        Args:
            optimizations: Optimizers of the VAE and of the discriminator, if there is one.
            drawn: Output for the last batch, where the VAE's gradient has yet to be computed.
        """
        accumulation, self._accumulation = self._accumulation, _Accumulation()
        of_vae, *others = optimizations
        norms = {other.what: self._clip(other) for other in others}
        for other in others:
            self._step_if_finite(other, norms[other.what])
        if drawn is not None:
            place = 0
            for batch in accumulation.batches:
                if self.accumulate_grad_batches > 1:
                    drawn = self._reconstruct_draw(batch, place)
                self._vae_gradient(batch, drawn, accumulation)
                place += len(batch)
        norms["vae"] = self._clip(of_vae)
        # Waits for the device, once a step.
        finite = dict(zip(norms, torch.stack(list(norms.values())).isfinite().tolist(), strict=True))
        if finite["vae"]:
            # Lightning counts the steps of its own wrapper only: those of the VAE.
            of_vae.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.vae)
        for optimization in optimizations:
            if finite[optimization.what]:
                optimization.schedule.step()
        for what, is_finite in finite.items():
            self.skipped[what].count(is_finite, what)
        logged = {name: value / self.accumulate_grad_batches for name, value in accumulation.values.items()}
        logged |= {
            f"{'' if what == 'vae' else what + '_'}gradient_norm": norm for what, norm in norms.items()
        }
        self._log_values("train", logged)
        self.log("train/skipped_steps", float(sum(s.total for s in self.skipped.values())))
        self.log("train/learning_rate", of_vae.schedule.get_last_lr()[0])
        for other in others:
            self.log(f"train/{other.what}_learning_rate", other.schedule.get_last_lr()[0])
        self._log_step()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        """Measures terms and the paper's metrics on audio [1, 2, T], decoded from the posterior's mean."""
        self._evaluate("validation", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all excerpts that have them."""
        self._log_metrics("validation")

    def test_step(self, batch: Tensor, batch_index: int) -> None:
        """Measures what `validation_step` does, and logs it as `test/NAME`."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics over all excerpts that have them."""
        self._log_metrics("test")

    def predict_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Rebuilds audio [B, 2, T] from the posterior's mean; returns [B, 2, T]."""
        return self.reconstruct(batch).audio

    def _evaluate(self, stage: str, batch: Tensor) -> None:
        estimate, posterior = self.reconstruct(batch)
        if not bool(estimate.isfinite().all()):
            raise EarVAEError(
                f"the model rebuilds a {stage} excerpt as NaN or infinity: training has diverged; go on from "
                "an earlier checkpoint with a lower learning rate"
            )
        terms = self.objective.terms(estimate, batch, posterior)
        terms["total"] = self.objective.total(terms)
        self._log_values(stage, terms)
        self.metrics.update(estimate, batch)

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.metrics.compute().items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=True)
        self.metrics.reset()
        if stage == "validation":
            self._log_step()

    def _log_step(self) -> None:
        """Logs against the steps of the VAE where Lightning would count batches."""
        if self.accumulate_grad_batches > 1:
            self.log("step", float(self.trainer.global_step))

    def _total_steps(self) -> int:
        """Returns the number of steps of the VAE that the Trainer will take."""
        steps = min(self.trainer.estimated_stepping_batches, 2**31)
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            batches = self.trainer.max_epochs * self.trainer.num_training_batches
            steps = min(steps, max(1, batches // self.accumulate_grad_batches))
        return int(steps)

    def reconstruct(self, audio: Tensor) -> Reconstruction:
        """Rebuilds audio [B, 2, T] from the posterior's mean, with the average of the weights if any."""
        vae = self.vae if self.ema is None else self.ema.network
        reconstruction: Reconstruction = vae(audio)
        return reconstruction

    def on_train_start(self) -> None:
        """Refuses data at another rate than the model's, and continues a step that was interrupted.

        Raises:
            EarVAEError: The data is at another rate.
        """
        rate = getattr(getattr(self.trainer, "datamodule", None), "sample_rate", self.vae.sample_rate)
        if rate != self.vae.sample_rate:
            raise EarVAEError(f"the data is at {rate} Hz, the model works at {self.vae.sample_rate} Hz")
        # Here, because the parameters are on their device now.
        parameters = dict(self.named_parameters())
        for name, gradient in self._accumulated_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._accumulated_gradients = {}
        accumulation = self._accumulation
        accumulation.batches = [batch.to(self.device) for batch in accumulation.batches]
        accumulation.values = {name: value.to(self.device) for name, value in accumulation.values.items()}

    def folded(self, name: str | None = None, *, averaged: bool = True) -> EarVAE:
        """Copies the model as users load it: plain weights, evaluation mode, frozen, on the CPU.

        Args:
            name: Name of the copy; that of the model by default.
            averaged: Take the average of the weights, where there is one, instead of the last ones.
        """
        source = self.ema.network if averaged and self.ema is not None else self.vae
        vae = EarVAE(self.vae.config, name=name or self.vae.name)
        vae.load_state_dict(plain_weights(source, vae.state_dict()))
        return vae.eval().requires_grad_(False)

    def on_fit_start(self) -> None:
        """Refuses a precision that keeps the weights in too few bits; compiles what is to be compiled.

        Raises:
            EarVAEError: The Trainer's precision is `bf16-true`, `16-true` or the like.
        """
        self._require_full_weights()
        if self.compiled:
            self._compile()

    def on_validation_start(self) -> None:
        """As `on_fit_start`."""
        self._require_full_weights()

    def on_test_start(self) -> None:
        """As `on_fit_start`."""
        self._require_full_weights()

    def _require_full_weights(self) -> None:
        # A step of one part in ten thousand rounds away in 8 bits, in the average most of all, and with the
        # weights Lightning converts the windows of the transforms.
        short = {p.dtype for p in self.parameters()} - {torch.float32, torch.float64}
        if short:
            raise EarVAEError(
                f"the Trainer's precision keeps the weights in {', '.join(map(str, short))}, in which small "
                "steps are lost; use precision bf16-mixed, or 32-true"
            )

    def _compile(self) -> None:
        try:
            if self.device.type == "cpu":
                compile_snake_with_gradients()
            # The balancer asks for the gradient of each term, one after the other.
            if self.balancer is None:
                self.objective.compile_terms()
        except (RuntimeError, OSError) as error:
            warnings.warn(f"trains without being compiled: {first_line(error, most=2)}", stacklevel=2)
            return
        for module in self.vae.modules():
            if isinstance(module, Snake):
                # On CUDA it is one pass already, and takes no notice.
                module.compiled_with_gradients = True

    def export(self, directory: str | Path) -> None:
        """Writes the trained model as a folder that `EarVAE.from_pretrained` loads.

        Raises:
            EarVAEError: The folder cannot be written to, or the weights hold NaN or infinity.
        """
        vae = self.folded(Path(directory).name)
        if broken := [name for name, tensor in vae.state_dict().items() if not bool(tensor.isfinite().all())]:
            raise EarVAEError(
                f"{directory}: not written: {len(broken)} weights hold NaN or infinity, such as {broken[0]}; "
                "go on from an earlier checkpoint with a lower learning rate"
            )
        vae.save_pretrained(directory)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds facts that identify the model, and those that a release needs."""
        metrics = self.trainer.callback_metrics
        checkpoint[FACTS] = {
            **self._facts(),
            "skipped": [counter.total for counter in self.skipped.values()],
            "skipped in a row": [counter.in_a_row for counter in self.skipped.values()],
            "accumulated": self._accumulated(),
            "trained": {what: _trained_names(network) for what, network in self._networks().items()},
            "settings": self._settings(),
            "validation": {n: float(v) for n, v in metrics.items() if n.startswith("validation/")},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture, and warns of settings that have changed.

        Raises:
            EarVAEError: The checkpoint's architecture differs, it is damaged or not one of this module.
        """
        saved = dict(checkpoint.get(FACTS) or {})
        facts = self._facts()
        different = [name for name in facts if saved.get(name) != facts[name]]
        if different:
            raise EarVAEError(
                "the checkpoint is of another architecture or training: "
                + escaped("; ".join(_difference(name, saved.get(name), facts[name]) for name in different))
                + "; resume with the config it was made with, or start from the model it exported"
            )
        where = self.trainer.ckpt_path or "the checkpoint"
        require_content(where, checkpoint)
        require_state(where, checkpoint["state_dict"], self.state_dict())
        require_moments(where, checkpoint)
        folders = [callback.dirpath for callback in self.trainer.checkpoint_callbacks]  # type: ignore[attr-defined]
        require_own_files(where, checkpoint.get("callbacks", {}), folders)
        self._require_schedules(where, checkpoint["lr_schedulers"])
        counts = zip(self.skipped.values(), saved["skipped"], saved["skipped in a row"], strict=False)
        for counter, total, in_a_row in counts:
            counter.total, counter.in_a_row = total, in_a_row
        self._take_up(where, saved["accumulated"])
        changed = changes(saved["settings"], self._settings())
        if changed and self.trainer.is_global_zero:
            _LOG.warning(
                "resuming with other settings than the checkpoint's: %s; of an optimizer's, learning_rate, "
                "betas and weight_decay stay as they are in the checkpoint",
                changed,
            )

    def _require_schedules(self, where: str | Path, saved: Sequence[Any]) -> None:
        settings = (self.optimizer_config, self.discriminator_optimizer_config)
        for config, state in zip(settings, saved, strict=False):
            # Of one weight: only what its state looks like is wanted.
            _, schedule = config.build([nn.Parameter(torch.zeros(1, 1))], 1)
            require_like(where, state, schedule)

    def _facts(self) -> dict[str, Any]:
        """Returns what must be equal for a checkpoint to be resumed from."""
        discriminator = None if self.discriminator is None else vars(self.discriminator.config)
        return {
            "config": self.vae.config.to_dict(),
            "discriminator": discriminator and {k: _plain(v) for k, v in discriminator.items()},
            "ema": self.ema is not None,
            "optimizers": self._optimizer_names(),
            "balancer": None if self.balancer is None else list(self.balancer.names),
            "train_encoder": self.train_encoder,
        }

    def _optimizer_names(self) -> list[str]:
        settings = (self.optimizer_config, self.discriminator_optimizer_config)
        return [config.name for config, _ in zip(settings, self._networks(), strict=False)]

    def _accumulated(self) -> dict[str, Any]:
        """Returns the batches, values and gradients so far, for a checkpoint in the middle of a step."""
        batches = self._accumulation.batches
        if not batches:
            return {}
        world_size = self.trainer.world_size
        return {
            "batches": [self.all_gather(b) if world_size > 1 else b[None] for b in batches],
            "values": dict(self._accumulation.values),
            "gradients": {name: p.grad for name, p in self.named_parameters() if p.grad is not None},
        }

    def _take_up(self, where: str | Path, saved: Mapping[str, Any]) -> None:
        """Restores what `_accumulated` returned.

        Raises:
            EarVAEError: It does not fit this run.
        """
        self._accumulation, self._accumulated_gradients = _Accumulation(), {}
        if not saved:
            return
        batches, gradients = saved["batches"], saved["gradients"]
        if len(batches) >= self.accumulate_grad_batches or len(batches[0]) != self.trainer.world_size:
            raise EarVAEError(
                f"{where}: was written in the middle of a step, after {len(batches)} of its batches on "
                f"{len(batches[0])} processes; resume with the accumulate_grad_batches and processes "
                "it was made with, or from a checkpoint that ends a step"
            )
        parameters = dict(self.named_parameters())
        if any(name not in parameters or parameters[name].shape != g.shape for name, g in gradients.items()):
            raise EarVAEError(f"{where}: damaged: the gradients in it are not those of its weights")
        rank = self.trainer.global_rank
        self._accumulation = _Accumulation([batch[rank] for batch in batches], dict(saved["values"]))
        self._accumulated_gradients = dict(gradients)

    def _networks(self) -> dict[str, nn.Module]:
        """Returns the networks that have an optimizer, by name."""
        networks: dict[str, nn.Module] = {"vae": self.vae}
        if self.discriminator is not None:
            networks["discriminator"] = self.discriminator
        return networks

    def _settings(self) -> dict[str, str]:
        """Returns how the weights were trained, for the model card."""
        weights = {name: weight for name, weight in self.objective.weights.items() if weight}
        settings = {
            "loss weights": ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
            "weighting": self.objective.weighting,
            "magnitude channels": self.objective.magnitude_channels,
            "balanced": "yes" if self.balancer is not None else "no",
            "STFT windows": ", ".join(map(str, self.objective.stft.window_sizes)),
            "optimizer": _described(self.optimizer_config),
            "initialization": self.initialization,
            "seed": str(self.seed),
        }
        if self.discriminator is not None:
            settings["discriminator's optimizer"] = _described(self.discriminator_optimizer_config)
        if self.ema is not None:
            settings["decay of the average"] = f"{self.ema.decay:g}"
        return settings

    def _reconstruct_draw(self, audio: Tensor, place: int = 0) -> Reconstruction:
        """Rebuilds audio from draws from the posterior, which depend on the seed, the step and the item only.

        Args:
            audio: Batch of audio, [B, 2, T].
            place: Number of items of the same step before it.
        """
        with torch.set_grad_enabled(self.train_encoder):
            posterior = self.vae.encode(audio)
        noise = torch.stack([self._noise(place + item, posterior.mean[0]) for item in range(len(audio))])
        latents = posterior.mean + posterior.std * noise
        return Reconstruction(self.vae.decode(latents, num_samples=audio.shape[-1]), posterior)

    def _noise(self, item: int, like: Tensor) -> Tensor:
        """Draws noise by an item's place in the batch of all processes; their number changes nothing."""
        place = item * self.trainer.world_size + self.trainer.global_rank
        entropy = (self.seed, self.trainer.global_step, place)
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(state)).to(like)

    def _adversarial_terms(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Computes the adversarial terms with a weight above 0, once they count."""
        if self.discriminator is None or self.trainer.global_step < self.adversarial_after:
            return {}
        terms = {}
        self.discriminator.requires_grad_(False)
        judged_estimate = self.discriminator(estimate)
        if self.objective.weights["adversarial"]:
            terms["adversarial"] = adversarial.adversarial(judged_estimate)
        if self.objective.weights["feature_matching"]:
            with torch.no_grad():
                judged_target = self.discriminator(target)
            terms["feature_matching"] = adversarial.feature_matching(judged_estimate, judged_target)
        self.discriminator.requires_grad_(True)
        return terms

    def _terms_of_output(self) -> list[str]:
        return [name for name, weight in self.objective.weights.items() if weight and name not in _PENALTIES]

    def _balanced(self, terms: Mapping[str, Tensor], estimate: Tensor) -> Tensor:
        """Returns a scalar whose gradient is the balanced one; its value has no meaning."""
        assert self.balancer is not None
        of_output = {name: value for name, value in terms.items() if name not in _PENALTIES}
        if not of_output:  # the discriminator's terms do not count yet
            return self.objective.total(terms)
        gradient = self.balancer(of_output, self.objective.weights, estimate)
        penalties = {name: value for name, value in terms.items() if name in _PENALTIES}
        loss = (estimate * gradient).sum()
        return loss + self.objective.total(penalties) if penalties else loss

    def _optimizations(self) -> list[_Optimization]:
        optimizers: Any = self.optimizers()
        schedules: Any = self.lr_schedulers()
        if self.discriminator is None:
            optimizers, schedules = [optimizers], [schedules]
        settings = (self.optimizer_config, self.discriminator_optimizer_config)
        return [
            _Optimization(optimizer, schedule, trained(network), config.gradient_clip, what)
            for (what, network), optimizer, schedule, config in zip(
                self._networks().items(), optimizers, schedules, settings, strict=False
            )
        ]

    def _vae_gradient(
        self, batch: Tensor, drawn: Reconstruction, accumulation: _Accumulation | None = None
    ) -> None:
        """Adds the gradient of the VAE's loss on a batch to that of the step."""
        estimate, posterior = drawn
        terms = self.objective.terms(estimate, batch, posterior)
        terms |= self._adversarial_terms(estimate, batch)
        total = self.objective.total(terms)
        (accumulation or self._accumulation).add(terms | {"total": total})
        self._backward(total if self.balancer is None else self._balanced(terms, estimate), "vae")

    def _backward(self, loss: Tensor, what: str) -> None:
        """Adds the gradient of a batch's share of the loss of the network called `what`."""
        self.manual_backward(loss / self.accumulate_grad_batches)

    def _clip(self, optimization: _Optimization) -> Tensor:
        """Scales the gradient down to its largest norm; returns the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(optimization.parameters, optimization.clip)

    def _step_if_finite(self, optimization: _Optimization, norm: Tensor) -> None:
        """Takes a step with an optimizer whose steps Lightning does not count, if the norm is finite."""
        optimizer: Optimizer = optimization.optimizer.optimizer
        if skips_by_itself(optimizer):
            # Decided on the device: reading the norm here would wait for it.
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(norm.isfinite()):
            optimizer.step()

    def _start_from_filter_bank(self, data: Any) -> None:
        if not isinstance(data, AudioDataModule):
            raise EarVAEError("initialization: filter_bank needs an AudioDataModule to choose its bands from")
        length = min(
            _FILTER_BANK_FRAMES * self.vae.downsampling_ratio,
            int(min(f.duration_seconds for f in data.train_files) * self.vae.sample_rate),
        )
        segments = data.segments(samples=length)
        audio = torch.stack([segments[index] for index in range(_FILTER_BANK_SEGMENTS)])
        choice = filter_bank.choose_bands(self.vae.config, filter_bank.analyse(self.vae.config, audio))
        start = self.folded(averaged=False)
        filter_bank.initialize(start, choice)
        load_plain_weights(self.vae, start.state_dict())
        if self.ema is not None:
            self.ema.network.load_state_dict(start.state_dict())

    def _log_values(self, stage: str, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.log(
                f"{stage}/{name}",
                value.detach(),
                on_step=stage == "train",
                on_epoch=stage != "train",
                prog_bar=not name.endswith("norm"),
                batch_size=1,
                sync_dist=stage != "train",
            )


def _pretrained(name: str, variant: str | None) -> EarVAE:
    try:
        return EarVAE.from_pretrained(name, variant=variant)
    except EarVAEError as error:
        if error.argument != "name_or_path":
            raise
        raise EarVAEError(error.message, argument="pretrained", value=error.value) from error


def _weights_in_use(
    given: Mapping[str, float], has_discriminator: bool, adversarial_after: int, train_encoder: bool
) -> dict[str, float]:
    """Returns the weight of every term, with 0 for those that this training cannot have.

    Raises:
        EarVAEError: A term that this training cannot have was given a weight, or no term has one.
    """
    if not has_discriminator and adversarial_after:
        raise EarVAEError("adversarial_after is for a discriminator's terms, but there is no discriminator")
    absent = {
        **({} if has_discriminator else dict.fromkeys(ADVERSARIAL_TERMS, "there is no discriminator")),
        **({} if train_encoder else {"kl": "the encoder, which it acts on, is not trained"}),
    }
    for name, reason in absent.items():
        if given.get(name):
            raise EarVAEError(f"the loss term {name} has the weight {given[name]:g}, but {reason}")
    weights = {**DEFAULT_LOSS_WEIGHTS, **given, **dict.fromkeys(absent, 0.0)}
    if has_discriminator and not any(weights[name] for name in ADVERSARIAL_TERMS):
        raise EarVAEError(
            f"nothing learns from the discriminator: the weights of {' and '.join(ADVERSARIAL_TERMS)} are 0; "
            "give one of them a weight, or leave the discriminator out"
        )
    first = [
        n for n, weight in weights.items() if weight and not (adversarial_after and n in ADVERSARIAL_TERMS)
    ]
    if not first:
        raise EarVAEError(
            "there is nothing to minimise: no loss term has a weight"
            + (f" in the first {adversarial_after} steps" if any(weights.values()) else "")
        )
    return weights


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return f"{name}: {changes(there, here) or 'of other fields'}"
    return f"{name}: {there} there, {here} here"


def _trained_names(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def _described(config: OptimizerConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.described().items())


def _plain(value: Any) -> Any:
    """Returns a value with lists in place of tuples, as files give it back."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain_optimizer(config: OptimizerConfig) -> dict[str, Any]:
    """Returns the numbers of a config; classes are not written to files."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return {name: _plain(value) for name, value in values.items() if not (value is None or callable(value))}


def _from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of `EarVAEModule` from the hyper-parameters in a checkpoint."""
    kinds = {
        "objective": ObjectiveConfig,
        "optimizer": OptimizerConfig,
        "discriminator": DiscriminatorConfig,
        "discriminator_optimizer": OptimizerConfig,
    }
    made: dict[str, Any] = dict(values)
    for name, kind in kinds.items():
        if made.get(name) is not None:
            made[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in made[name].items()})
    return made | {"config": EarVAEConfig.from_dict(made["config"])}
