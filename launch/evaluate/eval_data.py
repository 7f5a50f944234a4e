"""Evaluation data: resolves the texts that evaluate.py scores, for the tokenizer and objective of each checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.model_folder import read_objective
from launch.config.did_you_mean import nearest
from launch.config.groups import CONF, values

if TYPE_CHECKING:
    from datamodules.micro_batches import SampleDataModule
    from gpt2lab.data.pair_file import PairFile
    from launch.config.run_spec import RunSpec
    from launch.config.schema import RunConfig

DATA_KEYS = ("path", "val_path", "text_column", "on_bad_line", "source", "target", "cache_dir")


@dataclass(frozen=True)
class SkippedPairs:
    """Number of pairs that are not scored, because they exceed the context of at least one checkpoint.

    Attributes:
        pairs: all pairs of the split.
        left_out: skipped pairs.
        too_long: for each checkpoint, the pairs that exceed its context.
    """

    pairs: int
    left_out: int
    too_long: list[int]

    def summary(self, names: list[str], context: int) -> str:
        """One line for the terminal; `names` are those of the checkpoints."""
        each = ", ".join(f"{count:,} for {name}" for name, count in zip(names, self.too_long, strict=True) if count)
        return (
            f"Scored are {self.pairs - self.left_out:,} of {self.pairs:,} pairs, those that fit in context={context} "
            f"for every checkpoint. Too long: {each}."
        )


def data_config(data: str, given: dict[str, Any], folder: Path, context: int, permissions: list[str]) -> "RunConfig":
    """Return the configuration of the data to score: the run's configuration, or conf/data, with the given keys.

    Args:
        data: a value of conf/data; empty: the data of the run, otherwise stdlib.
        given: values of `DATA_KEYS` and of validate_tokens, by default that of the run; empty ones are ignored.
        folder: Hugging Face folder of the checkpoint whose run configuration is used.
        context: tokens of a window; 0: that of the run, or 0 without a run.
        permissions: packages whose classes the run's configuration may instantiate (`allow_targets`).

    Raises:
        InputError: an unknown value of data, a missing file, a key that the data do not read, or a class without
            permission.
    """
    from launch.checks import checks
    from launch.config import plugins
    from launch.config.targets import check_targets
    from launch.config.unused_keys import unread_keys

    own = _run_config(folder)
    if own is not None and not data:
        check_targets({"data": own.data}, permissions)
        plugins.load(own.plugins, permissions)
        config = replace(own, allow_targets=permissions)
    else:
        config = compose_data(data or "stdlib")
    values: dict[str, Any] = {key: value for key, value in given.items() if value}
    if text_column := values.pop("text_column", ""):
        if "text_column" not in config.data:
            raise InputError(f"text_column={text_column}: data={config.groups['data']} has no such key.\nLeave it out.")
        config = replace(config, data={**config.data, "text_column": text_column})
    if own is not None:
        values.setdefault("validate_tokens", own.validate_tokens)
    overrides = [f"{key}={value}" for key, value in values.items()]  # they take precedence over a preset
    invocation = replace(config.invocation, overrides=[*config.invocation.overrides, *overrides])
    config = replace(
        config, **values, context=context or (own.context if own is not None else 0), invocation=invocation
    )
    for key, message in unread_keys(config).items():
        if values.get(key):
            raise InputError(f"{message}.\nLeave it out.")
    checks.check_files(config)
    return config


def choose_rows(
    modules: "list[SampleDataModule]", config: "RunConfig", same_text: bool, *, is_given: bool = False
) -> None:
    """Choose the scored part of the validation split, the same texts for every checkpoint.

    Args:
        modules: data of each checkpoint.
        config: of the data; `validate_tokens` limits the part.
        same_text: whether a part of these samples has the same text for every checkpoint.
        is_given: whether the limit was given on the command line.

    Raises:
        InputError: it was given, and tokenizers differ.
    """
    limit = config.most_validated
    if not same_text and not all(module.validates_all for module in modules):
        if is_given and limit is not None:
            raise InputError(
                f"validate_tokens={limit}: these checkpoints divide the text into different tokens, so a part of the "
                "windows has\nanother text for each. Leave it out, or give validate_tokens=full."
            )
        limit = None
    rows = modules[0].validation_rows(limit)
    for module in modules:
        module.validate_tokens = limit
        module.val_rows = rows if same_text else module.validation_rows(limit)


def describe_data(config: "RunConfig", module: "SampleDataModule") -> str:
    """Format data, path, context and, where only a part is scored, its size as key=value."""
    path = f" path={config.path}" if config.path else ""
    part = "" if module.validates_all else f" validate_tokens={module.validate_tokens}"
    return f"data={config.groups['data']}{path} context={config.context}{part}"


def checkpoint_spec(config: "RunConfig", folder: Path, tokenizer: str) -> "RunSpec":
    """Return the data for one checkpoint, with its tokenizer, objective and packing.

    Args:
        folder: Hugging Face folder of the checkpoint.
        tokenizer: another tokenizer; empty: that of the checkpoint.

    Raises:
        InputError: the objective does not support the data.
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


def with_device(spec: "RunSpec", device: str) -> "RunSpec":
    """Return the spec with an accelerator and the batch size for it."""
    from launch.memory.run_sizes import fastest_micro_batch

    machine = replace(spec.machine, accelerator="cpu" if device == "cpu" else "gpu")
    machine = replace(machine, largest_micro_batch=fastest_micro_batch(spec.config, machine))
    return replace(spec, resolved=replace(spec.resolved, machine=machine))


def keep_common_pairs(files: "list[list[tuple[PairFile, int]]]", context: int) -> SkippedPairs:
    """Keep only pairs that fit in the context for every checkpoint, so that all are scored on the same texts.

    Args:
        files: for each checkpoint, its splits with the number of pairs before filtering.

    Raises:
        InputError: no pair of a split remains.
    """
    import numpy as np

    pairs, left_out, too_long = 0, 0, [0] * len(files)
    for split in zip(*files, strict=True):
        shared = split[0][0].numbers
        for file, _ in split:
            shared = np.intersect1d(shared, file.numbers)
        if not len(shared):
            raise InputError(
                f"No pair fits in context={context} for every checkpoint, so nothing can be compared.\n"
                "Raise context=, or score the checkpoints one by one."
            )
        total = split[0][1]
        pairs, left_out = pairs + total, left_out + total - len(shared)
        too_long = [count + total - len(file) for count, (file, _) in zip(too_long, split, strict=True)]
        for file, _ in split:
            file.keep(shared)
    return SkippedPairs(pairs, left_out, too_long)


def _run_config(folder: Path) -> "RunConfig | None":
    from launch.config import run_spec

    file = folder.parent / "config.yaml"
    return run_spec.load(file).config if folder.name == "hf" and file.is_file() else None


def compose_data(data: str) -> "RunConfig":
    """Compose the defaults of conf/ with one value of the data group.

    Raises:
        InputError: no such value.
    """
    from hydra import compose, initialize_config_dir

    from launch.config import schema

    allowed = values("data")
    if data not in allowed:
        raise InputError(f"data={data}: no such value{nearest(data, allowed)}.\nAllowed: {', '.join(allowed)}.")
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("train", overrides=[f"data={data}"], return_hydra_config=True)
    return schema.from_composed(tree)
