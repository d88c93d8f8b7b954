"""The command `ear-vae`: the only package that knows a command line."""

from ear_vae.cli.main import main

__all__ = ["main"]
