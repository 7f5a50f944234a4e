"""Config groups: the folders of conf/ and their choices."""

from pathlib import Path
from typing import Any

import yaml

from gpt2lab.settings import PrecisionSettings

CONF = Path(__file__).resolve().parents[2] / "conf"


def groups() -> list[str]:
    """Return the names of all groups."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def values(group: str) -> list[str]:
    """Return the choices of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def precision_named(name: str) -> PrecisionSettings:
    """Return the dtypes of conf/precision/<name>.yaml."""
    return PrecisionSettings(**yaml.safe_load((CONF / "precision" / f"{name}.yaml").read_text(encoding="utf-8")))


def experiment_keys(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return ({group: choice}, {key: value}) of conf/experiment/<name>.yaml."""
    keys = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    chosen = [item for default in keys.pop("defaults", []) for item in default.items()]
    return {group.removeprefix("override /"): value for group, value in chosen}, keys
