"""Training compiled on a CPU: the same terms and gradients in fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ear_vae import EarVAEConfig
from ear_vae.losses import ReconstructionObjective, objective
from ear_vae.network import snake as snake_module
from ear_vae.network.blocks import Snake
from ear_vae.network.snake import snake
from ear_vae.posterior import Posterior
from ear_vae.training import EarVAEModule, ObjectiveConfig, OptimizerConfig

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
SHORT_WINDOWS = (512, 128)
WEIGHTS = {"band_level": 1.0, "waveform": 1.0}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has what would be compiled run as it is written; returns the names of what has run."""
    called: list[str] = []

    def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (called.append(function.__name__), function(*arguments))[1]

    monkeypatch.setattr(snake_module, "_compiled", stand_in)
    monkeypatch.setattr(objective, "_compiled_terms", lambda: stand_in(objective._terms_of_window))
    return called


def train(module: EarVAEModule, *, steps: int = 3, **settings: Any) -> list[float]:
    """Trains on noise; returns the total loss of each step."""
    generator = torch.Generator().manual_seed(0)
    data = list(0.1 * torch.randn(steps, 2, 2, 4096, generator=generator))
    totals: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            totals.append(float(trainer.callback_metrics["train/total"]))

    L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Note()],
        **settings,
    ).fit(module, DataLoader(data, batch_size=None))
    return totals


def module(**settings: Any) -> EarVAEModule:
    torch.manual_seed(0)
    return EarVAEModule(
        TINY,
        objective=ObjectiveConfig(
            weights=WEIGHTS, window_sizes=SHORT_WINDOWS, balanced=settings.pop("balanced", False)
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        **settings,
    )


def gradients(
    function: Callable[..., Tensor], *inputs: Tensor, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = tuple(x.detach().clone().requires_grad_(True) for x in inputs)
    y = function(*inputs)
    return y, torch.autograd.grad((y * weight).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_snake_and_its_gradients_are_those_of_the_formula(passes: list[str], dtype: torch.dtype) -> None:
    """Computed in float64 from the same values; angles reach 50 and round accordingly."""
    torch.manual_seed(1)
    x, weight = (3 * torch.randn(4, 5, 101)).to(dtype), torch.randn(4, 5, 101)
    logs = torch.randn(2, 5)

    def formula(x: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
        angle = x * log_alpha.exp()[:, None]
        return x + angle.sin().square() / (log_beta.exp()[:, None] + 1e-9)

    expected, of_formula = gradients(formula, x.double(), *logs.double(), weight=weight.double())
    rates = logs.double() if dtype == torch.float64 else logs
    found, of_compiled = gradients(
        lambda *inputs: snake(*inputs, compiled_with_gradients=True), x, *rates, weight=weight.to(dtype)
    )
    assert passes == ["_snake_of_channels", "_gradients_of_channels"]
    assert found.dtype == of_compiled[0].dtype == dtype
    tolerance = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 64)
    for one, other in zip((found, *of_compiled), (expected, *of_formula), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_a_step_is_the_plain_one(passes: list[str]) -> None:
    plain, compiled = module(), module(compiled=True)
    losses = train(plain)
    assert not passes
    assert train(compiled) == pytest.approx(losses, rel=1e-5)
    snakes = sum(isinstance(m, Snake) for m in compiled.vae.modules())
    # Each serves two places in a residual unit, and compiling tries each pass once.
    assert passes.count("_snake_of_channels") == passes.count("_gradients_of_channels") > 3 * snakes
    assert passes.count("_terms_of_window") == (3 + 1) * len(SHORT_WINDOWS)


def test_terms_that_are_balanced_are_left_as_they_are(passes: list[str]) -> None:
    """The balancer asks for their gradients one by one, which what is compiled does not allow."""
    losses = train(module(balanced=True))
    assert train(module(balanced=True, compiled=True)) == pytest.approx(losses, rel=1e-5)
    assert set(passes) == {"_snake_of_channels", "_gradients_of_channels"}


def test_without_a_compiler_it_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("C++ compiler not found\nand more")

    monkeypatch.setattr(snake_module, "_compiled", lambda function: refuse)
    losses = train(module())
    with pytest.warns(
        UserWarning, match="trains without being compiled: C\\+\\+ compiler not found and more$"
    ):
        assert train(module(compiled=True)) == losses


def test_where_the_terms_cannot_be_compiled_nothing_is(
    passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    losses = train(module())
    monkeypatch.setattr(objective, "_compiled_terms", lambda: refuse)
    with pytest.warns(UserWarning, match="trains without being compiled: no space left"):
        assert train(module(compiled=True)) == losses
    # What was tried before, once each.
    assert passes == ["_snake_of_channels", "_gradients_of_channels"]


def test_terms_that_cannot_be_compiled_are_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(objective, "_compiled_terms", lambda: refuse)
    losses = ReconstructionObjective(44_100, weights=WEIGHTS, window_sizes=SHORT_WINDOWS)
    audio = torch.randn(2, 2, 2, 4096)
    posterior = Posterior(torch.zeros(2, 4, 8), torch.ones(2, 4, 8))
    expected = losses.terms(*audio, posterior)
    with pytest.raises(OSError, match="no space"):
        losses.compile_terms()
    assert losses.terms(*audio, posterior) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated")
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.02)])
def test_compiled_for_real_it_learns_the_same(precision: Any, tolerance: float) -> None:
    """For batches of another shape than the first one too."""
    compiled = module(compiled=True)
    losses = train(compiled, precision=precision)
    assert compiled.objective._compiled
    assert all(m.compiled_with_gradients for m in compiled.vae.modules() if isinstance(m, Snake))
    assert losses == pytest.approx(train(module()), rel=tolerance)
    assert losses[-1] < losses[0]
