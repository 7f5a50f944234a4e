"""Config: every key of train.py with its type. Imports nothing heavy.

Hydra composes conf/ into this schema, so a wrong type is refused while composing; `typed` turns the composed tree into
a plain `Config`, and the tree goes no further.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import (
    LauncherSettings,
    LossSettings,
    ModelShape,
    ObjectiveSettings,
    OptimizerSettings,
    ScheduleSettings,
    SearchSettings,
    SequenceSettings,
    StudySettings,
    TeacherCacheSettings,
    TokenizerChoice,
)
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.utf8 import check_values
from launch.config import literal_text
from launch.config.targets import foreign_targets

STUDY = "distill_study"  # the experiment that is a study of many runs


@dataclass
class ModelKeys:
    """Sizes of the model; null (model=auto) follows init. Its vocabulary is the tokenizer's."""

    n_layer: int | None
    n_head: int | None
    n_embd: int | None
    n_positions: int | None
    dropout: float

    def shape(self, vocab_size: int) -> ModelShape:
        """With the tokenizer's vocabulary; a size that is still open is 0."""
        return ModelShape(
            n_layer=self.n_layer or 0,
            n_head=self.n_head or 0,
            n_embd=self.n_embd or 0,
            n_positions=self.n_positions or 0,
            vocab_size=vocab_size,
            dropout=self.dropout,
        )


@dataclass
class Record:
    """What the launcher notes down in a run's config.yaml; not for the user to set."""

    groups: dict[str, str] = field(default_factory=dict)  # group → value: task=pretrain, model=nano, …
    overrides: list[str] = field(default_factory=list)  # as given on the command line
    command: str = ""
    teacher_hash: str = ""  # sha256 of the teacher's weights
    teacher_text: str = ""  # folder with what the teacher wrote, where students train on that
    teacher_cache: str = ""  # folder with what the teacher says of the data, where it is not asked at every step
    teacher_seconds: float = 0.0  # what this run spent on having the teacher write or read once for all students
    kept: dict[str, Any] = field(default_factory=dict)  # init=teacher_layers: what the student has of its teacher
    sweep: str = ""  # name of the sweep that this run is a job of
    trial: int | None = None  # its number in the study beside it, which may end it early
    data_hash: str = ""  # content hash of the prepared data
    baseline_loss: float | None = None  # val/loss of the baseline, read when the run started
    world_size: int = 0  # 0 until it is settled; then every automatic choice is, and a resumed run keeps it
    compile_head: bool | None = None  # whether the work on the LM head's logits is compiled; null until it is settled
    accumulate: int = 0  # micro-batches of one optimizer step on each rank
    largest_micro_batch: int = 0  # sequences that fit into a device at once, in validation too; 0: nobody asked
    planned_memory: dict[str, int] = field(default_factory=dict)  # bytes: of the process without a model, and at most


@dataclass
class Config:
    """conf/train.yaml says what each key means."""

    task: dict[str, Any]
    model: ModelKeys
    data: dict[str, Any]
    tokenizer: TokenizerChoice
    objective: ObjectiveSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    callbacks: dict[str, Any]
    logger: dict[str, Any]
    precision: str
    strategy: str

    seed: int
    run_dir: str | None
    name: str | None
    init: str
    resume: str | None
    teacher: str
    preflight: str

    steps: int
    batch_tokens: int
    batch_sequences: int
    micro_batch: int | str
    context: int
    gradient_clip: float
    ema: float
    activation_checkpointing: bool
    compile: bool | str
    validate_every: int
    checkpoint_every: int
    sample_every: int
    log_every: int
    on_spike: str

    accelerator: str
    devices: int | str
    threads: int | str
    workers: int
    cache_dir: str | None

    path: str
    val_path: str
    val_fraction: float
    on_bad_line: str
    source: str
    target: str
    vocab_size: int

    # With defaults, so that runs from before there were these keys can still be read
    teacher_cache: TeacherCacheSettings = field(default_factory=TeacherCacheSettings)
    sequences: SequenceSettings = field(default_factory=SequenceSettings)
    baseline: str | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    packing: bool = False
    layer_drop: float = 0.0
    n_jobs: int = 1
    max_restarts: int = 0
    num_nodes: int = 1
    rank_timeout: int = 1800
    checkpoint_format: str = "single"
    fsdp_offload: bool = False
    shard_teacher: bool | str = False
    plan: bool = False
    plan_memory: float | None = None
    allow_targets: list[str] = field(default_factory=list)  # never stored: see launch/config/targets.py

    launcher: LauncherSettings = field(default_factory=LauncherSettings)
    hparams_search: SearchSettings = field(default_factory=SearchSettings)
    study: StudySettings = field(default_factory=StudySettings)  # conf/experiment/distill_study.yaml

    record: Record = field(default_factory=Record)

    @property
    def task_name(self) -> str:
        """pretrain, distill or finetune."""
        return self.record.groups["task"]

    @property
    def target_nodes(self) -> dict[str, Any]:
        """Every object that is built from a `_target_`, by its place in the configuration."""
        observers = {f"callbacks.{name}": node for name, node in self.callbacks.items() if node is not None}
        return {"task": self.task, "data": self.data, **observers, **({"logger": self.logger} if self.logger else {})}

    @property
    def is_study(self) -> bool:
        """Whether this is the plan of a study's many runs and none itself."""
        return self.record.groups.get("experiment") == STUDY

    @property
    def planned_device_bytes(self) -> int | None:
        """Memory of each GPU of a machine that is only planned for; None: the machine is this one."""
        return None if self.plan_memory is None else int(self.plan_memory * 1e9)

    @property
    def init_names_weights(self) -> bool:
        """Whether weights are loaded from where init says, and sizes with them."""
        return self.init not in ("scratch", TEACHER_LAYERS)

    @property
    def lora_rank(self) -> int:
        """Of the adapters that are trained instead of the weights; 0: none."""
        lora = self.task.get("lora")
        return int(lora["rank"]) if isinstance(lora, dict) else 0

    @property
    def rows_of_a_step(self) -> int:
        """Sequences of the global batch."""
        return self.batch_sequences if self.takes_pairs else self.batch_tokens // self.context

    @property
    def takes_pairs(self) -> bool:
        """Whether the data are pairs of texts; then a batch counts sequences, not tokens."""
        return str(self.data["_target_"]).endswith(".PairData")


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/train.yaml lists first."""
    ConfigStore.instance().store(name="schema", node=Config)


def typed(tree: DictConfig, hydra: Any, command: str) -> Config:
    """The composed tree as a plain, resolved Config.

    Args:
        tree: what Hydra composed, without its own `hydra` node.
        hydra: that node; it knows which value each group has and what was given on the command line.

    Raises:
        InputError: an interpolation leads nowhere, a value is missing, or text is not valid UTF-8.
    """
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise InputError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check_values(asdict(config))
    config.allow_targets += foreign_targets(config.target_nodes)  # whoever composes them now permits them
    choices = hydra.runtime.choices.items()
    groups = {str(group): str(value) for group, value in choices if not str(group).startswith("hydra/")}
    sweep = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else ""
    as_typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = [str(override) for override in as_typed or []]
    config.record = Record(groups=groups, overrides=overrides, command=command, sweep=sweep)
    return config


def save(config: Config, file: Path) -> None:
    """Write the whole configuration as YAML; `load` reads it back."""
    write_text(file, dumped(config))


def dumped(config: Config) -> str:
    """The whole configuration as YAML, permissions excepted; `parsed` reads it back."""
    values = asdict(config)
    del values["allow_targets"]
    return literal_text.to_yaml(values)


def load(file: Path) -> Config:
    """Read what `save` wrote.

    Raises:
        InputError: missing, unreadable, or of another shape.
    """
    try:
        return parsed(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the configuration {file}: {error}") from error


def parsed(text: str, where: str) -> Config:
    """Read what `dumped` made. Its values are literal: nothing in them is interpolated, and none is a permission.

    Raises:
        InputError: unreadable, or of another shape.
    """
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise TypeError(f"it holds {type(values).__name__}, not keys and values")
        config = literal_text.typed_values(Config, {**values, "allow_targets": []})
    except (ValueError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"Cannot read the configuration {where}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check_values(values)
    return config
