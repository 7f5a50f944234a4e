"""Signature: reads what a class takes from its source, without importing it, so that a misspelt key answers at once."""

import ast
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from gpt2lab import settings
from gpt2lab.errors import InputError
from launch.config import literal_text
from launch.config.did_you_mean import nearest
from launch.config.targets import OWN_PACKAGES

SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list[str]": (list,),
    "list[int]": (list,),
}


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor."""

    name: str
    annotation: str
    required: bool


def check_target(node: dict[str, Any], where: str, supplied: set[str], not_arguments: Collection[str] = ()) -> None:
    """Check the keys and simple types of a node with `_target_` against that class's constructor.

    Args:
        node: `_target_` and its keys as composed.
        where: its place in the configuration, for the message.
        supplied: arguments that the launcher adds when the class takes them.
        not_arguments: keys of the node that the launcher itself reads.

    Raises:
        InputError: no such class, an unknown or missing key, or a value of another type.
    """
    target = str(node.get("_target_", ""))
    if target.split(".")[0] not in OWN_PACKAGES:
        return  # importing it would be the heavy part; the constructor itself will tell
    parameters = {parameter.name: parameter for parameter in _parameters(target, where)}
    given = {key: value for key, value in node.items() if key != "_target_" and key not in not_arguments}
    places = [f"{where}.{name}" for name in parameters]
    for key, value in given.items():
        if key not in parameters:
            raise InputError(
                f"There is no key {where}.{key}{nearest(f'{where}.{key}', places)}.\n"
                f"{target} takes {', '.join(sorted(set(parameters) - supplied)) or 'no keys'}."
            )
        annotation = parameters[key].annotation
        if annotation in vars(settings):
            typed_settings(vars(settings)[annotation], value, f"{where}.{key}")
        elif not _fits(value, annotation):
            raise InputError(f"{where}.{key}={value} is not of type {annotation}.")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.required and name not in given | dict.fromkeys(supplied)
    ]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}, which {target} needs.")


def _fits(value: Any, annotation: str) -> bool:
    kinds = SIMPLE_TYPES.get(annotation)
    if kinds is None:
        return True
    if annotation == "list[str]" and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return False
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def typed_settings(kind: type, values: Any, where: str) -> Any:
    """A settings dataclass from a dictionary of the configuration.

    Raises:
        InputError: no dictionary, an unknown or missing key, or a value of the wrong type.
    """
    names = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if not isinstance(values, dict):
        raise InputError(f"{where}={values}: give its keys, {', '.join(f'{where}.{name}' for name in names)}.")
    for key in values:
        if key not in names:
            raise InputError(f"There is no key {where}.{key}{nearest(key, names)}.\nAllowed: {', '.join(names)}.")
    try:
        return literal_text.typed_values(kind, values)
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        given = values.get(str(error.full_key), values)
        raise InputError(f"{key}={given}: {str(error).splitlines()[0]}") from error


def _parameters(target: str, where: str) -> list[Parameter]:
    module, _, name = target.rpartition(".")
    parameters = constructor(module, name)
    if parameters is None:
        raise InputError(f"{where}._target_={target}: there is no such class.")
    return parameters


@cache
def constructor(module: str, name: str) -> list[Parameter] | None:
    """Arguments of the class `module.name`, its base's where it has no constructor of its own; None: no such class."""
    tree = _source(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _arguments(item.args)
            return next((found for base in node.bases if (found := _of_base(base, module, tree))), [])
    return None


def _of_base(base: ast.expr, module: str, tree: ast.Module) -> list[Parameter] | None:
    if not isinstance(base, ast.Name):
        return None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and base.id in {alias.name for alias in node.names}:
            return constructor(node.module, base.id) if node.module.split(".")[0] in OWN_PACKAGES else None
    return constructor(module, base.id)


def _arguments(arguments: ast.arguments) -> list[Parameter]:
    positional = arguments.posonlyargs + arguments.args
    first_default = len(positional) - len(arguments.defaults)
    found = [(item, index < first_default) for index, item in enumerate(positional)]
    found += [
        (item, default is None) for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [
        Parameter(item.arg, ast.unparse(item.annotation) if item.annotation else "", required)
        for item, required in found
        if item.arg != "self"
    ]


@cache
def _source(module: str) -> ast.Module | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
