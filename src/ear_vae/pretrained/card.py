"""The model card of a folder: what the model itself tells, and what its author adds."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ear_vae import __version__
from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.limits import escaped, name_in_a_line, shown

_LIBRARY, _TASK = "ear-vae", "audio-to-audio"
_TAGS = ("audio", "music", "vae")
_CHANNELS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True)
class Figures:
    """A table of figures for a model card.

    Args:
        description: How they were measured, in a sentence with the command; Markdown.
        rows: Cells of the table, the heading first; plain text.
        metrics: Names of the metrics, for the metadata.
    """

    description: str
    rows: tuple[tuple[str, ...], ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class ModelCardFacts:
    """What the author of a model adds to its card.

    Args:
        license: Identifier of the weights' licence as the Hub has it, such as `apache-2.0`.
        datasets: Data sets on the Hub that it was trained on, as `owner/name`.
        data: What it was trained on and under which licences, in words; Markdown.
        base_model: Model on the Hub that it was fine-tuned from, as `owner/name`.
        tags: Tags beside `audio`, `music` and `vae`.
        figures: Tables of figures, as `ear_vae.evaluation.Evaluation.figures` returns one.

    Raises:
        EarVAEError: A field is no text, or no list of texts.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    data: str | None = None
    base_model: str | None = None
    tags: Sequence[str] = ()
    figures: Sequence[Figures] = ()

    def __post_init__(self) -> None:
        for name in ("license", "data", "base_model"):
            if not isinstance(value := getattr(self, name), (str, type(None))):
                raise EarVAEError(f"card: {name} must be a text, got {shown(value)}")
        for name in ("datasets", "tags"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise EarVAEError(f"card: {name} must be a list of texts, got {shown(value)}")


def model_card(
    config: EarVAEConfig,
    name: str,
    *,
    num_parameters: int,
    facts: ModelCardFacts | None = None,
    training: Mapping[str, str] | None = None,
) -> str:
    """Returns the card of a model for the Hub: the same text each time, and made without a network.

    Args:
        config: Architecture of the model.
        name: Name of the model.
        num_parameters: Number of its parameters.
        facts: What its author adds; sections without anything to say are left out.
        training: How it was trained, by name, from anywhere; shown as text.
    """
    # Imported here because it takes a quarter of a second, which `EarVAE` does not need.
    from huggingface_hub import ModelCard, ModelCardData

    facts = facts or ModelCardFacts()
    metrics = dict.fromkeys(metric for figures in facts.figures for metric in figures.metrics)
    data = ModelCardData(
        license=facts.license,
        library_name=_LIBRARY,
        pipeline_tag=_TASK,
        tags=list(dict.fromkeys([*_TAGS, *facts.tags])),
        datasets=list(facts.datasets) or None,
        metrics=list(metrics) or None,
        base_model=facts.base_model,
    )
    is_oobleck = config.snakes_per_residual_unit == 2
    card = ModelCard.from_template(
        data,
        template_str=(files("ear_vae.pretrained") / "model_card.md.jinja").read_text(encoding="utf-8"),
        heading=re.sub(r"([*_{}()#~])", r"\\\1", markdown_text(name_in_a_line(name))),
        network="Oobleck" if is_oobleck else "εar-VAE",
        summary=f"{config.sample_rate} Hz, {config.audio_channels} channels, {config.latent_dim} latent "
        f"channels at {config.latent_rate:.2f} Hz",
        latent_dim=config.latent_dim,
        architecture=_architecture(config, num_parameters).items(),
        licence=markdown_text(facts.license or ""),
        # Under another name than in the metadata, where the Hub wants them as they are.
        datasets=[markdown_text(dataset) for dataset in facts.datasets],
        data=facts.data,
        training=[(markdown_text(key), markdown_text(value)) for key, value in (training or {}).items()],
        figures=[
            {
                "description": figures.description,
                "rows": [[markdown_text(cell) for cell in row] for row in figures.rows],
            }
            for figures in facts.figures
        ],
        limits=_limits(config),
        cites_paper=not is_oobleck,
        version=__version__,
    )
    return str(card).rstrip("\n") + "\n"


def markdown_text(text: str) -> str:
    """Returns text from anywhere for a line of a card, without the tags, links or cells it might make."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(escaped(text), quote=False))


def _architecture(config: EarVAEConfig, num_parameters: int) -> dict[str, Any]:
    widths = ", ".join(str(config.channels * multiplier) for multiplier in config.channel_multipliers)
    transformer = f"{config.transformer_depth} layers, heads of {config.transformer_head_dim} channels"
    return {
        "audio": f"{_CHANNELS[config.audio_channels]}, {config.sample_rate} Hz",
        "latents": f"{config.latent_dim} channels at {config.latent_rate:.2f} Hz, one frame per "
        f"{config.downsampling_ratio} samples",
        "parameters": f"{num_parameters:,}",
        "stages": f"{len(config.strides)}, of {widths} channels",
        "strides": ", ".join(map(str, config.strides)),
        "transformer on the latents": transformer if config.transformer_depth else "none",
        "mean and standard deviation of the latents": "not in `config.json`"
        if config.latents_mean is None
        else "in `config.json`, for `EarVAE.normalize`",
    }


def _limits(config: EarVAEConfig) -> list[str]:
    """What holds for every model of the family, each with what to do about it."""
    rate = config.sample_rate
    limits = [
        f"Audio of other rates is resampled to {rate} Hz, so that what lies above {rate / 2:g} Hz is lost. "
        "Keep the original where that matters.",
        "Peaks above full scale are normal. Write floating-point files, or scale them down (`ear-vae "
        "reconstruct --peak scale`).",
        "float16 overflows in the decoder and is refused. Use bfloat16 or float32.",
    ]
    if config.latents_mean is None:
        limits.append(
            "The scale of the latents differs from channel to channel. Measure it (`ear-vae statistics "
            "DATASET --into MODEL`) and use `EarVAE.normalize` before training a generative model on them."
        )
    return limits
