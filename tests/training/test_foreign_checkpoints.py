"""Checkpoints and training states from anybody: nothing in them is removed, shown or taken up unchecked."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from ear_vae import EarVAEConfig, EarVAEError
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import EarVAEModule
from ear_vae.training.callbacks import Checkpoints
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig
from ear_vae.training.release import release_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
OBJECTIVE = ObjectiveConfig(window_sizes=(64,))


@pytest.fixture(scope="module")
def module(least_config: EarVAEConfig) -> Callable[..., EarVAEModule]:
    """Makes a module with some settings of its own."""

    def make(**settings: Any) -> EarVAEModule:
        given = {"objective": OBJECTIVE, "optimizer": OptimizerConfig(warmup_steps=0), **settings}
        if "pretrained" not in given:
            given.setdefault("config", least_config)
        return EarVAEModule(**given)

    return make


def segments(value: float = 0.1) -> DataLoader:
    audio = value * torch.randn(4, 2, 256, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(audio), batch_size=2)


@pytest.fixture(scope="module")
def train(module: Callable[..., EarVAEModule]) -> Callable[..., L.Trainer]:
    """Trains a module for some steps, with checkpoints below a folder."""

    def run(
        root: Path,
        steps: int,
        *,
        model: EarVAEModule | None = None,
        resume: Path | None = None,
        callbacks: list[L.Callback] | None = None,
        validation: bool = False,
        **settings: Any,
    ) -> L.Trainer:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=root,
            callbacks=[Checkpoints(every_n_steps=2)] if callbacks is None else callbacks,
            **settings,
        )
        excerpts = DataLoader([0.1 * torch.randn(2, 4096)], batch_size=1) if validation else None
        trainer.fit(model or module(), segments(), excerpts, ckpt_path=resume, weights_only=True)
        return trainer

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., L.Trainer]) -> Path:
    root = tmp_path_factory.mktemp("run")
    train(root, 2)
    return root / "checkpoints" / "last.ckpt"


def forged(checkpoint: Path, place: Path, forge: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    forge(content)
    torch.save(content, place)
    return place


# Lightning saves with its own callback before the first validation, too.
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize("own_callback", [True, False])
@pytest.mark.parametrize("name", ["{folder}/../victim", "memory://victim/best.ckpt"])
def test_a_checkpoint_cannot_have_anything_removed(
    tmp_path: Path, own_callback: bool, name: str, train: Callable[..., L.Trainer]
) -> None:
    """Lightning removes the best checkpoints of a resumed run as better ones come, whatever is there."""
    folder, victim = tmp_path / "checkpoints", tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept", encoding="utf-8")

    def callbacks() -> list[L.Callback]:
        if own_callback:
            return [Checkpoints(monitor="validation/total", directory=str(folder))]
        return [L.pytorch.callbacks.ModelCheckpoint(folder, monitor="validation/total", mode="max")]

    trainer = train(tmp_path, 2, callbacks=callbacks(), validation=True)
    whole = tmp_path / "whole.ckpt"
    trainer.save_checkpoint(whole)
    evil = name.format(folder=folder)

    def forge(content: dict[str, Any]) -> None:
        (state,) = (state for state in content["callbacks"].values() if "best_k_models" in state)
        lowest = torch.tensor(-1e9)
        state |= {"best_k_models": {evil: lowest}, "kth_best_model_path": evil, "kth_value": lowest}

    with pytest.raises(EarVAEError, match="damaged: it names earlier checkpoints outside of its folder"):
        train(
            tmp_path,
            4,
            resume=forged(whole, tmp_path / "forged.ckpt", forge),
            callbacks=callbacks(),
            validation=True,
        )
    assert (victim / "kept").exists()
    # What was not forged goes on, and the best of the run before still makes room for a better one.
    train(tmp_path, 4, resume=whole, callbacks=callbacks(), validation=True)


def test_the_card_shows_what_is_in_a_checkpoint_as_text(checkpoint: Path, tmp_path: Path) -> None:
    def forge(content: dict[str, Any]) -> None:
        content["ear_vae"]["settings"] = {"<b>": "<img src=x>\n\n# heading | [a](javascript:b) \x1b[2J"}
        content["ear_vae"]["validation"] = {"a`|<script>\n": 1.0}

    release_model(forged(checkpoint, tmp_path / "forged.ckpt", forge), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    section = card[card.index("## Training") : card.index("## Limits")]
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert "\x1b" not in card
    assert "<img" not in card
    assert "<b>" not in card
    assert [line for line in section.splitlines() if line.startswith("#")] == ["## Training", "## Figures"]
    assert all(line.replace("\\|", "").count("|") == 3 for line in table)
    assert "](" not in section.replace("\\](", "")
    # Every line of the section is a row, a heading or the sentence that says where the figures are from.
    others = [line for line in section.splitlines() if line and not line.startswith(("|", "## "))]
    assert len(others) == 1


@pytest.mark.parametrize("where", ["settings", "AudioDataModule"])
def test_what_a_resumed_checkpoint_says_cannot_steer_a_terminal(
    where: str,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    train: Callable[..., L.Trainer],
) -> None:
    from ear_vae.training.checkpoint_reading import changes

    assert "\x1b" not in changes({"data": "\x1b[2J"}, {"data": "x"})
    if where == "settings":
        path = forged(
            checkpoint,
            tmp_path / "forged.ckpt",
            lambda content: content["ear_vae"]["settings"].update(weighting="\x1b[2J"),
        )
        train(tmp_path, 3, resume=path)
        assert "weighting" in caplog.text
        assert "\x1b[2J" not in caplog.text


def nan_moment(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"].fill_(torch.nan)


def negative_moment(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg_sq"].fill_(-1)


def nan_rate(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["param_groups"][0]["lr"] = torch.nan


def no_rate(content: dict[str, Any]) -> None:
    del content["optimizer_states"][0]["param_groups"][0]["lr"]


def no_schedule(content: dict[str, Any]) -> None:
    content["lr_schedulers"] = [{"x": 1}]


def method_of_schedule(content: dict[str, Any]) -> None:
    content["lr_schedulers"][0]["step"] = "x"


def no_loops(content: dict[str, Any]) -> None:
    content["loops"] = {}


def callbacks_of_text(content: dict[str, Any]) -> None:
    content["callbacks"] = "x"


def negative_updates(content: dict[str, Any]) -> None:
    content["state_dict"]["ema._extra_state"] = torch.tensor(-10)


def trained_number(content: dict[str, Any]) -> None:
    content["ear_vae"]["trained"] = {"vae": 5}


@pytest.mark.parametrize(
    "forge",
    [
        nan_moment,
        negative_moment,
        nan_rate,
        no_rate,
        no_schedule,
        method_of_schedule,
        no_loops,
        callbacks_of_text,
        negative_updates,
        trained_number,
    ],
)
def test_a_damaged_checkpoint_is_refused_before_training(
    forge: Callable[[dict[str, Any]], None],
    checkpoint: Path,
    tmp_path: Path,
    module: Callable[..., EarVAEModule],
    train: Callable[..., L.Trainer],
) -> None:
    model = module()
    before = copy.deepcopy(model.vae.state_dict())
    with pytest.raises(EarVAEError):
        train(tmp_path, 4, model=model, resume=forged(checkpoint, tmp_path / "forged.ckpt", forge))
    after = model.vae.state_dict()
    if forge is not negative_updates:  # found while the weights are put in place
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_kind_of_schedule_is_refused_in_words(
    checkpoint: Path, tmp_path: Path, module: Callable[..., EarVAEModule], train: Callable[..., L.Trainer]
) -> None:
    other = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    model = module(optimizer=OptimizerConfig(warmup_steps=2, schedule=other))
    with pytest.raises(EarVAEError, match="schedule is of another kind"):
        train(tmp_path, 4, model=model, resume=checkpoint)


def test_a_schedule_by_class_after_a_warm_up_is_resumed(
    tmp_path: Path, module: Callable[..., EarVAEModule], train: Callable[..., L.Trainer]
) -> None:
    decay = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    settings = OptimizerConfig(warmup_steps=2, schedule=decay, learning_rate=1e-3)
    train(tmp_path / "a", 4, model=module(optimizer=settings))
    model = module(optimizer=settings)
    trainer = train(tmp_path / "b", 5, model=model, resume=tmp_path / "a" / "checkpoints" / "last.ckpt")
    # Steps 0 and 1 warm up; the rate of step n from 2 on is halved n - 2 times.
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5 ** (5 - 2))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda content: content.update(hyper_parameters={}), "does not fit"),
        (lambda content: content["hyper_parameters"].update(objective="x"), "does not fit"),
        (lambda content: content.update({"pytorch-lightning_version": "x"}), "not a checkpoint"),
    ],
)
def test_damaged_hyper_parameters_are_refused(
    forge: Callable[[dict[str, Any]], None], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EarVAEError, match=reason):
        EarVAEModule.load_from_checkpoint(forged(checkpoint, tmp_path / "forged.ckpt", forge))


def test_settings_that_a_checkpoint_decides_are_refused(checkpoint: Path, least_config: EarVAEConfig) -> None:
    with pytest.raises(EarVAEError, match="config: the model is that of the checkpoint"):
        EarVAEModule.load_from_checkpoint(checkpoint, config=least_config)
    with pytest.raises(EarVAEError, match="device 'meta' is not available"):
        EarVAEModule.load_from_checkpoint(checkpoint, map_location="meta")


@pytest.fixture(scope="module")
def released(
    tmp_path_factory: pytest.TempPathFactory,
    module: Callable[..., EarVAEModule],
    train: Callable[..., L.Trainer],
) -> Path:
    root = tmp_path_factory.mktemp("released")
    train(root, 2, model=module(discriminator=DISCRIMINATOR))
    return release_model(root / "checkpoints" / "last.ckpt", root / "model", training_state=True)


DISCRIMINATOR = DiscriminatorConfig(window_sizes=(64,), channels=2, dilations=(1,))


@pytest.mark.parametrize(
    ("suffix", "value", "reason"),
    [
        ("/exp_avg", torch.nan, "moments of 1 weights do not fit"),
        ("/exp_avg_sq", -1.0, "moments of 1 weights do not fit"),
        ("/exp_avg", None, "moments of 1 weights do not fit"),
        (".bias", torch.nan, "holds NaN"),
    ],
)
def test_a_damaged_training_state_is_refused(
    suffix: str,
    value: float | None,
    reason: str,
    released: Path,
    tmp_path: Path,
    module: Callable[..., EarVAEModule],
    train: Callable[..., L.Trainer],
) -> None:
    tensors = load_file(released / "training_state.safetensors")
    name = min(key for key in tensors if key.startswith("vae") and key.endswith(suffix))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = torch.full_like(tensors[name], value)
    state = tmp_path / "state.safetensors"
    save_file(tensors, state, {"format": "ear-vae-training-state", "step": "2"})
    model = module(pretrained=str(released), training_state=str(state), discriminator=DISCRIMINATOR)
    with pytest.raises(EarVAEError, match=reason):
        train(tmp_path, 1, model=model, callbacks=[])


def test_moments_of_adamw_are_for_adamw(
    released: Path, tmp_path: Path, module: Callable[..., EarVAEModule], train: Callable[..., L.Trainer]
) -> None:
    model = module(
        pretrained=str(released),
        training_state=str(released / "training_state.safetensors"),
        discriminator=DISCRIMINATOR,
        optimizer=OptimizerConfig(algorithm=functools.partial(torch.optim.SGD, lr=0.1)),
    )
    with pytest.raises(EarVAEError, match="moments of AdamW, not of SGD"):
        train(tmp_path, 1, model=model, callbacks=[])
