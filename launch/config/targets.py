"""Targets: checks which classes a configuration may instantiate through `_target_`, and imports them.

A run directory may be from an untrusted source, so a stored configuration instantiates only classes of this project,
and callbacks and loggers of Lightning. Other classes need a permission: the dotted name of a package, a module or a
class. Permissions come from the current command line only: `allow_targets=[mypkg]`, and the targets of a new run. They
are never read from a stored configuration; the launcher passes them to its processes.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from gpt2lab.errors import InputError

OWN_PACKAGES = ("lightning_modules", "datamodules", "callbacks")
LIGHTNING_PACKAGES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers")
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.trainer.trainer.Trainer")
# Base class in lightning.pytorch of each node of the configuration
BASES = {
    "task": "LightningModule",
    "data": "LightningDataModule",
    "callbacks": "Callback",
    "logger": "loggers.Logger",
    "trainer": "Trainer",
}


def parse_permissions(text: str) -> list[str]:
    """Parse the value of `allow_targets`: `mypkg`, `[mypkg,other.module]`.

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
                f"allow_targets={text}: {name!r} is not the dotted name of a package, module or class.\n"
                "Give names as Python imports them: allow_targets=[mypkg,other.module]."
            )
    return names


def foreign_targets(nodes: Mapping[str, Any]) -> list[str]:
    """Return the targets outside this project, which need a permission in a stored configuration.

    Args:
        nodes: `_target_` and keys of each object, by configuration key.
    """
    targets = [str(node.get("_target_", "")) for node in nodes.values() if isinstance(node, dict)]
    return [one for one in dict.fromkeys(targets) if one not in TRAINERS and not _is_below(one, OWN_PACKAGES)]


def check_targets(nodes: Mapping[str, Any], permissions: Iterable[str]) -> None:
    """Check the targets by name, without an import.

    Raises:
        InputError: a target is not permitted; the message contains the permission it needs.
    """
    for where, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise InputError(f"{shorten(where)} has no _target_ (name of a class): {shorten(str(node))}.")
        _check_name(node["_target_"], where, node["_target_"], permissions)


def target_class(node: Mapping[str, Any], where: str, permissions: Iterable[str]) -> Any:
    """Import the class of a node.

    Args:
        where: configuration key of the node.

    Raises:
        InputError: the class is not permitted, does not exist, or has another base class than `where` needs.
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


def check_kwargs_permission(key: str, target: str, permissions: Iterable[str]) -> None:
    """Check permission for a key that the class passes to another library as `**kwargs`, with unknown effects.

    Raises:
        InputError: there is no permission for this class.
    """
    if not _is_below(target, permissions):
        raise InputError(
            f"{shorten(key)} is passed to another library, which could execute any code.\n"
            f"If you trust the run, permit it on the command line: allow_targets=[{target}]"
        )


def shorten(text: str) -> str:
    """Shorten untrusted text for a message, with control characters escaped."""
    return (text if text.isprintable() else repr(text))[:120]


def _check_name(name: str, where: str, target: str, permissions: Iterable[str]) -> None:
    """Reject a name outside the permitted packages; `name` is the target, or the qualified name of its class."""
    if _is_below(name, (*OWN_PACKAGES, *LIGHTNING_PACKAGES, *permissions)) or (where == "trainer" and name in TRAINERS):
        return
    package = name.split(".")[0]
    package = package if package.isidentifier() else "PACKAGE"
    defined = "" if name == target else f", which is {name}"
    raise InputError(
        f"{shorten(where)}._target_={shorten(target)}{defined}: a stored configuration instantiates only\n"
        "classes of this project and Lightning's callbacks and loggers, since others could execute any code.\n"
        f"If you trust this code, permit its package on the command line: allow_targets=[{package}]"
    )


def _check_base(kind: type, where: str, target: str) -> None:
    import lightning.pytorch

    base = BASES[where.partition(".")[0]]
    if not issubclass(kind, attrgetter(base)(lightning.pytorch)):
        raise InputError(f"{shorten(where)}._target_={target} is not a subclass of lightning.pytorch.{base}.")


def _is_below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
