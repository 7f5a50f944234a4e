"""Config groups: the folders of conf/, their values, and the default of every key."""

import re
from dataclasses import MISSING
from functools import cache
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


@cache
def default_values() -> dict[str, str]:
    """Return {group: its value by default}, from the defaults list of conf/train.yaml."""
    chosen = [entry for entry in _tree("train.yaml")["defaults"] if isinstance(entry, dict)]
    return {group: value for entry in chosen for group, value in entry.items() if group in groups()}


def description(group: str, value: str) -> str:
    """Return the comment at the head of conf/<group>/<value>.yaml, up to the command that shows its use."""
    lines = []
    for line in _text(f"{group}/{value}.yaml").splitlines():
        if not line.startswith("#") or line.lstrip("# ").startswith("python "):
            break
        lines += [line.lstrip("# ")] if "@package" not in line else []
    return " ".join(lines)


@cache
def keys_set_by(group: str, value: str) -> dict[str, Any]:
    """Return {dotted key: value} of conf/<group>/<value>.yaml, and of the files of its group that it includes."""
    text, tree = _text(f"{group}/{value}.yaml"), _tree(f"{group}/{value}.yaml")
    found: dict[str, Any] = {}
    for entry in tree.pop("defaults", []):
        if isinstance(entry, str) and (CONF / group / f"{entry}.yaml").is_file():
            found |= keys_set_by(group, entry)
    package = re.match(r"# @package (\S+)", text)
    prefix = package[1] if package else group
    return found | _dotted(tree, "" if prefix == "_global_" else f"{prefix}.")


@cache
def plain_defaults() -> dict[str, Any]:
    """Return {key: default} of the plain keys, from conf/train.yaml."""
    tree = _tree("train.yaml")
    return {name: value for name, value in tree.items() if name not in ("defaults", "hydra")}


def group_of(name: str) -> str:
    """Return the group whose files set a dotted key; a study is an experiment."""
    head = name.partition(".")[0]
    return "experiment" if head == "study" else head


def default_of(name: str, chosen: dict[str, str]) -> Any:
    """Return the default of a dotted key under the chosen values of groups, MISSING where conf/ has none.

    A key that the chosen value lacks has the default of the first value with it.
    """
    group = group_of(name)
    if "." not in name or group not in groups():
        return {**plain_defaults(), **chosen}.get(name, MISSING)
    for value in (chosen[group], *values(group)):
        if name in keys_set_by(group, value):
            return keys_set_by(group, value)[name]
    return MISSING


def precision_named(name: str) -> PrecisionSettings:
    """Return the dtypes of conf/precision/<name>.yaml."""
    return PrecisionSettings(**_tree(f"precision/{name}.yaml"))


def experiment_keys(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return ({group: choice}, {key: value}) of conf/experiment/<name>.yaml."""
    keys = _tree(f"experiment/{name}.yaml")
    chosen = [item for default in keys.pop("defaults", []) for item in default.items()]
    return {group.removeprefix("override /"): value for group, value in chosen}, keys


def _text(file: str) -> str:
    return (CONF / file).read_text(encoding="utf-8")


def _tree(file: str) -> dict[str, Any]:
    return yaml.safe_load(_text(file)) or {}


def _dotted(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) and name != "hydra" else {}
        found |= inner or {f"{prefix}{name}": value}
    return found
