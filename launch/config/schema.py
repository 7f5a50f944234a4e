"""RunConfig: every key of train.py with its type, range and meaning. Imports nothing heavy.

Hydra composes conf/ into this schema, so a wrong type is refused while composing; `from_hydra` turns the composed tree
into a frozen `RunConfig`, and the tree goes no further. A key appears in three places: its default in conf/, its
field (plain_keys.py, multirun_settings.py, known_keys.py, gpt2lab/settings.py), and the code that uses it.
"""

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gpt2lab.keys import key
from gpt2lab.metric_names import VAL_LOSS
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import (
    MOST_SCORED,
    PAIR_SIDES,
    HubSettings,
    LoraSettings,
    LossSettings,
    ModelShape,
    ObjectiveSettings,
    OptimizerSettings,
    PrecisionSettings,
    SamplingSettings,
    ScheduleSettings,
    SequenceSettings,
    StrategySettings,
    TeacherCacheSettings,
    TokenizerKeys,
)
from gpt2lab.storage.utf8 import check_values
from launch.config import machine, plugins, size_defaults
from launch.config.literal_text import is_interpolated, override, unresolved_error
from launch.config.multirun_settings import LauncherSettings, SearchSettings, StudySettings
from launch.config.plain_keys import DISTILL, FULL, DataKeys, DistillationKeys, MachineKeys, RunKeys, TrainingKeys
from launch.config.references import GROUPS, find_references, follow_references
from launch.config.structured import composable, frozen
from launch.config.targets import foreign_targets

STUDY = "distill_study"  # the experiment that is a study of many runs


@dataclass(frozen=True)
class ModelKeys:
    """Sizes of the model; null (model=auto) takes those of init. Its vocabulary is the tokenizer's."""

    n_layer: int | None = key("number of transformer blocks", within="[1, inf)")
    n_head: int | None = key("number of attention heads per block", within="[1, inf)")
    n_embd: int | None = key("width of the hidden states", within="[1, inf)")
    n_positions: int | None = key("number of position embeddings: the maximum context in tokens", within="[2, inf)")
    dropout: float = key("dropout probability after embeddings, attention and MLP", within="[0, 1)")

    def shape(self, vocab_size: int) -> ModelShape:
        """Return the sizes with the tokenizer's vocabulary; one that is not resolved yet is 0."""
        return ModelShape(
            n_layer=self.n_layer or 0,
            n_head=self.n_head or 0,
            n_embd=self.n_embd or 0,
            n_positions=self.n_positions or 0,
            vocab_size=vocab_size,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class Invocation:
    """Command line and groups a run was composed from; not for the user to set."""

    groups: dict[str, str] = field(default_factory=dict)  # group → value: task=pretrain, model=nano, …
    overrides: list[str] = field(default_factory=list)  # as given on the command line
    command: str = ""
    sweep: str = ""  # name of the sweep that this run is a job of
    references: dict[str, str] = field(default_factory=dict)  # argument → key that it follows: ${sample_every}
    auto_keys: list[str] = field(default_factory=list)  # those left to the size of the model
    continued_with: list[str] = field(default_factory=list)  # overrides by which a resume changed the run's length
    trial: int | None = None  # its number in the study beside it, which may prune it
    hydra: str = ""  # Hydra's own configuration as YAML, for .hydra/hydra.yaml


@dataclass(frozen=True)
class RunConfig(DataKeys, MachineKeys, TrainingKeys, DistillationKeys, RunKeys):
    """The keys of one run as the user gave them; `auto` is not resolved yet. The fields of the last base come first."""

    task: dict[str, Any] = key("training task: the LightningModule")
    model: ModelKeys = key("model sizes")
    data: dict[str, Any] = key("training data: running text or pairs")
    tokenizer: TokenizerKeys = key("tokenizer of the data")
    objective: ObjectiveSettings = key("training objective")
    loss: LossSettings = key("distillation loss", read_by=DISTILL)
    teacher_cache: TeacherCacheSettings = key("teacher distributions stored for all students", read_by=DISTILL)
    sequences: SequenceSettings = key("training text of a distillation", read_by=DISTILL)
    sampling: SamplingSettings = key("choice of each generated token", on_resume=True, read_by="generated text")
    optimizer: OptimizerSettings = key("optimizer and its learning rate")
    schedule: ScheduleSettings = key("learning rate schedule")
    callbacks: dict[str, Any] = key("Lightning callbacks by name; null leaves one out")
    logger: dict[str, Any] = key("logger in addition to metrics.csv")
    hub: HubSettings = key("model card and upload to the Hugging Face Hub", on_resume=True)
    trainer: dict[str, Any] = key("arguments of lightning.Trainer that this project does not set itself")
    precision: PrecisionSettings = key("dtypes of weights and matrix products")
    strategy: StrategySettings = key("parallel training on several devices", of_machine=True)

    launcher: LauncherSettings = key("where runs are executed: this machine or a cluster", factory=LauncherSettings)
    hparams_search: SearchSettings = key("hyperparameter search of a multirun", factory=SearchSettings)
    study: StudySettings = key("runs of experiment=distill_study", factory=StudySettings)

    invocation: Invocation = field(default_factory=Invocation)

    @property
    def groups(self) -> dict[str, str]:
        """Group → value: task=pretrain, model=nano, …"""
        return self.invocation.groups

    @property
    def task_name(self) -> str:
        """pretrain, distill or finetune."""
        return self.groups["task"]

    @property
    def target_nodes(self) -> dict[str, Any]:
        """Every object that is built from a `_target_`, by its place in the configuration."""
        observers = {f"callbacks.{name}": node for name, node in self.callbacks.items() if node is not None}
        return {"task": self.task, "data": self.data, **observers, **self.logger_nodes, "trainer": self.trainer}

    @property
    def logger_nodes(self) -> dict[str, Any]:
        """The chosen logger, and those that were added under a name: `logger.tb._target_=…`."""
        is_added = {name: isinstance(node, dict) and "_target_" in node for name, node in self.logger.items()}
        chosen = {name: value for name, value in self.logger.items() if not is_added[name]}
        added = {f"logger.{name}": node for name, node in self.logger.items() if is_added[name]}
        return ({"logger": chosen} if chosen else {}) | added

    @property
    def is_study(self) -> bool:
        """Whether this is the plan of a study's many runs and none itself."""
        return self.groups.get("experiment") == STUDY

    @property
    def planned_device_bytes(self) -> int | None:
        """Memory of each GPU of a machine that is only planned for; None: the machine is this one."""
        return None if self.plan_memory is None else int(self.plan_memory * 1e9)

    @property
    def init_names_weights(self) -> bool:
        """Whether `init` loads weights, and with them the sizes of the model."""
        return self.init not in ("scratch", TEACHER_LAYERS)

    @property
    def is_unsized(self) -> bool:
        """Whether defaults by size wait for the sizes of init."""
        return self.model.n_layer is None and bool(self.invocation.auto_keys)

    @property
    def lora_rank(self) -> int:
        """Rank of the adapters that are trained instead of the weights; 0: none."""
        return int(self.lora.rank)

    @property
    def lora(self) -> LoraSettings:
        """Settings of the adapters; keys that the stored task of an older version lacks have their defaults."""
        lora = self.task.get("lora")
        given: dict[str, Any] = lora if isinstance(lora, dict) else {}
        names = [item.name for item in fields(LoraSettings)]
        return LoraSettings(**{name: given[name] for name in names if name in given})

    @property
    def watched_metric(self) -> str:
        """Metric that the run is judged by: the first score of generated text, else the validation loss."""
        text = self.task.get("text")
        if not isinstance(text, dict) or not text.get("examples"):
            return VAL_LOSS
        metrics = text.get("metrics") or self.data.get("metrics")
        return f"val/{metrics[0]}" if metrics else VAL_LOSS

    @property
    def most_validated(self) -> int | None:
        """Most tokens of a validation; None: the whole split."""
        return None if self.validate_tokens == FULL else int(self.validate_tokens)

    @property
    def most_scored(self) -> int:
        """Most tokens of the final score; 0 without one."""
        given = (self.callbacks.get("final_score") or {}).get("tokens", 0)
        return self.auto_scored if given == "auto" else int(given)

    @property
    def auto_scored(self) -> int:
        """Most tokens of the final score under `auto`."""
        validated = MOST_SCORED if self.most_validated is None else self.most_validated
        return min(MOST_SCORED, max(validated, self.trained_positions // 4))

    @property
    def trained_positions(self) -> int:
        """Positions of all training batches."""
        return self.steps * self.global_batch_rows * self.context

    @property
    def global_batch_rows(self) -> int:
        """Sequences of the global batch."""
        return self.batch_sequences if self.takes_pairs else self.batch_tokens // self.context

    @property
    def data_tokenizer(self) -> str:
        """Tokenizer of the data under tokenizer=auto, without a teacher and weights that have one: bpe, or a Hub id."""
        return self.data.get("default_tokenizer") or ("bpe" if self.takes_pairs else "gpt2")

    @property
    def takes_pairs(self) -> bool:
        """Whether the data are pairs of texts; then a batch counts sequences, not tokens."""
        return self.data.get("kind") == "pairs"

    @property
    def pair_template(self) -> dict[str, str]:
        """Templates of both sides of pairs, which the exported model stores; empty for running text."""
        sides = {side: str(self.data.get(side) or "") for side in PAIR_SIDES}
        is_template = "{source}" in sides["prompt"] and "{target}" in sides["response"]
        return sides if self.takes_pairs and is_template else {}


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/train.yaml lists first."""
    ConfigStore.instance().store(name="schema", node=composable(RunConfig))


def from_hydra(tree: DictConfig, hydra: Any, command: str) -> RunConfig:
    """Return the composed tree as a plain RunConfig, with every interpolation resolved; its plugins are imported.

    Args:
        tree: what Hydra composed, without its own `hydra` node.
        hydra: that node; it knows which value each group has and what was given on the command line.

    Raises:
        InputError: an interpolation leads nowhere, a value or a plugin is missing, or text is not valid UTF-8.
    """
    try:
        config = frozen(RunConfig, tree)
    except OmegaConfBaseException as error:
        raise unresolved_error(error) from error
    check_values(asdict(config))
    choices = hydra.runtime.choices.items()
    groups = {str(group): str(value) for group, value in choices if not str(group).startswith("hydra/")}
    sweep = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else ""
    as_typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = [str(override) for override in as_typed or []]
    unresolved = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(unresolved, dict)
    found = [find_references(unresolved[group], group) for group in GROUPS]
    references = {place: text for group in found for place, text in group.items()}
    literal = {given: _with_value(given, config, references) for given in overrides if is_interpolated(given)}
    config, auto_keys = _typed_sizes(config)
    permitted = [*config.allow_targets, *foreign_targets(config.target_nodes), *config.plugins]  # composed now
    plugins.load(config.plugins, permitted)
    composed = replace(
        config,
        allow_targets=permitted,
        invocation=Invocation(
            groups=groups,
            overrides=[literal.get(given, given) for given in overrides],
            command=shlex.join(literal.get(word, word) for word in shlex.split(command)),
            sweep=sweep,
            hydra=OmegaConf.to_yaml(hydra),
            references=references,
            auto_keys=auto_keys,
        ),
    )
    return with_references(with_size_defaults(composed, config.model, _may_have_gpu(config)))


def _typed_sizes(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the configuration with checked types of the keys that may be `auto`, and those that are.

    Raises:
        InputError: a value has the wrong type.
    """
    given = {name: value_of(config, name) for name in size_defaults.TYPES}
    left = [name for name, value in given.items() if value == size_defaults.AUTO]
    typed = {name: size_defaults.check_type(name, value) for name, value in given.items() if name not in left}
    warmup = [size_defaults.WARMUP] if config.schedule.warmup_steps is None else []
    return _with_values(config, typed), [*left, *warmup]


def _may_have_gpu(config: RunConfig) -> bool:
    """Whether the run may find a GPU here, without importing torch; it is known once the run starts."""
    return config.accelerator == "gpu" or (config.accelerator == "auto" and machine.DRIVER.exists())


def explain_sizes(config: RunConfig, model: ModelKeys, on_gpu: bool) -> dict[str, tuple[Any, str]]:
    """Return key → (value, where it comes from) of the keys that are left to the size of the model.

    Args:
        model: its sizes, with those of init; unknown ones are null.
    """
    lora = config.task.get("lora")  # its types are checked later
    facts = size_defaults.Facts(
        layers=model.n_layer or 0,
        width=model.n_embd or 0,
        positions=model.n_positions or 0,
        on_gpu=on_gpu,
        optimizer=config.optimizer.name,
        from_weights=config.init_names_weights,
        lora=isinstance(lora, dict) and bool(lora.get("rank")),
        pairs=config.takes_pairs,
    )
    given = [name for name in size_defaults.RULES if name not in config.invocation.auto_keys]
    return size_defaults.default_values(facts, {name: value_of(config, name) for name in given})


def with_size_defaults(config: RunConfig, model: ModelKeys, on_gpu: bool) -> RunConfig:
    """Return the configuration with the values of `explain_sizes`."""
    found = explain_sizes(config, model, on_gpu)
    return with_references(_with_values(config, {name: value for name, (value, _) in found.items()}))


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration with steps that are counted and not left to the size of the model."""
    left = [name for name in config.invocation.auto_keys if name != "steps"]
    return replace(config, steps=steps, invocation=replace(config.invocation, auto_keys=left))


def steps_of_epochs(config: RunConfig, samples: float) -> int:
    """Return the steps of `epochs` passes over so many training samples; the last may begin the next pass."""
    assert config.epochs is not None
    return max(1, math.ceil(round(config.epochs * samples / config.global_batch_rows, 6)))


def _with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with other values of keys, at most one group deep."""
    for name, value in values.items():
        group, _, key_ = name.rpartition(".")
        config = replace(config, **({group: replace(vars(config)[group], **{key_: value})} if group else {name: value}))
    return config


def from_composed(tree: DictConfig, command: str = "") -> RunConfig:
    """Return a tree that contains Hydra's own node as `from_hydra` does; the node is removed from the tree."""
    with open_dict(tree):
        hydra = tree.pop("hydra")
    return from_hydra(tree, hydra, command)


def with_references(config: RunConfig) -> RunConfig:
    """Return the configuration with every argument that follows a key at the present value of that key."""
    references, lookup = config.invocation.references, partial(optional_value, config)
    nodes = {group: follow_references(vars(config)[group], group, references, lookup) for group in GROUPS}
    return replace(config, **nodes)


def _with_value(given: str, config: RunConfig, references: Mapping[str, str]) -> str:
    """Return an override without its interpolations (`${oc.env:X}`, `${now:…}`), except for references to keys."""
    name = given.partition("=")[0].lstrip("+~")
    value = None if name in references else optional_value(config, name)
    return given if value is None else override(given.partition("=")[0], value)


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a dotted key.

    Raises:
        KeyError, TypeError: there is no such key.
    """
    value: Any = config
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else vars(value)[part]
    return value


def optional_value(config: RunConfig, name: str) -> Any:
    """Return the value of a dotted key; None where this task, these data or callbacks have no such key."""
    try:
        return value_of(config, name)
    except (KeyError, TypeError):
        return None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths of data, so that the run can be resumed from any folder."""
    dataset = _expanded(str(config.data.get("dataset") or ""))  # may be a Hub id
    data = {**config.data, "dataset": str(Path(dataset).absolute())} if Path(dataset or "-").is_dir() else config.data
    return replace(config, data=data, path=_absolute(config.path), val_path=_absolute(config.val_path))


def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 — a glob or a Hub id is no path


def _absolute(path: str) -> str:
    return os.path.abspath(_expanded(path)) if path else ""  # noqa: PTH100
