"""What a training step does to which weights, on a CPU with a narrow model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.losses.adversarial import adversarial, discriminator_loss
from ear_vae.losses.objective import DEFAULT_LOSS_WEIGHTS
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import EarVAEModule
from ear_vae.training.ema import EMA
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig
from ear_vae.training.weight_norm import apply_weight_norm

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
JUDGE = DiscriminatorConfig(window_sizes=(512, 128), channels=4)
FAST = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
STILL = OptimizerConfig(learning_rate=0.0, warmup_steps=0)


def segments(count: int, batch_size: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(batch_size, 2, 4096, generator=generator) for _ in range(count)]


def fit(module: EarVAEModule, batches: list[Tensor], **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=settings.pop("max_steps", len(batches)),
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def draw_again(module: EarVAEModule, batch: Tensor) -> Tensor:
    """What the first step made of `batch`, of weights that have not moved since."""
    module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.reset()
    return module._reconstruct_draw(batch).audio


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_step_moves_its_own_network_only() -> None:
    for still in ("discriminator", "vae"):
        module = EarVAEModule(
            TINY,
            discriminator=JUDGE,
            optimizer=STILL if still == "vae" else FAST,
            discriminator_optimizer=STILL if still == "discriminator" else FAST,
        )
        assert module.discriminator is not None
        before = weights(module.vae), weights(module.discriminator)
        fit(module, segments(2))
        moved = [
            not same(*pair)
            for pair in zip(before, map(weights, (module.vae, module.discriminator)), strict=True)
        ]
        assert moved == [still != "vae", still != "discriminator"]


def test_the_discriminators_gradient_is_that_of_its_own_loss() -> None:
    """Nothing of the generator's step is left in it, and nothing of its own reaches the generator."""
    module = EarVAEModule(TINY, discriminator=JUDGE, optimizer=STILL, discriminator_optimizer=STILL)
    (batch,) = segments(1)
    fit(module, [batch])
    assert module.discriminator is not None
    estimate = draw_again(module, batch).detach()
    names, parameters = zip(*module.discriminator.named_parameters(), strict=True)
    loss = discriminator_loss(module.discriminator(estimate), module.discriminator(batch))
    for name, parameter, expected in zip(
        names, parameters, torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_the_generator_learns_what_the_discriminator_says() -> None:
    """With the adversarial term alone, its gradient is the one through the discriminator as it then is."""
    absent = set(DEFAULT_LOSS_WEIGHTS) - {"adversarial"}
    module = EarVAEModule(
        TINY,
        discriminator=JUDGE,
        objective=ObjectiveConfig(weights={**dict.fromkeys(absent, 0.0), "adversarial": 2.0}),
        optimizer=OptimizerConfig(learning_rate=0, gradient_clip=1e9),
        discriminator_optimizer=FAST,
    )
    (batch,) = segments(1)
    metrics = fit(module, [batch]).callback_metrics
    assert module.discriminator is not None
    estimate = draw_again(module, batch)
    names, parameters = zip(*module.vae.named_parameters(), strict=True)
    loss = 2 * adversarial(module.discriminator(estimate))
    for name, parameter, expected in zip(
        names, parameters, torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected, msg=lambda m, n=name: f"{n}: {m}")
    assert {"train/discriminator", "train/discriminator_gradient_norm"} <= set(metrics)
    assert "train/log_magnitude" not in metrics


def test_steps_are_those_of_the_vae() -> None:
    module = EarVAEModule(TINY, discriminator=JUDGE, optimizer=OptimizerConfig(1e-3, warmup_steps=4))
    trainer = fit(module, segments(6), max_steps=3)
    assert trainer.global_step == 3
    schedule: Any = module.lr_schedulers()
    assert [s.last_epoch for s in schedule] == [3, 3]
    assert schedule[0].get_last_lr() == [1e-3]


def test_a_new_discriminator_may_learn_alone_first() -> None:
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append({"train/adversarial", "train/feature_matching"} <= set(trainer.callback_metrics))

    module = EarVAEModule(TINY, discriminator=JUDGE, adversarial_after=2)
    fit(module, segments(4), callbacks=[Watch()])
    assert seen == [False, False, True, True]


def test_gradients_are_clipped_and_their_norms_are_those_before() -> None:
    module = EarVAEModule(
        TINY,
        discriminator=JUDGE,
        optimizer=OptimizerConfig(gradient_clip=1e-2),
        discriminator_optimizer=OptimizerConfig(gradient_clip=1e-3),
    )
    metrics = fit(module, segments(1)).callback_metrics
    assert module.discriminator is not None
    for network, clip, name in (
        (module.vae, 1e-2, "gradient_norm"),
        (module.discriminator, 1e-3, "discriminator_gradient_norm"),
    ):
        norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(clip, rel=1e-3)
        assert float(metrics[f"train/{name}"]) > 2 * clip


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    broken = segments(3)
    broken[1][0, 0, 100] = torch.nan
    clean = EarVAEModule(TINY, discriminator=JUDGE, optimizer=FAST)
    module = EarVAEModule(TINY, discriminator=JUDGE, optimizer=FAST)
    module.load_state_dict(clean.state_dict())
    trainer = fit(module, broken, max_steps=2)
    assert (trainer.global_step, float(trainer.callback_metrics["train/skipped_steps"])) == (2, 2.0)
    fit(clean, [broken[0], broken[2]])
    assert same(weights(clean), weights(module))


def test_too_many_of_them_stop_the_training() -> None:
    batches = segments(4)
    for batch in batches[1:]:
        batch.fill_(torch.inf)
    module = EarVAEModule(TINY, max_skipped_steps=3)
    with pytest.raises(EarVAEError, match="gradient of the vae was not finite in 3 steps in a row"):
        fit(module, batches, max_steps=10)


def test_a_learning_rate_that_explodes_ends_in_a_message() -> None:
    module = EarVAEModule(TINY, optimizer=OptimizerConfig(1e30, warmup_steps=0), max_skipped_steps=2)
    with pytest.raises(EarVAEError, match="lower the learning rate"):
        fit(module, segments(10))


def test_the_average_in_closed_form() -> None:
    """Of weights 1, 2, 3, … after a start at 0, with decays 1/10, 2/11, 3/12, …, at most 0.3."""
    network = torch.nn.Conv1d(1, 1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = EMA(network, 0.3)
    apply_weight_norm(network)
    expected = 0.0
    for n in range(5):
        with torch.no_grad():
            network.weight = torch.full((1, 1, 1), n + 1.0)
        average.update(network)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert float(average.network.weight) == pytest.approx(expected)


def test_validation_and_export_use_the_average() -> None:
    module = EarVAEModule(TINY, optimizer=FAST, ema_decay=0.9)
    fit(module, segments(3))
    assert module.ema is not None
    (audio,) = segments(1, batch_size=1)
    with torch.no_grad():
        averaged, raw = module.ema.network(audio).audio, module.vae(audio).audio
        assert (averaged - raw).abs().max() > 1e-6
        assert torch.equal(module.reconstruct(audio).audio, averaged)
    torch.testing.assert_close(module.folded()(audio).audio, averaged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.folded(averaged=False)(audio).audio, raw, rtol=1e-4, atol=1e-5)


def test_the_decoder_alone(tmp_path: Path) -> None:
    """The encoder stays bit for bit what it was, as the latents do, and the rest moves."""
    EarVAE(TINY).save_pretrained(tmp_path / "start")
    before = EarVAE.from_pretrained(tmp_path / "start")
    module = EarVAEModule(
        pretrained=str(tmp_path / "start"), train_encoder=False, optimizer=FAST, discriminator=JUDGE
    )
    trainer = fit(module, segments(3))
    assert "train/kl" not in trainer.callback_metrics
    module.export(tmp_path / "end")
    after = EarVAE.from_pretrained(tmp_path / "end")
    assert same(weights(before.encoder), weights(after.encoder))
    (audio,) = segments(1)
    assert torch.equal(before.encode(audio).mean, after.encode(audio).mean)
    for part in ("decoder", "transformer"):
        for (name, one), other in zip(
            getattr(before, part).named_parameters(), getattr(after, part).parameters(), strict=True
        ):
            assert not torch.equal(one, other), name


@pytest.mark.parametrize("balanced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_balanced_or_not_the_losses_fall(balanced: bool) -> None:
    module = EarVAEModule(
        TINY,
        discriminator=JUDGE,
        objective=ObjectiveConfig(balanced=balanced),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0, final_fraction=1),
    )
    values = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            values.append(float(trainer.callback_metrics["train/log_magnitude"]))

    fit(module, segments(1) * 20, callbacks=[Watch()])
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("settings", "logged", "passes"),
    [
        # The discriminator hears both signals for its own loss, the rebuilt one again for the VAE's, and the
        # original again for feature matching alone.
        ({}, {"adversarial", "feature_matching"}, 4),
        ({"weights": {"feature_matching": 0.0}}, {"adversarial"}, 3),
        ({"weights": {"adversarial": 0.0}}, {"feature_matching"}, 4),
        ({"adversarial_after": 2}, {"adversarial", "feature_matching"}, 4),
    ],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_adversarial_terms_without_a_weight_are_not_computed(
    balanced: bool, settings: dict[str, Any], logged: set[str], passes: int
) -> None:
    """And those that count only later are not asked for before."""
    module = EarVAEModule(
        TINY,
        discriminator=JUDGE,
        objective=ObjectiveConfig(weights=settings.get("weights", {}), balanced=balanced),
        adversarial_after=settings.get("adversarial_after", 0),
        optimizer=FAST,
    )
    assert module.discriminator is not None
    heard: list[int] = []
    module.discriminator.register_forward_hook(lambda *_: heard.append(module.trainer.global_step))
    before = weights(module.vae)
    trainer = fit(module, segments(3))
    names = {name.removeprefix("train/") for name in trainer.callback_metrics}
    assert names & {"adversarial", "feature_matching"} == logged
    late = settings.get("adversarial_after", 0)
    assert [heard.count(step) for step in range(3)] == [2 if step < late else passes for step in range(3)]
    assert trainer.global_step == 3
    assert not same(before, weights(module.vae))


def test_a_balanced_step_has_the_balancers_gradient() -> None:
    """With one term alone, it has norm 1 per item, of two in the batch, whatever the term's weight."""
    names = ("log_magnitude", "correlation", "instantaneous_frequency", "group_delay", "kl")
    module = EarVAEModule(
        TINY,
        objective=ObjectiveConfig(
            weights={**dict.fromkeys(names, 0.0), "spectral_convergence": 7.0}, balanced=True
        ),
    )
    batch = segments(1)[0]
    estimate = batch.clone().mul_(0.5).requires_grad_()
    terms = module.objective.terms(estimate, batch, module.vae.encode(batch))
    (gradient,) = torch.autograd.grad(module._balanced(terms, estimate), estimate)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1).mean(), torch.tensor(0.5))


def test_autocast_leaves_the_spectra_in_single_precision() -> None:
    """Terms and transforms are the same to the last bit, the convolutions of the discriminator are not."""
    module = EarVAEModule(TINY, discriminator=JUDGE)
    assert module.discriminator is not None
    estimate, target = segments(2)
    heard: list[Tensor] = []
    module.discriminator.resolutions[0].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    found = []
    for enabled in (False, True):
        posterior = module.vae.encode(target)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(module.objective.terms(estimate, target, posterior))
            judged = module.discriminator(estimate)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert torch.equal(heard[0], heard[1])
    assert judged[0].scores.dtype == torch.bfloat16


def test_mixed_precision_trains() -> None:
    module = EarVAEModule(TINY, discriminator=JUDGE, optimizer=FAST)
    trainer = fit(module, segments(2), precision="bf16-mixed")
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("train_encoder", [True, False])
def test_fine_tuning_starts_from_the_official_model(train_encoder: bool, parity: Path) -> None:
    module = EarVAEModule(pretrained=str(parity), variant="ear_vae_44k", train_encoder=train_encoder)
    audio = load_file(parity / "ear_vae_44k.expected.safetensors")["audio"]
    audio = audio if audio.ndim == 3 else audio[None]
    expected = EarVAE.from_pretrained(parity, variant="ear_vae_44k")(audio).audio
    with torch.no_grad():
        error = (module.reconstruct(audio).audio - expected).abs().max()
    assert error <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(EarVAEError, match="must come from a pretrained model"):
        EarVAEModule(TINY, train_encoder=False)
    with pytest.raises(EarVAEError, match="ema_decay"):
        EarVAEModule(TINY, ema_decay=1.0)
    with pytest.raises(EarVAEError, match="adversarial_after"):
        EarVAEModule(TINY, adversarial_after=-1)
    for settings in ({"learning_rate": float("nan")}, {"gradient_clip": 0.0}, {"final_fraction": 2.0}):
        with pytest.raises(EarVAEError, match="must be"):
            OptimizerConfig(**settings)  # type: ignore[arg-type]
