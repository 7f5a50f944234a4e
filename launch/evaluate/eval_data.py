"""Scored data: which texts evaluate.py reads, and how each checkpoint's tokenizer and objective cut them."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.model_folder import read_objective
from launch.config.did_you_mean import nearest
from launch.config.groups import CONF, values

if TYPE_CHECKING:
    from gpt2lab.data.pair_file import PairFile
    from launch.config.schema import Config

GIVEN = ("path", "val_path", "source", "target", "cache_dir")


@dataclass(frozen=True)
class LeftOut:
    """Pairs that are scored for no checkpoint, for they do not fit in the context of every one.

    Attributes:
        pairs: of the split, these among them.
        left_out: how many these are.
        too_long: how many of these do not fit, for each checkpoint.
    """

    pairs: int
    left_out: int
    too_long: list[int]

    def in_words(self, names: list[str], context: int) -> str:
        """One line; the names are the checkpoints'."""
        each = ", ".join(f"{count:,} for {name}" for name, count in zip(names, self.too_long, strict=True) if count)
        return (
            f"Scored are {self.pairs - self.left_out:,} of {self.pairs:,} pairs, those that fit in context={context} "
            f"for every checkpoint. Too long: {each}."
        )


def data_settings(data: str, given: dict[str, str], folder: Path, context: int, permissions: list[str]) -> "Config":
    """The configuration that says which data to score: a run's own or conf/'s defaults, with what was given on top.

    Args:
        data: a value of conf/data; empty: the run's own, else stdlib.
        given: values of `GIVEN`.
        folder: the Hugging Face folder of the checkpoint whose run counts.
        context: tokens of a window; 0: the run's own, else 0 remains.
        permissions: what a run's own configuration may build besides this project's classes.

    Raises:
        InputError: an unknown value of data, a file that is not there, a key that the data do not read, or a class that
            is not permitted.
    """
    from launch.checks import checks
    from launch.config.targets import check_targets
    from launch.config.unused_keys import unread_keys

    own = _run_config(folder)
    settings = own if own is not None and not data else _composed(data or "stdlib")
    if settings is own:
        settings.allow_targets = permissions
        check_targets({"data": settings.data}, permissions)
    for key, value in given.items():
        if value:
            setattr(settings, key, value)
            settings.record.overrides.append(f"{key}={value}")  # goes before what a preset names itself
    settings.context = context or (own.context if own is not None else 0)
    settings.record.accumulate = 1
    for key, message in unread_keys(settings).items():
        if given.get(key):
            raise InputError(f"{message}.\nLeave it out.")
    checks.check_files(settings)
    return settings


def in_words(settings: "Config") -> str:
    """Which data these are and how long their windows, as key=value."""
    path = f" path={settings.path}" if settings.path else ""
    return f"data={settings.record.groups['data']}{path} context={settings.context}"


def as_read_by(settings: "Config", folder: Path, tokenizer: str) -> "Config":
    """The settings with the tokenizer, the objective and the packing of the checkpoint in `folder`.

    Args:
        tokenizer: another than its own; empty: its own.
    """
    from launch.checks import objective

    own, settings = _run_config(folder), deepcopy(settings)
    settings.tokenizer = TokenizerChoice("pretrained", source=tokenizer or str(folder))
    settings.objective = own.objective if own is not None else ObjectiveSettings(read_objective(folder))
    settings.packing = own is not None and own.packing
    objective.check(settings)
    return settings


def keep_what_all_can_read(files: "list[list[tuple[PairFile, int]]]", context: int) -> LeftOut:
    """Leave out every pair that is not there for each checkpoint, so that all are scored on the same texts.

    Args:
        files: of each checkpoint the sides that are scored, with the number of pairs before any was left out.

    Raises:
        InputError: nothing is left of a side.
    """
    import numpy as np

    pairs, left_out, too_long = 0, 0, [0] * len(files)
    for side in zip(*files, strict=True):
        shared = side[0][0].numbers
        for file, _ in side:
            shared = np.intersect1d(shared, file.numbers)
        if not len(shared):
            raise InputError(
                f"No pair fits in context={context} for every checkpoint, so nothing can be compared.\n"
                "Raise context=, or score the checkpoints one by one."
            )
        of_all = side[0][1]
        pairs, left_out = pairs + of_all, left_out + of_all - len(shared)
        too_long = [count + of_all - len(file) for count, (file, _) in zip(too_long, side, strict=True)]
        for file, _ in side:
            file.keep(shared)
    return LeftOut(pairs, left_out, too_long)


def _run_config(folder: Path) -> "Config | None":
    from launch.config import schema

    file = folder.parent / "config.yaml"
    return schema.load(file) if folder.name == "hf" and file.is_file() else None


def _composed(data: str) -> "Config":
    """The defaults of conf/ with one value of the data group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from launch.config import schema

    allowed = values("data")
    if data not in allowed:
        raise InputError(f"data={data}: no such value{nearest(data, allowed)}.\nAllowed: {', '.join(allowed)}.")
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("train", overrides=[f"data={data}"], return_hydra_config=True)
    with open_dict(tree):
        hydra_node = tree.pop("hydra")
    return schema.typed(tree, hydra_node, command="")
