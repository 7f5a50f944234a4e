"""Packages of the wheel; everything else about it is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

OWN = ("gpt2lab", "lightning_modules", "datamodules", "callbacks", "launch", "hydra_plugins", "conf")
# train.py, evaluate.py and generate.py: a top-level module `evaluate` would be Hugging Face's package.
SCRIPTS = "gpt2lab_scripts"

setup(
    packages=[*find_namespace_packages(include=[pattern for name in OWN for pattern in (name, f"{name}.*")]), SCRIPTS],
    package_dir={SCRIPTS: "."},
)
