"""Uploading a model to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ear_vae.config import EarVAEConfig
from ear_vae.errors import EarVAEError
from ear_vae.pretrained.card import ModelCardFacts
from ear_vae.pretrained.folder import CARD_FILE, CARD_IS_THERE, CONFIG_FILE, WEIGHTS_FILE, write_folder
from ear_vae.pretrained.resolve import what_the_hub_says


def push(
    config: EarVAEConfig,
    state: Mapping[str, Tensor],
    repo_id: str,
    *,
    name: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload εar-VAE",
    card: ModelCardFacts | None = None,
) -> str:
    """Creates a Hub repository if needed, and uploads what `write_folder` writes.

    A model card that is already there is kept.

    Args:
        config: Architecture of the model.
        state: State dict that fits the config.
        repo_id: Repository to upload to, `owner/name`.
        name: Name of the model in its card.
        token: Access token with the right to write.
        private: Make a new repository private; by default what the account's settings say.
        commit_message: First line of the commit.
        card: What the author adds to the card, for a repository without one.

    Returns:
        The address of the commit.

    Raises:
        EarVAEError: As `write_folder`, or the Hub refused or could not be reached.
    """
    # Imported here because it takes a second, which `EarVAE` does not need.
    from huggingface_hub import CommitOperationAdd, HfApi

    with tempfile.TemporaryDirectory(prefix="ear-vae-") as temporary:
        write_folder(temporary, config, state, name=name, card=card)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            files = [CONFIG_FILE, WEIGHTS_FILE]
            if not api.file_exists(repo_id, CARD_FILE):
                files.append(CARD_FILE)
            elif card is not None:
                raise EarVAEError(f"{repo_id}: {CARD_IS_THERE}")
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(file, Path(temporary, file)) for file in files],
                commit_message=commit_message,
            )
        except EarVAEError:
            raise
        except Exception as error:  # the client lets through whatever its HTTP library of the day raises
            raise EarVAEError(
                f"{repo_id}: the upload failed: {what_the_hub_says(error)}; a token with the right to write "
                "is needed: log in to the Hub, or give one",
                argument="token",
                value=...,
            ) from error
    return str(commit.commit_url)
