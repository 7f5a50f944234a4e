"""Scored data: which texts evaluate.py reads, and how each checkpoint's tokenizer and objective cut them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.model_folder import read_objective
from launch.config.did_you_mean import nearest
from launch.config.groups import CONF, values

if TYPE_CHECKING:
    from gpt2lab.data.pair_file import PairFile
    from launch.config.run_spec import RunSpec
    from launch.config.schema import RunConfig

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


def data_config(data: str, given: dict[str, str], folder: Path, context: int, permissions: list[str]) -> "RunConfig":
    """Return the configuration of the data to score: a run's own or conf/'s defaults, with the given keys on top.

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
    if own is not None and not data:
        check_targets({"data": own.data}, permissions)
        config = replace(own, allow_targets=permissions)
    else:
        config = _composed(data or "stdlib")
    values: dict[str, Any] = {key: value for key, value in given.items() if value}
    overrides = [f"{key}={value}" for key, value in values.items()]  # they go before what a preset names itself
    invocation = replace(config.invocation, overrides=[*config.invocation.overrides, *overrides])
    config = replace(
        config, **values, context=context or (own.context if own is not None else 0), invocation=invocation
    )
    for key, message in unread_keys(config).items():
        if values.get(key):
            raise InputError(f"{message}.\nLeave it out.")
    checks.check_files(config)
    return config


def in_words(config: "RunConfig") -> str:
    """Return the data and the length of their windows, as key=value."""
    path = f" path={config.path}" if config.path else ""
    return f"data={config.groups['data']}{path} context={config.context}"


def spec_of(config: "RunConfig", folder: Path, tokenizer: str) -> "RunSpec":
    """Return the data as the checkpoint in `folder` reads them: with its tokenizer, objective and packing.

    Args:
        tokenizer: another than its own; empty: its own.
    """
    from launch.checks import objective
    from launch.config.run_spec import Machine, Resolved, RunSpec

    own = _run_config(folder)
    config = replace(
        config,
        objective=own.objective if own is not None else ObjectiveSettings(read_objective(folder)),
        packing=own is not None and own.packing,
    )
    objective.check(config)
    choice = TokenizerChoice("pretrained", source=tokenizer or str(folder))
    machine = Machine("auto", 1, 1, config.precision, "auto", "single", False, 1, micro_batch=1, accumulate=1)
    resolved = Resolved(model=config.model, model_name="", init=str(folder), tokenizer=choice, machine=machine)
    return RunSpec(config, resolved)


def on_device(spec: "RunSpec", device: str) -> "RunSpec":
    """Return the same data in batches of a size that suits the type of device."""
    from launch.memory.run_sizes import fastest_micro_batch

    machine = replace(spec.machine, accelerator="cpu" if device == "cpu" else "gpu")
    machine = replace(machine, largest_micro_batch=fastest_micro_batch(spec.config, machine))
    return replace(spec, resolved=replace(spec.resolved, machine=machine))


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


def _run_config(folder: Path) -> "RunConfig | None":
    from launch.config import run_spec

    file = folder.parent / "config.yaml"
    return run_spec.load(file).config if folder.name == "hf" and file.is_file() else None


def _composed(data: str) -> "RunConfig":
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
    return schema.from_hydra(tree, hydra_node, command="")
