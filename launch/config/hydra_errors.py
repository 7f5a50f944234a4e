"""Hydra errors: converts errors of Hydra and OmegaConf into a short InputError with a spelling suggestion."""

import re

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)

from gpt2lab.errors import InputError
from launch.config.allowed_values import check_value
from launch.config.did_you_mean import nearest
from launch.config.groups import groups, values
from launch.config.known_keys import known_keys, owned_trainer_argument, unknown_key
from launch.config.literal_text import unresolved_error

UNRESOLVED = (InterpolationResolutionError, UnsupportedInterpolationType, GrammarParseError)


def to_input_error(error: HydraException | OmegaConfBaseException) -> InputError:
    """Convert the error into an InputError: the value given, what is allowed, what to do."""
    cause = error.__cause__
    for one in (cause, error):
        if isinstance(one, UNRESOLVED):
            return unresolved_error(one)
    if isinstance(error, MissingConfigException):
        return _missing_value(error)
    if isinstance(error, OverrideParseException):
        return _syntax_error(error)
    if isinstance(cause, ValidationError):
        return _wrong_type(error, cause)
    if isinstance(cause, OmegaConfBaseException):
        return _unknown_key(cause)
    message = str(error)
    if message.startswith("Ambiguous value"):
        argument = message.split("'")[1]
        return InputError(
            f"{argument} has several values, which needs a sweep.\n"
            "Add -m to run one job for each, or quote a value that contains a comma: \"key='a,b'\"."
        )
    if message.startswith("Sweep parameters"):
        argument = message.split("'")[1]
        fix = "Add hparams_search=optuna to search it" if "interval(" in argument else "Add -m to run one job for each"
        return InputError(f"{argument} has several values, which needs a sweep.\n{fix}, or give one value.")
    if message.startswith("Could not append"):
        return InputError(f"{message.splitlines()[1].split(': ')[-1]} exists already; leave out the +.")
    if "override" in message.lower() and isinstance(error, ConfigCompositionException):
        return _unknown_group(message)
    return InputError("\n".join(line for line in message.splitlines() if line.strip())[:600])


def _missing_value(error: MissingConfigException) -> InputError:
    group, _, value = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(option for option in error.options or [] if option)
    if not group or not options:
        head, *rest = (error.missing_cfg_file or "").split("/")
        return InputError(f"{head} has no value {'/'.join(rest)}.") if rest else InputError(str(error).splitlines()[0])
    if group not in groups() and "/" in group:
        head = group.split("/")[0]
        options, value, group = values(head), str(error.missing_cfg_file), head
    return InputError(f"{group}={value}: no such value{nearest(value, options)}.\nAllowed: {', '.join(options)}.")


def _syntax_error(error: OverrideParseException) -> InputError:
    if "=" not in error.override:
        known = [*groups(), *known_keys()]
        return InputError(f"{error.override} is not key=value{nearest(error.override, known)}.")
    key = error.override.split("=")[0]
    reason = str(error.message).splitlines()[0]
    quoted = f"\"{key}=['…','…']\"" if error.override.startswith(f"{key}=[") else f"\"{key}='…'\""
    return InputError(
        f"Cannot read {error.override}: {reason}\n"
        f"Quote a value with special characters both for the shell and for Hydra: {quoted}."
    )


def _wrong_type(error: BaseException, cause: ValidationError) -> InputError:
    message = str(cause).splitlines()[0]
    key = cause.full_key or str(error).rpartition(" ")[2]
    value = re.search(r"Value '(.*?)'", message)
    if value and "Union" in message:
        try:
            check_value(key, known_keys()[key], value[1])
        except InputError as refusal:
            return refusal
    allowed = {"Integer": "a whole number", "Float": "a number", "Bool": "true or false", "String": "text"}
    kind = next((words for name, words in allowed.items() if name.lower() in message.lower()), "")
    if value and kind:
        return InputError(f"{key}={value[1]} is not {kind}.")
    if "not Optional" in message or "None" in message:
        return InputError(f"{key} cannot be null.")
    return InputError(f"{key}: {message}")


def _unknown_key(cause: OmegaConfBaseException) -> InputError:
    """Error for an unknown key, with the most similar of its siblings, the groups and all other keys."""
    given = str(cause.full_key or cause.key)
    parent = cause.parent_node
    siblings = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    prefix = given.rpartition(".")[0]
    known = [f"{prefix}.{key}" if prefix else key for key in siblings]
    known = [key for key in known if key not in ("hydra", "invocation")]
    if not prefix:
        known += groups()
    if refusal := owned_trainer_argument(given):
        return InputError(refusal)
    return unknown_key(given, known)


def _unknown_group(message: str) -> InputError:
    quoted = re.findall(r"'([^']+)'", message)
    given = quoted[-1] if quoted else message
    name = re.split(r"[@/=]", given)[0]
    return InputError(f"There is no group or key {given}{nearest(name, [*groups(), *known_keys()])}.")
