"""A checkpoint as Lightning's users know it: the module comes back from it without arguments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.evaluation import si_sdr_db
from ear_vae.training import (
    AudioDataModule,
    DiscriminatorConfig,
    EarVAEModule,
    ObjectiveConfig,
    OptimizerConfig,
)
from ear_vae.training.callbacks import Checkpoints

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def trainer(root: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **settings,
    )


@pytest.fixture(scope="module")
def audio() -> torch.Tensor:
    return 0.1 * torch.randn(1, 2, 8192, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, audio: torch.Tensor) -> tuple[EarVAEModule, Path]:
    """Two steps with all that is not the default, from a model that is gone afterwards; the root folder."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    EarVAE(TINY).save_pretrained(root / "start")
    module = EarVAEModule(
        pretrained=str(root / "start"),
        train_encoder=False,
        objective=ObjectiveConfig(weights={"waveform": 2.0}, weighting="a", window_sizes=(512, 256)),
        optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.5, 0.9), warmup_steps=1),
        discriminator=DiscriminatorConfig(window_sizes=(512, 128), channels=4),
        ema_decay=0.5,
        seed=7,
    )
    data = DataLoader([audio, audio], batch_size=None)
    checkpoints = Checkpoints(monitor="validation/si_sdr_db")
    trainer(root, max_epochs=2, callbacks=[checkpoints]).fit(module, data, data)
    (root / "start" / "config.json").unlink()
    return module, root


def test_it_comes_back_without_arguments(run: tuple[EarVAEModule, Path], audio: torch.Tensor) -> None:
    module, root = run
    again = EarVAEModule.load_from_checkpoint(root / "checkpoints" / "last.ckpt")
    state = module.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert again.hparams == module.hparams
    assert again.optimizer_config == module.optimizer_config
    assert again.objective.weights == module.objective.weights
    assert not any(p.requires_grad for p in again.vae.encoder.parameters())
    with torch.no_grad():
        assert torch.equal(again(audio).audio, module(audio).audio)
    assert EarVAEModule.load_from_checkpoint(root / "checkpoints" / "last.ckpt", seed=3).seed == 3


def test_a_module_from_a_checkpoint_trains_on_from_its_weights(
    run: tuple[EarVAEModule, Path], audio: torch.Tensor, tmp_path: Path
) -> None:
    module, root = run
    again = EarVAEModule.load_from_checkpoint(
        root / "checkpoints" / "last.ckpt", optimizer=OptimizerConfig(learning_rate=0.0)
    )
    trainer(tmp_path, max_steps=1, enable_checkpointing=False, limit_val_batches=0).fit(
        again, DataLoader([audio], batch_size=None)
    )
    for one, other in zip(module.vae.parameters(), again.vae.parameters(), strict=True):
        assert torch.equal(one, other)


def test_plain_values_and_every_weight_once(run: tuple[EarVAEModule, Path]) -> None:
    module, root = run
    content = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["optimizer"]["betas"] == [0.5, 0.9]
    assert not any(name.startswith("_") for name in content["hyper_parameters"])
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel() > 1]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize(
    "planted",
    [
        {"_instantiator": "os.system"},
        {"optimizer": {"algorithm": {"class_path": "os.system", "init_args": {}}}},
        {"objective": {"weights": [{"class_path": "os.system"}]}},
        {"seed": torch.zeros(1)},
    ],
)
def test_names_to_import_are_refused(
    planted: dict[str, Any], run: tuple[EarVAEModule, Path], tmp_path: Path
) -> None:
    content = torch.load(run[1] / "checkpoints" / "last.ckpt", weights_only=True)
    changed = copy.deepcopy(content["hyper_parameters"]) | planted
    torch.save(content | {"hyper_parameters": changed}, tmp_path / "planted.ckpt")
    with pytest.raises(EarVAEError, match="hyper-parameters name something to import"):
        EarVAEModule.load_from_checkpoint(tmp_path / "planted.ckpt")


def test_it_is_never_unpickled(run: tuple[EarVAEModule, Path]) -> None:
    with pytest.raises(EarVAEError, match="never unpickled"):
        EarVAEModule.load_from_checkpoint(run[1] / "checkpoints" / "last.ckpt", weights_only=False)


def test_the_best_is_kept(run: tuple[EarVAEModule, Path]) -> None:
    """Of two validations, after steps 2 and 4, by the value that each checkpoint holds."""
    module, root = run
    (best,) = (root / "checkpoints").glob("best-*.ckpt")
    callback = module.trainer.checkpoint_callback
    assert isinstance(callback, Checkpoints)
    content = torch.load(best, weights_only=True)
    assert best == Path(callback.best_model_path)
    found = content["ear_vae"]["validation"]["validation/si_sdr_db"]
    assert found == pytest.approx(float(callback.best_model_score or 0))
    assert found >= float(module.trainer.callback_metrics["validation/si_sdr_db"])
    assert best.name == f"best-step={content['global_step']}.ckpt"


def test_testing_and_predicting(run: tuple[EarVAEModule, Path], audio: torch.Tensor, tmp_path: Path) -> None:
    module = EarVAEModule.load_from_checkpoint(run[1] / "checkpoints" / "last.ckpt")
    data = DataLoader([audio], batch_size=None)
    used = trainer(tmp_path, enable_checkpointing=False)
    (validated,) = used.validate(module, data, verbose=False)
    (tested,) = used.test(module, data, verbose=False)
    assert tested == {name.replace("validation/", "test/"): value for name, value in validated.items()}
    (predicted,) = used.predict(module, data)
    with torch.no_grad():
        assert torch.equal(predicted, module.reconstruct(audio).audio)


def test_the_data_module_tests_and_predicts_on_what_it_validates_on(
    run: tuple[EarVAEModule, Path], tmp_path: Path
) -> None:
    music = tmp_path / "music"
    music.mkdir()
    noise = 0.1 * torch.randn(2, 44_100, generator=torch.Generator().manual_seed(1))
    soundfile.write(music / "a.wav", noise.T.numpy(), 44_100, "FLOAT")
    module = EarVAEModule.load_from_checkpoint(run[1] / "checkpoints" / "last.ckpt")
    used = trainer(tmp_path, enable_checkpointing=False)

    def data(validation_folder: Path | None) -> AudioDataModule:
        return AudioDataModule(
            music, validation_folder=validation_folder, validation_seconds=1.0, cache_dir=tmp_path / "cache"
        )

    (tested,) = used.test(module, data(music), verbose=False)
    (predicted,) = used.predict(module, data(music))
    with torch.no_grad():
        expected = module.reconstruct(noise[None]).audio
    assert torch.allclose(predicted, expected, atol=1e-6)
    si_sdr = si_sdr_db(expected[0], noise)
    assert tested["test/si_sdr_db"] == pytest.approx(float(si_sdr.mean()), abs=1e-3)
    for use in (used.test, used.predict):
        with pytest.raises(EarVAEError, match="needs a validation_folder"):
            use(module, data(None))


def test_the_best_need_a_validation(tmp_path: Path, audio: torch.Tensor) -> None:
    module = EarVAEModule(TINY)
    data = DataLoader([audio], batch_size=None)
    checkpoints = Checkpoints(monitor="validation/si_sdr_db")
    with pytest.raises(EarVAEError, match="si_sdr_db, but nothing is validated; give the data a"):
        trainer(tmp_path, max_steps=1, callbacks=[checkpoints]).fit(module, data)
    assert not (tmp_path / "checkpoints").exists()
