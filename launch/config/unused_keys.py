"""Unused keys: refuses a key that was given although nothing in the run reads it; and the keys of overrides."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, is_dataclass

from gpt2lab.errors import InputError
from gpt2lab.keys import Key, format_readers
from gpt2lab.metric_names import VAL_LOSS
from gpt2lab.settings import OPTIMIZERS, SCHEDULES
from launch.config.known_keys import known_keys
from launch.config.schema import RunConfig


@dataclass(frozen=True)
class Condition:
    """A condition under which a key is read, for those that no group value states (`Key.read_by`)."""

    group: str  # whose value decides
    holds: Callable[[RunConfig], bool]
    text: str


def _source(config: RunConfig) -> str:
    """Source of running text: stdlib, packages, text, hub, bin; nothing for pairs."""
    return "" if config.takes_pairs else str(config.data.get("source"))


def _reads_files(config: RunConfig) -> bool:
    given = bool(config.path) or bool(config.data.get("dataset"))
    tables = config.takes_pairs and (config.data.get("reader", "tables") == "tables" or given)
    return _source(config) in ("text", "hub") or tables or bool(config.val_path)


def _splits_by_hash(config: RunConfig) -> bool:
    own_validation = bool(config.val_path) or bool(config.data.get("val_split"))
    return _source(config) != "bin" and (not own_validation or (config.takes_pairs and bool(config.path)))


def _trains_bpe(config: RunConfig) -> bool:
    if config.tokenizer.kind != "auto":
        return config.tokenizer.kind == "bpe"
    return config.data_tokenizer == "bpe"


def _adapts(config: RunConfig) -> bool:
    return not isinstance(config.task.get("lora"), dict) or config.lora_rank > 0


def _generates_text(config: RunConfig) -> bool:
    return config.callbacks.get("samples") is not None or config.watched_metric != VAL_LOSS


CONDITIONS = {
    "generated text": Condition(
        "callbacks", _generates_text, "the callback samples and the scores of task=finetune read it"
    ),
    "pairs": Condition("data", lambda c: c.takes_pairs, "pairs of texts read it"),
    "running text": Condition("data", lambda c: not c.takes_pairs, "running text reads it, pairs read batch_sequences"),
    "data with path": Condition(
        "data", lambda c: c.takes_pairs or _source(c) in ("text", "bin"), "data=text, bin and pairs read it"
    ),
    "data with val_path": Condition(
        "data", lambda c: c.takes_pairs or _source(c) == "text", "data=text and pairs read it"
    ),
    "data split by hash": Condition("data", _splits_by_hash, "data without their own validation part read it"),
    "data from files": Condition("data", _reads_files, "files and data sets read it"),
    "trained tokenizer": Condition("tokenizer", _trains_bpe, "only a tokenizer trained here reads it (tokenizer=bpe)"),
    "tokenizer=hub": Condition("tokenizer", lambda c: c.tokenizer.kind == "pretrained", "tokenizer=hub reads it"),
    "upload": Condition("hub", lambda c: c.hub.push is not None, "an upload reads it (hub.push=USER/NAME)"),
    "lora": Condition("task", _adapts, "LoRA reads it (task.lora.rank=8)"),
    "no lora": Condition("task", lambda c: not c.lora_rank, "training without LoRA reads it (task.lora.rank=0)"),
}


def check_unused_keys(config: RunConfig) -> None:
    """Compare the keys given on the command line with those that the task, the data and the other groups read.

    Raises:
        InputError: names the first unread key and what reads it.
    """
    for message in unread_keys(config).values():
        raise InputError(f"{message}.\nLeave it out.")


def unread_keys(config: RunConfig) -> dict[str, str]:
    """Return the given keys that nothing in the run reads, each with what would read it."""
    unread = {}
    for name in given_keys(config.invocation.overrides):
        for declared in (name.split(".")[0], name):  # a group is read or not as a whole, then its keys
            reader = known_keys().get(declared, Key("")).read_by
            group, is_read, text = _reading(reader, config)
            if is_read:
                continue
            decides = f"{group}={config.groups[group]}"
            if decides == "callbacks=default" and reader not in CONDITIONS:  # which has it, unless it was removed
                decides, text = "this run", f"it has no callback {reader.partition('=')[2]}"
            unread[name] = f"{decides} does not read {name}: {text}"
            break
    return unread


def _reading(read_by: str, config: RunConfig) -> tuple[str, bool, str]:
    """Return (group that decides, whether this run reads the key, what reads it) of `Key.read_by`."""
    if not read_by:
        return "", True, ""
    group, values = _group_of(read_by), read_by.partition("=")[2].split(",")
    if read_by in CONDITIONS:
        is_read = CONDITIONS[read_by].holds(config)
    elif group == "callbacks":
        is_read = config.callbacks.get(values[0]) is not None
    else:
        settings = vars(config).get(group)
        chosen = vars(settings)["name"] if is_dataclass(settings) else config.groups[group]
        is_added = any(chosen in registry.added for registry in (OPTIMIZERS, SCHEDULES))  # which get all settings
        is_read = chosen in values or is_added
    return group, is_read, format_reader(read_by)


def format_reader(read_by: str) -> str:
    """Return in words what reads a key, from its `Key.read_by`."""
    if read_by in CONDITIONS:
        return CONDITIONS[read_by].text
    group, _, name = read_by.partition("=")
    if group == "callbacks":
        return f"the callback {name} reads it (callbacks=default)"
    return format_readers(read_by)


def _group_of(read_by: str) -> str:
    """The group whose value decides whether a key is read."""
    return CONDITIONS[read_by].group if read_by in CONDITIONS else read_by.partition("=")[0]


def deciding_groups(name: str) -> set[str]:
    """Return the groups whose values decide whether a run reads a key; none where every run does."""
    readers = [known_keys().get(declared, Key("")).read_by for declared in (name.split(".")[0], name)]
    return {_group_of(reader) for reader in readers if reader}


def given_keys(overrides: Iterable[str]) -> list[str]:
    """Return the keys of Hydra overrides: `+a.b=1` → `a.b`."""
    return [override.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".") for override in overrides]


def without(overrides: Iterable[str], keys: Collection[str]) -> list[str]:
    """Return the overrides of all other keys."""
    return [override for override in overrides if given_keys([override])[0] not in keys]
