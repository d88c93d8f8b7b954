"""What pyproject.toml cannot say: packages below src, beside one that lies elsewhere; the text for PyPI."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup


def description() -> str:
    """Returns the README without relative links, which would lead nowhere on PyPI.

    The workflow that publishes gives the address of the repository's files in `EAR_VAE_FILES`, such as
    https://github.com/OWNER/REPOSITORY/blob/v0.1.0; links then lead there. Otherwise their text is left.
    """
    if files := os.environ.get("EAR_VAE_FILES"):
        picture, link = rf"![\1]({files}/\2?raw=true)", rf"[\1]({files}/\2)"
    else:
        picture, link = r"*Picture: \1.*", r"\1"
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", picture, text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", link, text)


setup(
    # The bundled models lie at the top of the repository and inside the package when installed.
    packages=[*find_packages("src"), "ear_vae.checkpoints"],
    long_description=description(),
    long_description_content_type="text/markdown",
)
