"""Plugins: packages of the user, imported for what they add: divergences, optimizers, schedules, metrics.

A plugin is code. A stored configuration names the plugins of its run, and only the current command line permits their
import, by `plugins=[mypkg]` or `allow_targets=[mypkg]`.
"""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from gpt2lab.errors import InputError
from launch.config.targets import is_below, shorten


def load(plugins: Iterable[str], permissions: Iterable[str]) -> None:
    """Import the plugins of a run. With a permission, packages in the working directory are importable.

    Args:
        plugins: dotted names.
        permissions: the configuration's `allow_targets`.

    Raises:
        InputError: a plugin is not permitted or does not exist.
    """
    permissions = list(permissions)
    for name in plugins:
        if not is_below(name, permissions):
            raise InputError(
                f"The run imports your package {shorten(name)} (plugins=), which could execute any code.\n"
                f"If you trust this code, permit it on the command line: allow_targets=[{shorten(name)}]"
            )
    folder = str(Path.cwd())
    if permissions and folder not in sys.path:
        sys.path.append(folder)  # last, so that no file there replaces a module of this project
    for name in plugins:
        _import(name)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not is_below(name, [error.name]):
            raise  # of a module that the plugin imports
        raise InputError(
            f"plugins=[{name}]: there is no package {error.name}.\n"
            f"Put it into the working directory {Path.cwd()}, or its parent folder on PYTHONPATH."
        ) from error
