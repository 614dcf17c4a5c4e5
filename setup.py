"""Which packages a wheel holds; all else is in pyproject.toml.

Two of them are no code: copies of the folders checkpoints and recipes, which amt/files/shipped.py finds.
"""

from setuptools import find_packages, setup

SHIPPED = {"amt.checkpoints": "checkpoints", "amt.recipes": "recipes"}

setup(
    packages=[*find_packages(include=["amt", "amt.*", "meta_dataset_readers*"]), *SHIPPED],
    package_dir=SHIPPED,
)
