"""What pyproject.toml cannot say: packages found below src, beside one that lies elsewhere."""

from setuptools import find_packages, setup

# The bundled models lie at the top of the repository and inside the package when installed.
setup(packages=[*find_packages("src"), "ear_vae.checkpoints"])
