"""The LightningModule that trains an εar-VAE."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.evaluation import ReconstructionMetrics
from ear_vae.losses import ReconstructionObjective, adversarial
from ear_vae.losses.balancer import LossBalancer
from ear_vae.losses.objective import (
    ADVERSARIAL_TERMS,
    DEFAULT_LOSS_WEIGHTS,
    DEFAULT_WINDOW_SIZES,
    MagnitudeChannels,
    Weighting,
)
from ear_vae.network.discriminator import Discriminator, DiscriminatorConfig
from ear_vae.training import filter_bank
from ear_vae.training.checkpoint import FACTS, changes, require_moments, require_state
from ear_vae.training.data import AudioDataModule
from ear_vae.training.ema import AveragedWeights
from ear_vae.training.optimization import OptimizerConfig, SkippedSteps, trained
from ear_vae.training.training_state import load_training_state, restore_moments
from ear_vae.training.weight_norm import apply_weight_norm, load_plain_weights, plain_weights
from ear_vae.vae import EarVAE, Reconstruction

_LOG = logging.getLogger(__name__)
_FILTER_BANK_SEGMENTS = 192
_FILTER_BANK_FRAMES = 96
# Terms that are no function of the rebuilt audio; the balancer leaves them as they are.
_PENALTIES = ("kl",)
_VALIDATION_METRICS = ("si_sdr_db", "mel_distance", "stft_distance", "icpc", "ccpc")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        weights: Of the loss terms by name, over `losses.objective.DEFAULT_LOSS_WEIGHTS`.
        window_sizes: Of the STFTs, in samples.
        weighting: Filter ahead of the reconstruction terms: `k`, `a` or `none`.
        magnitude_channels: Compare magnitudes on mid, side, left and right (`mslr`), or without mid and side
            (`lr`).
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


class EarVAEModule(L.LightningModule):
    """The VAE, its discriminator and the losses, for `lightning.Trainer`.

    Each step trains the discriminator on the detached output of the VAE, then the VAE on the same output.
    `Trainer(max_steps=...)`, checkpoints and schedules count the steps of the VAE. All randomness of a
    step follows from `seed` and its number, so that a resumed run goes on as if it had never stopped.

    Weight norm is put on at construction and folded away by `export`, so that neither the files nor
    the public class know of it. Terms are logged as `train/NAME` and `validation/NAME`; validation uses
    the average of the weights where there is one, which is what `export` writes.

    Args:
        config: Architecture of a new model, the published one by default.
        pretrained: Name or folder of a model to continue from, instead of `config`.
        variant: Which model of `pretrained`, where it holds several.
        training_state: File that `ear-vae release --training-state` wrote beside `pretrained`: the raw
            weights, discriminator and optimizers to go on with.
        objective: The loss terms.
        optimizer: Of the VAE.
        discriminator: Its architecture; without one the adversarial terms are left out, and may not be given
            weights.
        discriminator_optimizer: Of the discriminator, if there is one.
        adversarial_after: Steps in which a discriminator learns alone before its terms count.
        average_decay: Of the moving average of the VAE's weights; 0 for none.
        train_encoder: False keeps the encoder, and with it the latents, exactly as they are.
        initialization: Of a new model: `random`, the default, or `filter_bank` (see
            `ear_vae.training.filter_bank`), which needs the Trainer's data to choose its bands from.
        gradient_checkpointing: Compute activations again on the way back instead of keeping them, see
            `EarVAE.gradient_checkpointing`.
        max_skipped_steps: Steps in a row whose gradient is not finite before training stops.
        seed: Of the draws from the posterior.

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
        average_decay: float = 0.999,
        train_encoder: bool = True,
        initialization: Literal["random", "filter_bank"] | None = None,
        gradient_checkpointing: bool = False,
        max_skipped_steps: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if initialization not in (None, "random", "filter_bank"):
            raise EarVAEError(f"initialization must be random or filter_bank, got {initialization!r}")
        if not 0 <= average_decay < 1:
            raise EarVAEError(f"average_decay must be in [0, 1), got {average_decay}")
        if adversarial_after < 0 or max_skipped_steps < 1 or seed < 0:
            raise EarVAEError("adversarial_after and seed must be 0 or more and max_skipped_steps at least 1")
        if pretrained is None:
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
            raise EarVAEError("initialization is of a new model; a pretrained one has its weights")
        weights = _weights_in_use(
            objective.weights, discriminator is not None, adversarial_after, train_encoder
        )
        self.vae = (
            EarVAE(config) if pretrained is None else EarVAE.from_pretrained(pretrained, variant=variant)
        )
        self.vae.train().requires_grad_(True)
        self.vae.gradient_checkpointing = gradient_checkpointing
        self.average = AveragedWeights(self.vae, average_decay) if average_decay else None
        self.initialization = initialization or ("random" if pretrained is None else "pretrained")
        self.train_encoder = train_encoder
        # A kernel g · v / ‖v‖ is rounded anew: what must stay bit for bit stays as it is.
        self.normalized = self.vae if train_encoder else self.vae.decoder
        self.vae.encoder.requires_grad_(train_encoder)
        apply_weight_norm(self.normalized)
        self.objective = ReconstructionObjective(
            self.vae.sample_rate,
            weights=weights,
            window_sizes=objective.window_sizes,
            weighting=objective.weighting,
            magnitude_channels=objective.magnitude_channels,
        )
        self.discriminator = None if discriminator is None else Discriminator(discriminator)
        self.metrics = ReconstructionMetrics(self.vae.sample_rate, _VALIDATION_METRICS)
        self.balancer = LossBalancer(self._terms_of_output()) if objective.balanced else None
        self.optimizer_config = optimizer
        self.discriminator_optimizer_config = discriminator_optimizer
        self.adversarial_after = adversarial_after
        self.seed = seed
        self.training_state = training_state
        self._moments: dict[str, Any] | None = None
        self.skipped = {name: SkippedSteps(max_skipped_steps) for name in ("vae", "discriminator")}

    def setup(self, stage: str) -> None:
        """Starts a new model from the filter bank or a training state, unless a checkpoint is resumed from.

        Raises:
            EarVAEError: The training state does not fit, or there is no data to choose the filters by.
        """
        if stage != "fit" or self.trainer.ckpt_path is not None:
            return
        if self.initialization == "filter_bank":
            self._start_from_filter_bank(getattr(self.trainer, "datamodule", None))
        if self.training_state is not None:
            self._moments = load_training_state(self, Path(self.training_state))

    def configure_optimizers(self) -> Any:
        """AdamW for the VAE, and another one for the discriminator."""
        total_steps = int(min(self.trainer.estimated_stepping_batches, 2**31))
        settings = (self.optimizer_config, self.discriminator_optimizer_config)
        built = [
            config.build(trained(network), total_steps)
            for network, config in zip(self._networks().values(), settings, strict=False)
        ]
        if self._moments is not None:
            for (name, network), (optimizer, _) in zip(self._networks().items(), built, strict=True):
                restore_moments(optimizer, network, self._moments[name])
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        """One step of the discriminator and one of the VAE on audio [B, 2, T]."""
        estimate, posterior = self._reconstruct_draw(batch)
        logged = {}
        vae_optimization, *others = self._optimizations()
        if self.discriminator is not None:
            judged_estimate, judged_target = self.discriminator(estimate.detach()), self.discriminator(batch)
            loss = adversarial.discriminator_loss(judged_estimate, judged_target)
            logged["discriminator"] = loss
            logged["discriminator_gradient_norm"] = self._descend(loss, *others)
        terms = self.objective.terms(estimate, batch, posterior)
        terms |= self._adversarial_terms(estimate, batch)
        logged |= terms
        logged["total"] = self.objective.total(terms)
        loss = logged["total"] if self.balancer is None else self._balanced(terms, estimate)
        logged["gradient_norm"] = self._descend(loss, vae_optimization)
        if self.average is not None and bool(logged["gradient_norm"].isfinite()):
            self.average.update(self.vae)
        self._log_values("train", logged)
        self.log("train/skipped_steps", float(sum(s.total for s in self.skipped.values())))
        self.log("train/learning_rate", vae_optimization.schedule.get_last_lr()[0])
        for other in others:
            self.log(f"train/{other.what}_learning_rate", other.schedule.get_last_lr()[0])

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        """The terms and the paper's metrics on audio [1, 2, T], decoded from the posterior's mean."""
        estimate, posterior = self.reconstruct(batch)
        terms = self.objective.terms(estimate, batch, posterior)
        terms["total"] = self.objective.total(terms)
        self._log_values("validation", terms)
        self.metrics.update(estimate, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all excerpts that have them."""
        for name, value in self.metrics.compute().items():
            self.log(f"validation/{name}", value.float(), prog_bar=True)
        self.metrics.reset()

    def reconstruct(self, audio: Tensor) -> Reconstruction:
        """Rebuilds audio [B, 2, T] from the posterior's mean, with the average of the weights if any."""
        vae = self.vae if self.average is None else self.average.network
        reconstruction: Reconstruction = vae(audio)
        return reconstruction

    def on_train_start(self) -> None:
        """Refuses data at another rate than the model's."""
        rate = getattr(getattr(self.trainer, "datamodule", None), "sample_rate", self.vae.sample_rate)
        if rate != self.vae.sample_rate:
            raise EarVAEError(f"the data is at {rate} Hz, the model works at {self.vae.sample_rate} Hz")

    def folded(self, name: str | None = None, *, averaged: bool = True) -> EarVAE:
        """A copy of the model as users load it: plain weights, evaluation mode, frozen, on the CPU.

        Args:
            name: Of the copy.
            averaged: Take the average of the weights, where there is one, instead of the last ones.
        """
        source = self.average.network if averaged and self.average is not None else self.vae
        vae = EarVAE(self.vae.config, name=name or self.vae.name)
        vae.load_state_dict(plain_weights(source, vae.state_dict()))
        return vae.eval().requires_grad_(False)

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
        """Adds what tells a checkpoint from one of another model, and what its release will want to know."""
        metrics = self.trainer.callback_metrics
        checkpoint[FACTS] = {
            **self._facts(),
            "skipped": [counter.total for counter in self.skipped.values()],
            "trained": {what: _trained_names(network) for what, network in self._networks().items()},
            "settings": self._settings(),
            "validation": {n: float(v) for n, v in metrics.items() if n.startswith("validation/")},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture, and names settings that are not those of its run.

        Raises:
            EarVAEError: The checkpoint's architecture differs, it is damaged or not one of this module.
        """
        saved = dict(checkpoint.get(FACTS) or {})
        facts = self._facts()
        different = [name for name in facts if saved.get(name) != facts[name]]
        if different:
            raise EarVAEError(
                "the checkpoint is of another architecture or training: "
                + "; ".join(_difference(name, saved.get(name), facts[name]) for name in different)
                + "; resume with the config it was made with, or start from the model it exported"
            )
        where = self.trainer.ckpt_path or "the checkpoint"
        require_state(where, checkpoint["state_dict"], self.state_dict())
        require_moments(where, checkpoint)
        for counter, total in zip(self.skipped.values(), saved["skipped"], strict=False):
            counter.total = total
        changed = changes(saved["settings"], self._settings())
        if changed and self.trainer.is_global_zero:
            _LOG.warning(
                "resuming with other settings than the checkpoint's: %s; of an optimizer's, learning_rate, "
                "betas and weight_decay stay as they are in the checkpoint",
                changed,
            )

    def _facts(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed from."""
        discriminator = None if self.discriminator is None else vars(self.discriminator.config)
        return {
            "config": self.vae.config.to_dict(),
            "discriminator": discriminator and {k: _plain(v) for k, v in discriminator.items()},
            "average": self.average is not None,
            "balancer": None if self.balancer is None else list(self.balancer.names),
            "train_encoder": self.train_encoder,
        }

    def _networks(self) -> dict[str, nn.Module]:
        """What has an optimizer, by name."""
        networks: dict[str, nn.Module] = {"vae": self.vae}
        if self.discriminator is not None:
            networks["discriminator"] = self.discriminator
        return networks

    def _settings(self) -> dict[str, str]:
        """How the weights came about, for the model card."""
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
        if self.average is not None:
            settings["decay of the average"] = f"{self.average.decay:g}"
        return settings

    def _reconstruct_draw(self, audio: Tensor) -> Reconstruction:
        """One pass on draws from the posterior that depend on the seed, the step and the item only."""
        with torch.set_grad_enabled(self.train_encoder):
            posterior = self.vae.encode(audio)
        noise = torch.stack([self._noise(item, posterior.mean[0]) for item in range(len(audio))])
        latents = posterior.mean + posterior.std * noise
        return Reconstruction(self.vae.decode(latents, num_samples=audio.shape[-1]), posterior)

    def _noise(self, item: int, like: Tensor) -> Tensor:
        """Of an item's place in the batch of all processes, so that their number changes nothing."""
        place = item * self.trainer.world_size + self.trainer.global_rank
        entropy = (self.seed, self.trainer.global_step, place)
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(state)).to(like)

    def _adversarial_terms(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Those with a weight above 0, once they count."""
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
        """A scalar whose gradient is the balanced one; its value means nothing."""
        assert self.balancer is not None
        of_output = {name: value for name, value in terms.items() if name not in _PENALTIES}
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

    def _descend(self, loss: Tensor, optimization: _Optimization) -> Tensor:
        """One step down the gradient of `loss`, unless it is not finite; its norm before clipping."""
        optimizer, schedule, parameters, clip, what = optimization
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if self.skipped[what].allows(norm, what):
            # Lightning counts the steps of its own wrapper only: those of the VAE.
            (optimizer if what == "vae" else optimizer.optimizer).step()
            schedule.step()
        return norm

    def _start_from_filter_bank(self, data: Any) -> None:
        if not isinstance(data, AudioDataModule):
            raise EarVAEError("initialization: filter_bank needs an AudioDataModule to choose its bands from")
        length = min(
            _FILTER_BANK_FRAMES * self.vae.downsampling_ratio,
            int(min(f.duration_seconds for f in data.train_files) * self.vae.sample_rate),
        )
        segments = data.segments(samples=length)
        audio = torch.stack([segments[index] for index in range(_FILTER_BANK_SEGMENTS)])
        choice = filter_bank.plan(self.vae.config, filter_bank.analyse(self.vae.config, audio))
        start = self.folded(averaged=False)
        filter_bank.initialize(start, choice)
        load_plain_weights(self.vae, start.state_dict())
        if self.average is not None:
            self.average.network.load_state_dict(start.state_dict())

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


def _weights_in_use(
    given: Mapping[str, float], has_discriminator: bool, adversarial_after: int, train_encoder: bool
) -> dict[str, float]:
    """Of every term, with 0 for those that this training cannot have.

    Raises:
        EarVAEError: One of these was given a weight, or no term has one.
    """
    if not has_discriminator and adversarial_after:
        raise EarVAEError("adversarial_after is of a discriminator's terms, but there is no discriminator")
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
    return ", ".join(f"{name} {value}" for name, value in vars(config).items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
