"""Targets: checks which classes a configuration may instantiate through `_target_`, and imports them.

A run directory may be from an untrusted source, so a stored configuration instantiates only classes of this project,
and callbacks and loggers of Lightning. Other classes need a permission: the dotted name of a package, a module or a
class. Permissions come from the current command line only: `allow_targets=[mypkg]`, and the targets of a new run. They
are never read from a stored configuration; the launcher passes them to its processes. A `_target_` inside an argument
always needs a permission.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from gpt2lab.errors import InputError
from launch.config.did_you_mean import nearest

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
OF_HYDRA = ("_partial_", "_args_", "_convert_", "_recursive_")  # of hydra.utils.instantiate, next to `_target_`
FOLDER_ARGUMENTS = ("run_dir", "save_dir", "dirpath", "dir")


def parse_permissions(text: str, key: str = "allow_targets") -> list[str]:
    """Parse the value of `allow_targets` or `plugins`: `mypkg`, `[mypkg,other.module]`.

    Raises:
        InputError: not a list of dotted names.
    """
    given = text.strip()
    if given in ("", "null"):
        raise InputError(f"{key}= is empty.\nGive packages whose code you trust: {key}=[mypkg], or [].")
    inner = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    names = [part.strip().strip("'\"") for part in inner.split(",")] if inner.strip() else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"{key}={text}: {name!r} is not the dotted name of a package, module or class.\n"
                f"Give names as Python imports them: {key}=[mypkg,other.module]."
            )
    return names


def foreign_targets(nodes: Mapping[str, Any]) -> list[str]:
    """Return the targets outside this project, which need a permission in a stored configuration.

    Args:
        nodes: `_target_` and keys of each object, by configuration key.
    """
    targets = [str(node.get("_target_", "")) for node in nodes.values() if isinstance(node, dict)]
    foreign = [one for one in targets if one not in TRAINERS and not is_below(one, OWN_PACKAGES)]
    nested = [str(node["_target_"]) for where, node in nodes.items() for _, node in _nested_nodes(node, where)]
    return list(dict.fromkeys(foreign + nested))


def check_targets(nodes: Mapping[str, Any], permissions: Iterable[str]) -> None:
    """Check the targets by name, without an import.

    Raises:
        InputError: a target is not permitted; the message contains the permission it needs.
    """
    for where, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise InputError(f"{shorten(where)} has no _target_ (name of a class): {shorten(str(node))}.")
        _check_name(node["_target_"], where, node["_target_"], permissions)
        for place, inner in _nested_nodes(node, where):
            target = inner["_target_"]
            if not isinstance(target, str) or not is_below(target, permissions):
                raise _without_permission(place, str(target))


def _nested_nodes(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, node) of every object inside the arguments of a node."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(value, dict) and "_target_" in value:
            yield f"{where}.{key}", value
        yield from _nested_nodes(value, f"{where}.{key}")


def instantiate(
    node: Mapping[str, Any], where: str, permissions: Iterable[str], folder: Path, more: Mapping[str, Any] | None = None
) -> Any:
    """Build the object of a node as `hydra.utils.instantiate` does, objects inside its arguments included.

    Only classes pass through Hydra, and text arguments stay literal: Hydra would resolve `${` in them.

    Args:
        where: configuration key of the node.
        permissions: the configuration's `allow_targets`.
        folder: run directory. Without a permission, no argument may name a path outside of it.
        more: further arguments.

    Raises:
        InputError: the class is not permitted or does not exist, or its arguments do not fit.
    """
    permissions = list(permissions)
    kind, target = target_class(node, where, permissions), node["_target_"]
    own = {key: value for key, value in node.items() if key != "_target_"}
    check_arguments(kind, own, where, target, permissions)
    if not is_below(target, permissions):
        _check_paths(own, where, target, folder)
    if is_below(target, LIGHTNING_PACKAGES) and "save_dir" in inspect.signature(kind).parameters:
        own = {"save_dir": str(folder), **own}  # Lightning's default is the working directory
    built = {key: _with_objects(value, f"{where}.{key}", permissions, folder) for key, value in own.items()}
    return call(kind, {**built, **(more or {})}, where, target)


def _with_objects(value: Any, where: str, permissions: list[str], folder: Path) -> Any:
    """Return an argument with every node in it replaced by its object."""
    if isinstance(value, dict) and "_target_" in value:
        return instantiate(value, where, permissions, folder)
    if isinstance(value, dict):
        return {key: _with_objects(item, f"{where}.{key}", permissions, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_objects(item, f"{where}.{number}", permissions, folder) for number, item in enumerate(value)]
    return value


def call(kind: Any, arguments: dict[str, Any], where: str, target: str) -> Any:
    """Call a class that was checked, through Hydra.

    Raises:
        InputError: arguments are missing, or a class of Lightning rejects them.
    """
    try:
        inspect.signature(kind).bind(**arguments)
        make = hydra.utils.instantiate({"_target_": target, "_partial_": True})
    except (TypeError, InstantiationException) as error:
        raise InputError(f"{where} does not fit {target}: {str(error).splitlines()[0]}.") from error
    if make.func is not kind:
        raise InputError(f"{where}._target_={target} is not the class that was checked.")
    try:
        return make(**arguments)
    except Exception as error:
        if not is_below(kind.__module__, ("lightning",)):
            raise
        raise InputError(f"{where} does not fit {target}: {str(error).splitlines()[0]}") from error


def check_arguments(kind: Any, own: Mapping[str, Any], where: str, target: str, permissions: Iterable[str]) -> None:
    """Check the names of a node's arguments.

    Raises:
        InputError: the class has no such argument, or passes it to another library without a permission.
    """
    parameters = inspect.signature(kind).parameters
    unknown = [key for key in own if key not in parameters]
    for key in unknown:
        if key in OF_HYDRA:
            raise InputError(f"{where}.{key} is not supported: arguments are given by name, as plain values.")
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise InputError(f"There is no key {shorten(f'{where}.{key}')}{nearest(key, parameters)}.")
        if not is_below(target, permissions):
            place = shorten(f"{where}.{key}")
            raise _needs_trust(f"{place} is passed to another library, which could execute any code.", target)


def _check_paths(own: Mapping[str, Any], where: str, target: str, folder: Path) -> None:
    """Reject paths outside the run directory, where an object of a downloaded run could overwrite or delete files."""
    is_ours = is_below(target, OWN_PACKAGES)
    for key, value in own.items():
        if not isinstance(value, str):
            continue
        given = f"{where}.{key}={shorten(value)}"
        if not is_ours and not _is_plain(value):
            raise _needs_trust(f"{given} contains an expression, which could lead outside the run directory.", target)
        leaves = value.startswith(("/", "~")) or ".." in Path(value).parts or "://" in value
        is_path = key in FOLDER_ARGUMENTS or (leaves and not is_ours)
        if is_path and not Path(value).expanduser().resolve().is_relative_to(folder.resolve()):
            raise _needs_trust(f"{given} is outside the run directory {folder}.", target)


def _needs_trust(reason: str, target: str) -> InputError:
    """Return the error for an argument of a class that a stored configuration may build, but not with this argument."""
    return InputError(f"{reason}\nIf you trust the run, permit it on the command line: allow_targets=[{target}]")


def _is_plain(text: str) -> bool:
    """Whether a text has no variable and only format fields like {step} and {val/loss:.2f}."""
    fields = re.findall(r"\{([^{}]*)\}?", text)
    return "$" not in text and all(re.fullmatch(r"[\w/-]+(:[\d.]*\w?)?", one) for one in fields)


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
    if is_below(kind.__module__, (*OWN_PACKAGES, "lightning")):
        _check_base(kind, where, target)
    return kind


def shorten(text: str) -> str:
    """Shorten untrusted text for a message, with control characters escaped."""
    return (text if text.isprintable() else repr(text))[:120]


def _check_name(name: str, where: str, target: str, permissions: Iterable[str]) -> None:
    """Reject a name outside the permitted packages; `name` is the target, or the qualified name of its class."""
    if is_below(name, (*OWN_PACKAGES, *LIGHTNING_PACKAGES, *permissions)) or (where == "trainer" and name in TRAINERS):
        return
    raise _without_permission(where, target, name)


def _without_permission(where: str, target: str, name: str = "") -> InputError:
    """Return the error for a target, whose class is defined as `name`."""
    package = (name or target).split(".")[0]
    package = package if package.isidentifier() else "PACKAGE"
    defined = "" if name in ("", target) else f", which is {name}"
    return InputError(
        f"{shorten(where)}._target_={shorten(target)}{defined}: a stored configuration instantiates only\n"
        "classes of this project and Lightning's callbacks and loggers, since others could execute any code.\n"
        f"If you trust this code, permit its package on the command line: allow_targets=[{package}]"
    )


def _check_base(kind: type, where: str, target: str) -> None:
    import lightning.pytorch

    base = BASES[where.partition(".")[0]]
    if not issubclass(kind, attrgetter(base)(lightning.pytorch)):
        raise InputError(f"{shorten(where)}._target_={target} is not a subclass of lightning.pytorch.{base}.")


def is_below(name: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is one of these packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)
