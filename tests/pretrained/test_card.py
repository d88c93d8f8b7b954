"""Model cards: read back by the Hub's own reader, true to the model, never in the way of the user's own."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ear_vae import EarVAE, EarVAEConfig, EarVAEError
from ear_vae.evaluation import METRICS
from ear_vae.evaluation.results import Evaluation, Inputs
from ear_vae.pretrained import Figures, ModelCardFacts, bundled_checkpoints

FACTS = ModelCardFacts(
    license="cc-by-4.0",
    datasets=["someone/songs"],
    data="Twelve songs of [mine](https://example.org), CC-BY 4.0.",
    base_model="earlab/EAR_VAE",
    tags=["piano", "audio"],
    figures=[Figures("`measure this`:", (("", "mine"), ("si_sdr_db", "12.00")), ("si_sdr_db",))],
)


def sections(card: str) -> list[str]:
    return [line.removeprefix("## ") for line in card.splitlines() if line.startswith("## ")]


def table(card: str) -> dict[str, str]:
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


def test_a_card_says_what_the_model_tells(tmp_path: Path) -> None:
    """The published size, whose numbers are known from the authors' files."""
    EarVAE(EarVAEConfig(channels=128), name="mine").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "ear-vae",
        "pipeline_tag": "audio-to-audio",
        "tags": ["audio", "music", "vae"],
    }
    assert sections(card.text) == ["Architecture", "Limits", "How to cite"]
    facts = table(card.text)
    assert facts["latents"] == "64 channels at 43.07 Hz, one frame per 1024 samples"
    assert facts["stages"] == "5, of 128, 256, 512, 1024, 2048 channels"
    assert facts["transformer on the latents"] == "2 layers, heads of 32 channels"
    assert round(int(facts["parameters"].replace(",", "")) / 1e6, 1) == 147.8
    assert "eprint = {2509.14912}" in card.text
    assert "\n\n\n" not in card.text


def test_a_card_says_what_its_author_adds(least_config: EarVAEConfig, tmp_path: Path) -> None:
    EarVAE(least_config).save_pretrained(tmp_path, card=FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "license": "cc-by-4.0",
        "library_name": "ear-vae",
        "pipeline_tag": "audio-to-audio",
        "tags": ["audio", "music", "vae", "piano"],
        "datasets": ["someone/songs"],
        "metrics": ["si_sdr_db"],
        "base_model": "earlab/EAR_VAE",
    }
    assert sections(card.text) == ["Architecture", "Data and licences", "Figures", "Limits", "How to cite"]
    for said in (
        "under cc-by-4.0.",
        "on someone/songs.",
        FACTS.data,
        "`measure this`:",
        "| si_sdr_db | 12.00 |",
    ):
        assert str(said) in card.text
    assert "\n\n\n" not in card.text


def test_what_does_not_apply_is_left_out(least_config: EarVAEConfig, tmp_path: Path) -> None:
    vae = EarVAE(replace(least_config, snakes_per_residual_unit=2))
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    vae.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Oobleck weights" in card
    assert "arXiv" not in card
    assert "ear-vae statistics" not in card


def test_ten_saves_are_one(
    least_config: EarVAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of them looks anything up."""
    vae = EarVAE(least_config, name="mine")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a network was asked"))
    sums = set()
    for number in range(10):
        vae.save_pretrained(tmp_path / str(number), card=FACTS)
        files = sorted((tmp_path / str(number)).iterdir())
        sums.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(sums) == 1


def test_a_card_that_is_there_stays(least_config: EarVAEConfig, tmp_path: Path) -> None:
    vae = EarVAE(least_config)
    vae.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(EarVAEError, match=r"README\.md: a card is there already, and stays; remove it"):
        vae.save_pretrained(tmp_path, card=FACTS)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "value"), [("license", 4), ("data", ["a"]), ("datasets", "one/set"), ("tags", [3])]
)
def test_facts_are_texts(field: str, value: object) -> None:
    with pytest.raises(EarVAEError, match=f"card: {field} must be a"):
        ModelCardFacts(**{field: value})  # type: ignore[arg-type]


def test_figures_of_an_evaluation(least_config: EarVAEConfig, tmp_path: Path) -> None:
    """The names in it may come from anywhere; those of files and folders are left out."""
    evil = "a`|<b>\x1b"
    values = dict.fromkeys(METRICS, 0.5)
    names = ("estimate", "target")
    quantities = {
        f"{what}_{side}": 1.0 for what in ("lufs", "loudness_range_lu", "true_peak_dbtp") for side in names
    }
    rows = [
        {"name": name, "system": system, **values, **quantities, "si_sdr_db": decibels}
        for name, system, decibels in (("secret", evil, 10.0), ("b", evil, 13.0), ("secret", "tiny", 7.0))
    ]
    inputs = Inputs(target="/home/me/secret", models={evil: "/home/me/secret/model", "tiny": "ear-vae-tiny"})
    facts = ModelCardFacts(figures=[Evaluation(rows, [], inputs).figures()])
    EarVAE(least_config).save_pretrained(tmp_path, card=facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.metrics == list(METRICS)
    assert "secret" not in card.text
    assert "| si_sdr_db | 11.50 | 7.00 |" in card.text
    assert "| icpc % | 50.00 | 50.00 |" in card.text
    assert r"|  | a\`\|&lt;b&gt;\\x1b | tiny |" in card.text
    assert r"`ear-vae evaluate ORIGINALS --model 'a'|<b>\x1b' --model tiny`, means over 2 files:" in card.text
    with pytest.raises(EarVAEError, match="no results for a card"):
        Evaluation([], [], inputs).figures()


def test_the_bundled_card_has_a_licence() -> None:
    card = ModelCard.load(bundled_checkpoints()["ear-vae-tiny"] / "README.md")
    assert card.data.license == "apache-2.0"
    assert "MODEL_CARD.md" in card.text
