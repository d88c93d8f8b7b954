"""From a checkpoint to a folder for users, and to all that others need to train on."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.cli import main
from ear_vae.evaluation import METRICS
from ear_vae.evaluation.results import Evaluation, Inputs
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import EarVAEModule
from ear_vae.training.module import ObjectiveConfig
from ear_vae.training.optimization import OptimizerConfig

TINY = EarVAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2, 2))
JUDGE = DiscriminatorConfig(window_sizes=(512, 128), channels=4)
FAST = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def fit(module: EarVAEModule, steps: int) -> L.Trainer:
    generator = torch.Generator().manual_seed(0)
    batches = [0.1 * torch.randn(2, 2, 4096, generator=generator) for _ in range(steps)]
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        num_sanity_val_steps=0,
    )
    loaders = DataLoader(batches, batch_size=None), DataLoader([batches[0][:1]], batch_size=None)
    trainer.fit(module, *loaders)
    return trainer


@pytest.fixture(scope="module")
def trained() -> EarVAEModule:
    torch.manual_seed(0)
    module = EarVAEModule(
        TINY,
        objective=ObjectiveConfig(weighting="a", magnitude_channels="lr"),
        discriminator=JUDGE,
        optimizer=FAST,
        discriminator_optimizer=FAST,
    )
    with pytest.warns():  # of few workers, and of few batches
        fit(module, 3)
    return module


@pytest.fixture(scope="module")
def checkpoint(trained: EarVAEModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trained.trainer.save_checkpoint(path, weights_only=False)
    return path


def assert_same_model(one: EarVAE, other: EarVAE) -> None:
    assert one.config == other.config
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("raw", [False, True])
def test_a_folder_for_users(trained: EarVAEModule, checkpoint: Path, tmp_path: Path, raw: bool) -> None:
    folder = tmp_path / "my model"
    assert main(["release", str(checkpoint), str(folder), *(["--raw"] if raw else [])]) == 0
    assert_same_model(EarVAE.from_pretrained(folder), trained.folded(averaged=not raw))
    card = (folder / "README.md").read_text(encoding="utf-8")
    for fact in (
        "# my model",
        "| steps | 3 |",
        "| loss weights | spectral_convergence 1,",
        "| weighting | a |",
        "| magnitude channels | lr |",
        "| validation/si_sdr_db |",
    ):
        assert fact in card
    assert ("last weights" if raw else "average of the weights") in card
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_what_the_card_says_of_start_licence_data_and_figures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("estimate", "target")
    row = {
        **dict.fromkeys(METRICS, 0.25),
        **{f"{q}_{n}": 1.0 for q in ("lufs", "loudness_range_lu", "true_peak_dbtp") for n in names},
        **{"name": "a", "system": "rebuilt", "notes": []},
    }
    Evaluation([row], [], Inputs(target="/secret", estimate="/secret")).write_json(tmp_path / "figures.json")
    content = torch.load(checkpoint, weights_only=True)
    for start, base_model in (("earlab/EAR_VAE", "earlab/EAR_VAE"), ("/secret/model", None), (["x"], None)):
        content["hyper_parameters"]["pretrained"] = start
        torch.save(content, tmp_path / "from.ckpt")
        options = ["--license", "mit", "--dataset", "a/b", "--data", "My own.", "--force"]
        options += ["--evaluation", str(tmp_path / "figures.json")]
        assert main(["release", str(tmp_path / "from.ckpt"), str(tmp_path / "model"), *options]) == 0
        card = ModelCard.load(tmp_path / "model" / "README.md")
        assert (card.data.license, card.data.datasets) == ("mit", ["a/b"])
        assert card.data.base_model == base_model
        assert ("| start | the weights of earlab/EAR_VAE |" in card.text) == (base_model is not None)
        assert "secret" not in card.text
        assert "My own." in card.text
        assert "| si_sdr_db | 0.25 |" in card.text
        assert "| validation/si_sdr_db |" in card.text
        assert card.data.metrics == list(METRICS)
    (tmp_path / "figures.json").write_text("{}")
    assert main(["release", str(checkpoint), str(tmp_path / "new"), *options]) == 1
    assert "figures.json: is no evaluation" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_existing_model_is_replaced_only_when_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["release", str(checkpoint), str(tmp_path / "model")]
    assert main([*arguments, "--training-state"]) == 0
    assert (tmp_path / "model" / "training_state.safetensors").exists()
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert main([*arguments, "--raw"]) == 1
    assert "holds a model already" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert main([*arguments, "--raw", "--force"]) == 0
    # That of other weights would be trained on as if it were of these.
    assert not (tmp_path / "model" / "training_state.safetensors").exists()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before


def test_all_it_takes_to_train_on(
    trained: EarVAEModule, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    assert main(["release", str(checkpoint), str(folder), "--training-state"]) == 0
    said = capsys.readouterr().err
    assert f"{folder}: a model and its training state; use it with --model {folder}\n" in said
    still = OptimizerConfig(learning_rate=0.0, warmup_steps=0)
    module = EarVAEModule(
        pretrained=str(folder),
        training_state=str(folder / "training_state.safetensors"),
        discriminator=JUDGE,
        optimizer=still,
        discriminator_optimizer=still,
    )
    steps: list[dict[str, dict[str, Tensor]]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
            states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
            steps.extend(copy.deepcopy({str(i): m for i, m in state.items()}) for state in states)

    generator = torch.Generator().manual_seed(0)
    batches = [0.1 * torch.randn(2, 2, 4096, generator=generator)]
    L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Look()],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(batches, batch_size=None))
    for name, tensor in trained.state_dict().items():
        if name.startswith(("vae.", "discriminator.")):
            assert torch.equal(tensor, module.state_dict()[name]), name
    for mine, theirs in zip(steps, trained.trainer.optimizers, strict=True):
        expected = theirs.state_dict()["state"]
        assert len(mine) == len(expected)
        for index, moments in expected.items():
            for name, tensor in moments.items():
                assert torch.equal(mine[str(index)][name], tensor), (index, name)


def test_what_is_no_training_state_of_it(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["release", str(checkpoint), str(tmp_path / "model"), "--training-state"]) == 0
    state = tmp_path / "model" / "training_state.safetensors"
    other = DiscriminatorConfig(window_sizes=(512, 128), channels=8)
    for path, judge, message in (
        (
            state,
            other,
            "of another architecture: .*, such as discriminator.*; give the discriminator",
        ),
        (state, None, "another architecture"),
        (tmp_path / "model" / "model.safetensors", JUDGE, "is not a training state"),
        (tmp_path / "nothing.safetensors", JUDGE, "missing"),
    ):
        module = EarVAEModule(
            pretrained=str(tmp_path / "model"), training_state=str(path), discriminator=judge
        )
        with pytest.raises(EarVAEError, match=message):
            fit(module, 1)
    tensors = load_file(state)
    lacking = {key: v for key, v in tensors.items() if "decoder.conv_in.bias/" not in key}
    save_file(lacking, state, metadata={"format": "ear-vae-training-state"})
    module = EarVAEModule(pretrained=str(tmp_path / "model"), training_state=str(state), discriminator=JUDGE)
    with pytest.raises(EarVAEError, match=r"no moments of 1 weights, such as decoder\.conv_in\.bias"):
        fit(module, 1)


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_training_state_with_the_encoder_trained_or_not(tmp_path: Path, trained_before: bool) -> None:
    """One goes on as the other began; otherwise it is said what to change."""
    EarVAE(TINY).save_pretrained(tmp_path / "start")
    module = EarVAEModule(
        pretrained=str(tmp_path / "start"),
        train_encoder=trained_before,
        discriminator=JUDGE,
        optimizer=FAST,
        discriminator_optimizer=FAST,
    )
    with pytest.warns():  # of few workers, and of few batches
        fit(module, 1).save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert main(["release", str(tmp_path / "last.ckpt"), str(tmp_path / "model"), "--training-state"]) == 0

    def go_on(train_encoder: bool) -> None:
        state = str(tmp_path / "model" / "training_state.safetensors")
        model = str(tmp_path / "model")
        fit(
            EarVAEModule(
                pretrained=model, training_state=state, train_encoder=train_encoder, discriminator=JUDGE
            ),
            1,
        )

    with pytest.raises(EarVAEError, match=f"set train_encoder to {str(trained_before).lower()}, as that run"):
        go_on(not trained_before)
    with pytest.warns():
        go_on(trained_before)


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "executed"),))  # type: ignore[return-value]

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    for name, message in (
        ("missing.ckpt", "no such file"),
        ("other.ckpt", "not a checkpoint of ear-vae fit"),
        ("text.ckpt", "text.ckpt: is not a checkpoint\n"),
        ("evil.ckpt", "holds objects that only running code from the file could restore"),
    ):
        assert main(["release", str(tmp_path / name), str(tmp_path / "model")]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "model").exists()


def test_a_frozen_encoder_is_released_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    EarVAE(TINY).save_pretrained(tmp_path / "start")
    module = EarVAEModule(pretrained=str(tmp_path / "start"), train_encoder=False, ema_decay=0.0)
    fit(module, 1).save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert main(["release", str(tmp_path / "last.ckpt"), str(tmp_path / "end")]) == 0
    released, start = (EarVAE.from_pretrained(tmp_path / name) for name in ("end", "start"))
    for one, other in zip(released.encoder.parameters(), start.encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_same_model(released, module.folded())


@pytest.mark.parametrize("raw", [False, True])
def test_weights_that_are_not_finite_are_not_released(
    checkpoint: Path, tmp_path: Path, raw: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does the refusal touch the model that is there."""
    content = torch.load(checkpoint, weights_only=True)
    prefix = "vae." if raw else "ema.network."
    content["state_dict"][f"{prefix}decoder.conv_in.bias"][0] = torch.nan
    torch.save(content, tmp_path / "broken.ckpt")
    options = ["--raw"] if raw else []
    assert main(["release", str(checkpoint), str(tmp_path / "there")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    capsys.readouterr()
    command = ["release", str(tmp_path / "broken.ckpt"), str(tmp_path / "there"), *options, "--force"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "broken.ckpt: the weights do not fit the config: decoder.conv_in.bias holds NaN" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    assert main(["release", str(tmp_path / "broken.ckpt"), str(tmp_path / "new"), *options]) == 1
    assert capsys.readouterr() == ("", error)
    assert {path.name for path in tmp_path.iterdir()} == {"broken.ckpt", "there"}


def test_a_folder_appears_whole_or_not_at_all(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is complete when the training state turns out to be of no use."""
    content = torch.load(checkpoint, weights_only=True)
    for optimizer in content["optimizer_states"]:
        optimizer["state"] = {}
    torch.save(content, tmp_path / "new.ckpt")
    assert main(["release", str(tmp_path / "new.ckpt"), str(tmp_path / "model"), "--training-state"]) == 1
    assert "the optimizer of the vae has not taken a step" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]
    assert main(["release", str(tmp_path / "new.ckpt"), str(tmp_path / "model")]) == 0
    EarVAE.from_pretrained(tmp_path / "model")


def test_the_model_of_a_run_is_not_replaced_by_one_that_is_not_finite(tmp_path: Path) -> None:
    module = EarVAEModule(TINY, ema_decay=0.0)
    module.export(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        module.vae.decoder.conv_in.bias[0] = torch.inf
    with pytest.raises(EarVAEError, match=r"1 weights hold NaN or infinity, such as decoder\.conv_in\.bias"):
        module.export(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
