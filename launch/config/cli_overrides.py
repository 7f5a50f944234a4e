"""Arguments: makes what people type readable by Hydra's grammar.

Paths, names and ids are free text to a user (`path=notes, old/*.md`, `name=1e3`), yet Hydra parses every value. Values
of such keys that its grammar would refuse or read as something else are quoted here.
"""

import shlex
import sys
from itertools import pairwise
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from gpt2lab.errors import InputError
from gpt2lab.keys import keys_of
from gpt2lab.storage.utf8 import check_process
from launch.config import literal_text, run_dir
from launch.config.did_you_mean import nearest
from launch.config.groups import groups, values
from launch.config.schema import RunConfig
from launch.config.targets import parse_permissions

FREE_TEXT = tuple(name for name, meaning in keys_of(RunConfig) if meaning.free_text)
FREE_TEXT_SUFFIXES = (".path", ".source", ".name", ".dataset", ".template")
FLAGS_WITH_VALUE: tuple[str, ...] = ("--cfg", "-c", "--config-path", "-cp", "--config-name", "-cn", "--config-dir")
FLAGS_WITH_VALUE += ("-cd", "--package", "-p")
INFO = ("--info", "-i")  # whose value may be left out
FLAGS: tuple[str, ...] = (*FLAGS_WITH_VALUE, *INFO, "--help", "-h", "--hydra-help", "--version", "--resolve")
FLAGS += ("--multirun", "-m", "--shell-completion", "-sc")
SHOWN = ("job", "hydra", "all")  # values of --cfg
SHOWN_OF_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def command() -> str:
    """The command line as it could be typed again."""
    return shlex.join(["python", *sys.argv])


def readable_by_hydra(arguments: list[str]) -> list[str]:
    """The same arguments with free text quoted where Hydra would stumble over it or misread it.

    Raises:
        InputError: an unknown flag, or an argument that is not valid UTF-8.
    """
    check_process(arguments)
    _check_flags(arguments)
    for argument in arguments:
        _check_override(argument)
    sweeping = is_multirun(arguments)
    flags, overrides = _flags_apart(arguments)
    if sweeping and not {"-m", "--multirun", "--cfg", "-c"} & set(flags):
        flags.append("-m")  # a search is a multirun by itself
    return [*flags, *(_readable(override, sweeping) for override in overrides)]


def is_multirun(arguments: list[str]) -> bool:
    """Whether commas separate the values of a sweep."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN", "hparams_search=optuna"} & set(arguments))


def _check_override(argument: str) -> None:
    """Refuse what Hydra would answer with a traceback or in words of its own."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if equals and not name:
        raise InputError(f"{argument} names no key. Keys are given as key=value.")
    if key.startswith("~") and not name.startswith("callbacks."):
        raise InputError(f"{argument}: a key cannot be taken away, only given another value: {name}=VALUE.")
    if name.startswith("hydra/"):
        raise InputError(f"{argument}: Hydra's own plugins are chosen by launcher=processes.\nLeave it out.")
    if name == "hydra.run.dir":
        raise InputError(f"{argument}: a run's folder is set by run_dir=FOLDER or name=NAME.")
    if name == "hydra.sweep.dir":
        run_dir.check_can_be_made(Path(value).expanduser(), "hydra.sweep.dir")
    if not equals or name not in groups():
        return
    if value in ("", "null", "~") or value.startswith("["):
        raise InputError(f"{argument}: a group has one value.\nAllowed: {', '.join(values(name))}.")
    if key.startswith("+"):
        raise InputError(f"{name} is a group already; leave out the +: {name}={value}.")


def _flags_apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and the overrides: argparse does not understand `a=1 -m b=2,3`."""
    flags, overrides, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if left and (argument in FLAGS_WITH_VALUE or (argument in INFO and left[0] in SHOWN_OF_INFO)):
            flags.append(left.pop(0))
    return flags, overrides


def _check_flags(arguments: list[str]) -> None:
    """Refuse an unknown flag, which Hydra would answer with its whole usage."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if argument.startswith("-") and flag not in FLAGS:
            raise InputError(
                f"There is no flag {flag}{nearest(flag, FLAGS)}. Keys are given as key=value, without dashes."
            )
    for flag, value in pairwise([*arguments, ""]):
        if flag in FLAGS_WITH_VALUE and (not value or value.startswith("-")):
            raise InputError(f"{flag} needs a value, for example --cfg {SHOWN[0]}.")
        if flag in ("--cfg", "-c") and value not in SHOWN:
            raise InputError(f"{flag} {value}: give one of {', '.join(SHOWN)}.")
        is_value = value and not value.startswith("-") and "=" not in value
        if flag in INFO and is_value and value not in SHOWN_OF_INFO:
            raise InputError(f"{flag} {value}: give one of {', '.join(SHOWN_OF_INFO)}.")
    if "--resolve" in arguments and not {"--cfg", "-c"} & set(arguments):
        raise InputError("--resolve belongs to --cfg: python train.py --cfg job --resolve")


def _readable(argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    if key == "allow_targets":
        return f"{key}=[{','.join(parse_permissions(value))}]"
    if not equals or not (key in FREE_TEXT or key.endswith(FREE_TEXT_SUFFIXES)):
        return argument
    if literal_text.is_read_as_typed(argument):
        return argument
    try:
        is_sweep = sweeping and OverridesParser.create().parse_overrides([argument])[0].is_sweep_override()
    except OverrideParseException:
        is_sweep = False
    return argument if is_sweep else f"{key}={literal_text.quoted(value)}"
