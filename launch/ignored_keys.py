"""Ignored keys: refuses a key that was given although nothing in the run would read it."""

import shlex
from collections.abc import Iterable

from gpt2lab.errors import InputError
from launch.config import Config

DISTILL_ONLY = ("loss", "teacher", "preflight")
PAIRS_ONLY = ("batch_sequences", "source", "target")
TEXT_ONLY = ("batch_tokens",)


def check_ignored_keys(config: Config) -> None:
    """Compare what was given on the command line with what the task, the data and the tokenizer read.

    Raises:
        InputError: names the key and who reads it.
    """
    data = config.record.groups["data"]
    for key in given_keys(config.record.overrides):
        group = key.split(".")[0]
        reader = ""
        if not task_reads(config.task_name, key):
            raise InputError(
                f"task={config.task_name} does not read {key}; only task=distill does.\n"
                "Leave it out, or set task=distill."
            )
        if group in PAIRS_ONLY and not config.takes_pairs:
            reader = "pairs of texts" + (", running text reads batch_tokens" if group == "batch_sequences" else "")
        elif group in TEXT_ONLY and config.takes_pairs:
            reader = "running text; pairs read batch_sequences"
        if reader:
            raise InputError(f"data={data} does not read {key}: it belongs to {reader}.\nLeave it out.")
        if group == "path" and not _takes_path(config):
            raise InputError(f"data={data} does not read path: it brings its own text.\nUse data=text or data=pairs.")
        if key == "vocab_size" and config.tokenizer.kind == "pretrained":
            raise InputError(
                "A pretrained tokenizer brings its own vocabulary; leave out vocab_size or set tokenizer=bpe."
            )


def _takes_path(config: Config) -> bool:
    source = config.data.get("source")
    return bool(config.data.get("takes_path", config.takes_pairs or source in ("text", "bin")))


def task_reads(task: str, key: str) -> bool:
    """Whether a task reads a plain key, a group or a key of a group."""
    return task == "distill" or key.split(".")[0] not in DISTILL_ONLY


def given_keys(overrides: Iterable[str]) -> list[str]:
    """The keys of Hydra overrides: `+a.b=1` → `a.b`."""
    return [override.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".") for override in overrides]


def without_ignored(overrides: Iterable[str], task: str) -> list[str]:
    """The overrides that a task reads; for the jobs of a sweep over tasks."""
    return [override for override in overrides if task_reads(task, given_keys([override])[0])]


def in_words(overrides: Iterable[str]) -> str:
    """Overrides as they would be typed."""
    return shlex.join(overrides)
