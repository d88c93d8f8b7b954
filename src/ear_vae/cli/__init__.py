# PYTHON_ARGCOMPLETE_OK: for shells that complete whatever says so.
"""The command `ear-vae`: the only package that knows about command lines."""

from ear_vae.cli.main import main

__all__ = ["main"]
