"""The checkpoints that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def bundled_checkpoints() -> dict[str, Path]:
    """Lists the folders of the bundled checkpoints by name.

    They are inside an installed package, and in the top-level folder `checkpoints` of a source checkout.
    """
    package = Path(str(files("ear_vae")))
    for folder in (package / "checkpoints", package.parents[1] / "checkpoints"):
        found = {path.parent.name: path.parent for path in sorted(folder.glob("*/model.safetensors"))}
        if found:
            return found
    return {}
