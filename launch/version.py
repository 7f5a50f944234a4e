"""Version of this project and of the packages that determine a run's results."""

import platform
import tomllib
from importlib import metadata
from pathlib import Path

NAME = "gpt2-lab"
PACKAGES = ("torch", "lightning", "transformers", "datasets", "hydra-core", "wandb", "torchmetrics")


def version_text() -> str:
    """Return one line for this project, and one for Python and the packages; nothing heavy is imported."""
    versions = [f"{package} {metadata.version(package)}" for package in PACKAGES]
    return f"{NAME} {_own_version()}\nPython {platform.python_version()}, {', '.join(versions)}"


def _own_version() -> str:
    """Return the version in pyproject.toml of the clone, else that of the installed package."""
    file = Path(__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version(NAME)
