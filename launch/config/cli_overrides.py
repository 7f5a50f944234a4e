"""Command-line overrides: checks flags and overrides before Hydra parses them, and quotes free text for its grammar.

Paths, names and ids are free text (`path=notes, old/*.md`, `name=1e3`), but Hydra parses every value. Values of such
keys are quoted if its grammar rejects them or reads them as another type.
"""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_process
from launch.config import literal_text, run_dir
from launch.config.did_you_mean import elsewhere, nearest
from launch.config.groups import groups, values
from launch.config.known_keys import known_keys
from launch.config.targets import parse_permissions

FREE_TEXT = tuple(name for name, meaning in known_keys().items() if meaning.free_text)
# Of any class, also of the user's own
FREE_TEXT_SUFFIXES = (".path", ".source", ".name", ".dataset", ".template", ".dirpath", ".filename", ".save_dir")
ADDED_NODE = re.compile(r"\+*((?:callbacks|logger)\.\w+)\._target_")
FLAGS_WITH_VALUE: tuple[str, ...] = ("--cfg", "-c", "--config-path", "-cp", "--config-name", "-cn", "--config-dir")
FLAGS_WITH_VALUE += ("-cd", "--package", "-p")
INFO = ("--info", "-i")  # whose value may be left out
FLAGS: tuple[str, ...] = (*FLAGS_WITH_VALUE, *INFO, "--help", "-h", "--hydra-help", "--version", "--resolve")
FLAGS += ("--multirun", "-m", "--shell-completion", "-sc")
SWEEPS = "sweeps"  # parent of the default hydra.sweep.dir, conf/train.yaml
CFG_VALUES = ("job", "hydra", "all")  # values of --cfg
INFO_VALUES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def shell_command() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def quote_free_text(arguments: list[str]) -> list[str]:
    """Return the arguments, flags first, with free text quoted where Hydra would reject or misread it.

    Raises:
        InputError: an unknown flag, an override that is not supported, or an argument that is not valid UTF-8.
    """
    check_process(arguments)
    _check_flags(arguments)
    for argument in arguments:
        _check_override(argument)
    sweeping = is_multirun(arguments)
    if sweeping and not {"--cfg", "-c", *INFO} & set(arguments):
        given = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
        run_dir.check_creatable(Path([SWEEPS, *given][-1]).expanduser(), "hydra.sweep.dir")
    flags, overrides = _split_flags(arguments)
    overrides = _without_plus(overrides)
    if sweeping and not {"-m", "--multirun", "--cfg", "-c"} & set(flags):
        flags.append("-m")  # hparams_search=optuna implies a multirun
    return [*flags, *(_quote(override, sweeping) for override in overrides)]


def _without_plus(overrides: list[str]) -> list[str]:
    """Return the overrides with Hydra's `++` for callbacks and loggers whose class is given: they may be new keys."""
    added = {match[1] for override in overrides if (match := ADDED_NODE.match(override))}
    return [f"++{one}" if ".".join(one.partition("=")[0].split(".")[:2]) in added else one for one in overrides]


def is_multirun(arguments: list[str]) -> bool:
    """Whether commas separate the values of a sweep."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN", "hparams_search=optuna"} & set(arguments))


def _check_override(argument: str) -> None:
    """Reject overrides for which Hydra raises an unclear error."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if equals and not name:
        raise InputError(f"{argument} has no key. Keys are given as key=value.")
    if key.startswith("~") and not name.startswith("callbacks."):
        raise InputError(f"{argument}: a key cannot be removed, only set to another value: {name}=VALUE.")
    if name.startswith("hydra/"):
        raise InputError(f"{argument}: Hydra's plugins are selected by launcher=processes.\nLeave it out.")
    if name == "hydra.run.dir":
        raise InputError(f"{argument}: a run's folder is set by run_dir=FOLDER or name=NAME.")
    if not equals or name not in groups():
        return
    if "/" in value:
        raise InputError(f"{argument}: no such value.\nAllowed: {', '.join(values(name))}.")
    if value in ("", "null", "~") or value.startswith("["):
        raise InputError(f"{argument}: a group has one value.\nAllowed: {', '.join(values(name))}.")
    if key.startswith("+"):
        raise InputError(f"{name} is a group already; leave out the +: {name}={value}.")


def _split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into (flags with their values, overrides), because argparse does not support `a=1 -m b=2,3`."""
    flags, overrides, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if left and (argument in FLAGS_WITH_VALUE or (argument in INFO and left[0] in INFO_VALUES)):
            flags.append(left.pop(0))
    return flags, overrides


def _near_flag(flag: str) -> str:
    """Suggestion with the most similar flag, or the key that the flag would be."""
    key = flag.lstrip("-").replace("-", "_")
    if key in known_keys() or key in groups():
        return f" (did you mean {key}=…?)"
    return nearest(key, known_keys()) if elsewhere(key) else nearest(flag, FLAGS)


def _check_flags(arguments: list[str]) -> None:
    """Reject unknown flags, for which Hydra prints its whole usage."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if argument.startswith("-") and flag not in FLAGS:
            raise InputError(f"There is no flag {flag}{_near_flag(flag)}. Keys are given as key=value, without dashes.")
    for flag, value in pairwise([*arguments, ""]):
        if flag in FLAGS_WITH_VALUE and (not value or value.startswith("-")):
            raise InputError(f"{flag} needs a value, for example --cfg {CFG_VALUES[0]}.")
        if flag in ("--cfg", "-c") and value not in CFG_VALUES:
            raise InputError(f"{flag} {value}: give one of {', '.join(CFG_VALUES)}.")
        is_value = value and not value.startswith("-") and "=" not in value
        if flag in INFO and is_value and value not in INFO_VALUES:
            raise InputError(f"{flag} {value}: give one of {', '.join(INFO_VALUES)}.")
    if "--resolve" in arguments and not {"--cfg", "-c"} & set(arguments):
        raise InputError("--resolve needs --cfg: python train.py --cfg job --resolve")


def _quote(argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    if key in ("allow_targets", "plugins"):
        return f"{key}=[{','.join(parse_permissions(value, key))}]"
    if not equals or not (key in FREE_TEXT or key.endswith(FREE_TEXT_SUFFIXES)):
        return argument
    if literal_text.is_read_verbatim(argument):
        return argument
    try:
        is_sweep = sweeping and OverridesParser.create().parse_overrides([argument])[0].is_sweep_override()
    except OverrideParseException:
        is_sweep = False
    return argument if is_sweep else f"{key}={literal_text.quote(value)}"
