"""torchaudio's Python half, with or without its compiled extension."""

from __future__ import annotations

import sys
import types
from typing import Any

from ear_vae.errors import first_line

_problems: list[str] = []


def functional() -> Any:
    """`torchaudio.functional`, imported on first use.

    The compiled extension of torchaudio's last wheels fails to load beside many builds of torch (OSError
    with a CPU build, RuntimeError with another CUDA version) and takes the whole import with it, though
    resampling and filter banks are plain Python. In that case the import is repeated with the extension
    marked as absent, which is a state torchaudio itself provides for.
    """
    try:
        import torchaudio.functional
    except (OSError, RuntimeError) as error:
        _problems.append(first_line(error))
        for name in [n for n in sys.modules if n == "torchaudio" or n.startswith("torchaudio.")]:
            del sys.modules[name]
        sys.modules["torchaudio._extension"] = _absent_extension()
        import torchaudio.functional
    return torchaudio.functional


def extension_problem() -> str | None:
    """Why torchaudio's compiled extension does not load, None where it does."""
    functional()
    return _problems[0] if _problems else None


def _absent_extension() -> types.ModuleType:
    def unavailable(function: Any) -> Any:
        """Decorates functions of the extension: they fail when called, not when imported."""

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError(
                f"{function.__name__} needs torchaudio's compiled extension, which does not fit this torch"
            )

        return fail

    extension = types.ModuleType("torchaudio._extension")
    extension.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=unavailable,
    )
    return extension
