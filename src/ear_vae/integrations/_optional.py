"""Libraries that the package does without, imported where an integration needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ear_vae.dsp import _torchaudio
from ear_vae.errors import EarVAEError


@contextmanager
def optional(*names: str, extra: str) -> Iterator[None]:
    """Imports libraries within the block.

    Args:
        *names: Names of the libraries.
        extra: Extra of this package that installs them.

    Raises:
        EarVAEError: One is missing, or something that it needs.
    """
    # Many import torchaudio, which has to come up even where its extension does not fit.
    _torchaudio.functional()
    try:
        yield
    except ImportError as error:
        raise EarVAEError(f'needs {", ".join(names)}: pip install "ear-vae[{extra}]" ({error})') from error
