"""Targets: which classes a configuration may name in `_target_`; the only place that decides it and imports them.

A run directory may come from somebody else, so a stored configuration builds only classes of this project and
Lightning's callbacks and loggers. Everything else needs a permission, the dotted name of a package, a module or a
class. Permissions come from the current command line alone: `allow_targets=[mypkg]`, and the targets that it composes
itself for a new run. They are never read from a stored configuration; the launcher passes them on to its processes.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from gpt2lab.errors import InputError

OWN_PACKAGES = ("lightning_modules", "datamodules", "callbacks")
OF_LIGHTNING = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers")
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.trainer.trainer.Trainer")
# Place of a configuration → base of the class that is built there, in lightning.pytorch
BASES = {
    "task": "LightningModule",
    "data": "LightningDataModule",
    "callbacks": "Callback",
    "logger": "loggers.Logger",
    "trainer": "Trainer",
}


def parse_permissions(text: str) -> list[str]:
    """Read the value of `allow_targets`: `mypkg`, `[mypkg,other.module]`.

    Raises:
        InputError: not a list of dotted names.
    """
    given = text.strip()
    if given in ("", "null"):
        raise InputError("allow_targets= is empty.\nGive packages whose code you trust: allow_targets=[mypkg], or [].")
    inner = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    names = [part.strip().strip("'\"") for part in inner.split(",")] if inner.strip() else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"allow_targets={text}: {name!r} is no dotted name of a package, a module or a class.\n"
                "Give names as Python imports them: allow_targets=[mypkg,other.module]."
            )
    return names


def foreign_targets(nodes: Mapping[str, Any]) -> list[str]:
    """The targets that a stored configuration could not build, or not with every argument, without a permission.

    Args:
        nodes: `_target_` and keys of each object, by its place in the configuration.
    """
    targets = [str(node.get("_target_", "")) for node in nodes.values() if isinstance(node, dict)]
    return [one for one in dict.fromkeys(targets) if one not in TRAINERS and not _is_below(one, OWN_PACKAGES)]


def check_targets(nodes: Mapping[str, Any], permissions: Iterable[str]) -> None:
    """Check the targets by name, before anything is imported.

    Raises:
        InputError: names the first that is not permitted, and the permission it takes.
    """
    for where, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise InputError(f"{shown(where)} has no _target_, the name of the class to build: {shown(str(node))}.")
        _check_name(node["_target_"], where, node["_target_"], permissions)


def target_class(node: Mapping[str, Any], where: str, permissions: Iterable[str]) -> Any:
    """Import the class that a node names.

    Raises:
        InputError: not permitted, no such class, or one of another kind than this place of the configuration takes.
    """
    permissions = list(permissions)
    check_targets({where: node}, permissions)
    target = node["_target_"]
    module, _, name = target.rpartition(".")
    try:
        kind = vars(importlib.import_module(module))[name]
    except (ModuleNotFoundError, KeyError, ValueError) as error:
        raise InputError(f"{where}._target_={target}: there is no such class ({error}).") from error
    if target in permissions:
        return kind
    if not inspect.isclass(kind):
        raise InputError(f"{where}._target_={target}: there is no such class (it is a {type(kind).__name__}).")
    _check_name(f"{kind.__module__}.{kind.__qualname__}", where, target, permissions)
    if _is_below(kind.__module__, (*OWN_PACKAGES, "lightning")):
        _check_base(kind, where, target)
    return kind


def check_may_take_any(place: str, target: str, permissions: Iterable[str]) -> None:
    """Check an argument that a class hands on, as `**kwargs`, to a library that could do anything with it.

    Raises:
        InputError: no permission for this class.
    """
    if not _is_below(target, permissions):
        raise InputError(
            f"{shown(place)} goes on to another library, which a stored configuration could make run any code.\n"
            f"Where you trust the run, permit it on the command line: allow_targets=[{target}]"
        )


def shown(text: str) -> str:
    """Somebody else's text for a message, in which it must not fill the terminal."""
    return (text if text.isprintable() else repr(text))[:120]


def _check_name(name: str, where: str, target: str, permissions: Iterable[str]) -> None:
    """Refuse a name outside the permitted packages; it is the target, or where the target's class is defined."""
    if _is_below(name, (*OWN_PACKAGES, *OF_LIGHTNING, *permissions)) or (where == "trainer" and name in TRAINERS):
        return
    package = name.split(".")[0]
    package = package if package.isidentifier() else "PACKAGE"
    defined = "" if name == target else f", which is {name}"
    raise InputError(
        f"{shown(where)}._target_={shown(target)}{defined}: a stored configuration builds only\n"
        "classes of this project and Lightning's callbacks and loggers, since others could run any code here.\n"
        f"Where you trust that code, permit its package on the command line: allow_targets=[{package}]"
    )


def _check_base(kind: type, where: str, target: str) -> None:
    import lightning.pytorch

    base = BASES[where.partition(".")[0]]
    if not issubclass(kind, attrgetter(base)(lightning.pytorch)):
        raise InputError(f"{shown(where)}._target_={target} is no lightning.pytorch.{base}, which belongs here.")


def _is_below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
