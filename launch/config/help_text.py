"""Help text of train.py: --help lists groups and plain keys, --help NAME describes a group or a key.

Meanings are those of the dataclass fields, defaults those of conf/.
"""

from collections.abc import Sequence
from dataclasses import replace

from gpt2lab.errors import InputError
from gpt2lab.keys import Key
from launch.config.allowed_values import format_allowed
from launch.config.did_you_mean import nearest
from launch.config.groups import default_of, default_values, description, group_of, groups, keys_set_by, values
from launch.config.help_lines import format_keys, format_rows, format_text, format_value
from launch.config.known_keys import known_keys
from launch.config.plain_keys import SECTIONS
from launch.config.unused_keys import format_reader

EMPTY = '""'  # a default that is the empty text
HEAD = "train.py: pretrain, distill or fine-tune a GPT-2."
COMMANDS = (
    ("python train.py", "pretrain nano on the standard library's source"),
    ("python train.py task=distill model=nano teacher=RUN_DIR", "distill a trained run into a small model"),
    ("python train.py task=finetune init=RUN_DIR data=summarize", "fine-tune on pairs"),
    ("python train.py -m model=nano,micro optimizer.lr=3e-3,1e-2", "a sweep: every combination"),
    ("python train.py --help optimizer", "the values and keys of a group; also --help KEY"),
    ("python train.py --cfg job", "the whole configuration, keys of groups included"),
)


def help_text(arguments: Sequence[str]) -> str:
    """Return the help for a command line: of everything, or of the group or key that follows --help.

    Raises:
        InputError: there is no such group or key.
    """
    flag = next(number for number, word in enumerate(arguments) if word in ("--help", "-h"))
    given = {name: value for name, equals, value in (word.partition("=") for word in arguments) if equals}
    chosen = default_values() | {name: value for name, value in given.items() if name in groups()}
    for group, value in chosen.items():
        if value not in values(group):
            near = nearest(value, values(group))
            raise InputError(f"{group}={value}: no such value{near}.\nAllowed: {', '.join(values(group))}.")
    name = arguments[flag + 1].partition("=")[0] if flag + 1 < len(arguments) else ""
    if not name or name.startswith("-"):
        return _overview(chosen)
    if name in groups():
        return _of_group(name, chosen)
    if name not in known_keys():
        raise InputError(
            f"--help {name}: there is no such group or key{nearest(name, known_keys())}.\n"
            "All groups and plain keys: python train.py --help."
        )
    return _of_key(name, chosen)


def _overview(chosen: dict[str, str]) -> str:
    rows = [(f"{group}={chosen[group]}", " ".join(values(group))) for group in groups()]
    parts = [HEAD, format_rows(COMMANDS, left=62), "Groups: group=default, then all values", format_rows(rows)]
    parts.append("Keys: key=default, then the meaning, by section")
    for section in SECTIONS:
        names = section.__annotations__
        defaults = {name: default_of(name, chosen) for name in names}
        meanings = {name: known_keys()[name] for name in names}
        parts.append(f"{heading(section)}\n{format_keys(meanings, defaults)}")
    return "\n\n".join(parts)


def _of_group(group: str, chosen: dict[str, str]) -> str:
    """Return a group's values with their descriptions and its keys with the defaults of the chosen value."""
    rows = [(f"{group}={value}", description(group, value)) for value in values(group)]
    parts = [format_text(f"{group}: {full_text(known_keys()[group])}"), f"Values\n\n{format_rows(rows)}"]
    if keys := keys_of_group(group):
        differing = {name: text for name in keys if (text := _differing_defaults(name, chosen))}
        defaults = {name: default_of(name, chosen) for name in keys.keys() - differing.keys()}
        keys |= {
            name: replace(keys[name], text=f"{keys[name].text}; default {text}") for name, text in differing.items()
        }
        parts.append(f"Keys (defaults of {group}={chosen[group]})\n\n{format_keys(keys, defaults)}")
    return "\n\n".join(parts)


def _of_key(name: str, chosen: dict[str, str]) -> str:
    """Return the meaning of one key, its default and what is allowed."""
    meaning = known_keys()[name]
    default = _differing_defaults(name, chosen) or f"{name}={format_value(default_of(name, chosen))}"
    facts = [f"{name}: {full_text(meaning)}", f"Default: {default}"]
    facts += [f"Allowed: {allowed}"] if (allowed := format_allowed(meaning)) else []
    facts += ["A resumed run may have another value."] if meaning.on_resume else []
    return "\n".join(format_text(fact) for fact in facts)


def defaults_by_value(name: str) -> dict[str, list[str]]:
    """Return {default as it is typed: values of the group that have it} of a group's key."""
    group, found = group_of(name), dict[str, list[str]]()
    for value in values(group):
        if name in keys_set_by(group, value):
            found.setdefault(format_value(keys_set_by(group, value)[name]), []).append(value)
    return found


def _differing_defaults(name: str, chosen: dict[str, str]) -> str:
    """Return the defaults of a key that the chosen value of its group lacks, if the other values differ in it."""
    group = group_of(name)
    if "." not in name or name in keys_set_by(group, chosen[group]):
        return ""
    found = defaults_by_value(name)
    listed = [f"{default or EMPTY} ({', '.join(named)})" for default, named in found.items()]
    return ", ".join(listed) if len(listed) > 1 else ""


def full_text(meaning: Key) -> str:
    """Return the meaning of a key and what reads it, where not every run does."""
    return f"{meaning.text}; {format_reader(meaning.read_by)}" if meaning.read_by else meaning.text


def keys_of_group(group: str) -> dict[str, Key]:
    """Return the keys of a group by dotted name; of nested keys the innermost."""
    keys = {name: meaning for name, meaning in known_keys().items() if "." in name and group_of(name) == group}
    return {name: one for name, one in keys.items() if not any(other.startswith(f"{name}.") for other in keys)}


def heading(section: type) -> str:
    """Return the heading of a section of plain keys."""
    return (section.__doc__ or "").strip().removesuffix(".")
