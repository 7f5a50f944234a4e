"""RunConfig: every key of train.py with its type, range and meaning. Imports nothing heavy.

Hydra composes conf/ into this schema, so a wrong type is refused while composing; `from_hydra` turns the composed tree
into a frozen `RunConfig`, and the tree goes no further. A key is declared in three places: its default in conf/, its
field here (or in gpt2lab/settings.py), and the code that uses it.
"""

import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2lab.errors import InputError
from gpt2lab.keys import key
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import (
    LossSettings,
    ModelShape,
    ObjectiveSettings,
    OptimizerSettings,
    PrecisionSettings,
    ScheduleSettings,
    SequenceSettings,
    TeacherCacheSettings,
    TokenizerChoice,
)
from gpt2lab.storage.utf8 import check_values
from launch.config.literal_text import is_interpolated, override
from launch.config.multirun_settings import LauncherSettings, SearchSettings, StudySettings
from launch.config.structured import composable, frozen
from launch.config.targets import foreign_targets

STUDY = "distill_study"  # the experiment that is a study of many runs
DISTILL = "task=distill"
EVERY_STEPS = "[1, inf)"


@dataclass(frozen=True)
class ModelKeys:
    """Sizes of the model; null (model=auto) takes those of init. Its vocabulary is the tokenizer's."""

    n_layer: int | None = key("transformer blocks", within="[1, inf)")
    n_head: int | None = key("attention heads of each block", within="[1, inf)")
    n_embd: int | None = key("width", within="[1, inf)")
    n_positions: int | None = key("longest context in tokens", within="[2, inf)")
    dropout: float = key("dropout after embeddings, attention and MLP", within="[0, 1)")

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
    trial: int | None = None  # its number in the study beside it, which may prune it
    hydra: str = ""  # Hydra's own configuration as YAML, for .hydra/hydra.yaml


@dataclass(frozen=True)
class RunConfig:
    """The keys of one run as the user gave them; `auto` is not resolved yet."""

    task: dict[str, Any] = key("module that is trained")
    model: ModelKeys = key("sizes")
    data: dict[str, Any] = key("corpus or pairs")
    tokenizer: TokenizerChoice = key("tokenizer")
    objective: ObjectiveSettings = key("training objective")
    loss: LossSettings = key("distillation loss", read_by=DISTILL)
    teacher_cache: TeacherCacheSettings = key("stored teacher distributions", read_by=DISTILL)
    sequences: SequenceSettings = key("text a distillation trains on", read_by=DISTILL)
    optimizer: OptimizerSettings = key("optimizer")
    schedule: ScheduleSettings = key("learning-rate schedule")
    callbacks: dict[str, Any] = key("callbacks")
    logger: dict[str, Any] = key("logger beside metrics.csv")
    trainer: dict[str, Any] = key("arguments of lightning.Trainer that this project does not set itself")
    precision: PrecisionSettings = key("dtypes of weights and matrix products")
    strategy: str = key("data parallel strategy", of_machine=True)

    seed: int = key("seed of weights, data order and dropout", within="[0, 4294967295]")
    run_dir: str | None = key("run directory; null: runs/<task>/<model>-<time>", free_text=True)
    name: str | None = key("name of the run directory instead of <model>-<time>", free_text=True)
    init: str = key(
        "initial weights: scratch, latest, a run directory, a Hugging Face folder, a Hub id, teacher_layers (distill)",
        free_text=True,
    )
    plan: bool = key("print what the run would need and do, and stop")
    plan_memory: float | None = key("GB of each GPU of the machine that is planned for", within="(0, 1e6]")
    resume: str | None = key(
        "run directory to resume, or auto: resume what run_dir or name holds, else start", free_text=True
    )
    # Never stored: launch/config/targets.py
    allow_targets: list[str] = key("packages of your own whose classes a stored configuration may build")

    teacher: str = key("a run directory, a Hugging Face folder, a Hub id, or latest", read_by=DISTILL, free_text=True)
    baseline: str | None = key(
        "run of the same student without a teacher, for distill/gap_closed", read_by=DISTILL, free_text=True
    )
    preflight: str = key(
        "what an unfit teacher does before the first step", choices=("refuse", "warn", "off"), read_by=DISTILL
    )

    steps: int = key("optimizer steps", within="[1, 1e9]", on_resume=True)
    batch_tokens: int = key("tokens of one optimizer step, over all devices", within="[1, 1e9]", read_by="running text")
    batch_sequences: int = key("pairs of one optimizer step, over all devices", within="[1, 1e6]", read_by="pairs")
    micro_batch: int | str = key(
        "sequences in one forward pass of a device", within="[1, 1e6]", auto=True, of_machine=True
    )
    context: int = key("tokens of a sequence", within="[2, 1e6]")
    packing: bool = key("several documents or pairs share a row and do not attend to each other")
    label_smoothing: float = key("label smoothing of the training loss", within="[0, 1)")
    z_loss: float = key("weight of logsumexp² of the logits in the training loss; PaLM's is 1e-4", within="[0, inf)")
    gradient_clip: float = key("largest L2 norm of the gradient; 0: off", within="[0, inf)")
    layer_drop: float = key("probability with which a training pass skips a block", within="[0, 1)")
    ema: float = key("decay of the weight average that is validated and exported; 0: off", within="[0, 1)")
    activation_checkpointing: bool = key("recompute activations in the backward pass: less memory, a third more time")
    compile: bool | str = key("torch.compile; auto: where it pays within the run", auto=True)
    validate_every: int = key("steps between validations", within=EVERY_STEPS, on_resume=True)
    checkpoint_every: int = key("steps between checkpoints", within=EVERY_STEPS, on_resume=True)
    checkpoint_format: str = key(
        "single (one file), sharded (strategy=fsdp: each rank writes its part), or auto: by size",
        choices=("auto", "single", "sharded"),
        of_machine=True,
    )
    sample_every: int = key("steps between samples", within=EVERY_STEPS, on_resume=True, read_by="callbacks=samples")
    log_every: int = key("steps between logged training losses", within=EVERY_STEPS, on_resume=True)
    on_spike: str = key(
        "what a spike of the training loss does: warn, or stop: save and end the run",
        choices=("warn", "stop"),
        on_resume=True,
        read_by="callbacks=health",
    )

    accelerator: str = key("device type", choices=("auto", "cpu", "gpu", "mps"), of_machine=True)
    devices: int | str = key(
        "devices of each machine; auto: one CPU process, or every GPU", within="[1, 1e4]", auto=True, of_machine=True
    )
    num_nodes: int = key("machines (docs/cluster.md)", within="[1, 1e4]")
    n_jobs: int = key("jobs of a sweep that run at once, each on its share of cores and GPUs", within="[1, 1024]")
    max_restarts: int = key("restarts of a run whose process crashed", within="[0, 1000]", on_resume=True)
    threads: int | str = key("threads of each process", within="[1, 4096]", auto=True, of_machine=True)
    fsdp_offload: bool = key(
        "strategy=fsdp on GPUs: keep weights, gradients and optimizer state in host memory",
        of_machine=True,
        read_by="sharding",
    )
    shard_teacher: bool | str = key(
        "strategy=fsdp: shard the teacher too; auto: where it does not fit beside the student",
        auto=True,
        of_machine=True,
        read_by=DISTILL,
    )
    workers: int = key("data loading processes of each rank", within="[0, 64]", on_resume=True)
    rank_timeout: int = key(
        "seconds without progress of a rank after which the run ends and names it", within="[5, 1e6]", on_resume=True
    )
    cache_dir: str | None = key(
        "folder for prepared data; null: $GPT2LAB_CACHE, else ~/.cache/gpt2lab", on_resume=True, free_text=True
    )

    path: str = key("a file, a folder or a glob", read_by="data with path", free_text=True)
    val_path: str = key("validation text or pairs", read_by="data with val_path", free_text=True)
    val_fraction: float = key("share of the documents that validates", within="(0, 1)", read_by="data split by hash")
    on_bad_line: str = key("an unreadable record: stop or skip", choices=("stop", "skip"), read_by="data from files")
    source: str = key("column of the prompt", read_by="pairs", free_text=True)
    target: str = key("column of the response", read_by="pairs", free_text=True)
    vocab_size: int = key("tokens of a tokenizer trained here", within="[257, 1e6]", read_by="trained tokenizer")

    launcher: LauncherSettings = key("where runs are executed", factory=LauncherSettings)
    hparams_search: SearchSettings = key("search of hyper-parameters", factory=SearchSettings)
    study: StudySettings = key("study of distillation", factory=StudySettings)  # conf/experiment/distill_study.yaml

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
        logger = {"logger": self.logger} if self.logger else {}
        return {"task": self.task, "data": self.data, **observers, **logger, "trainer": self.trainer}

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
        """Whether weights are loaded from where init says, and sizes with them."""
        return self.init not in ("scratch", TEACHER_LAYERS)

    @property
    def lora_rank(self) -> int:
        """Rank of the adapters that are trained instead of the weights; 0: none."""
        lora = self.task.get("lora")
        return int(lora["rank"]) if isinstance(lora, dict) else 0

    @property
    def rows_of_a_step(self) -> int:
        """Sequences of the global batch."""
        return self.batch_sequences if self.takes_pairs else self.batch_tokens // self.context

    @property
    def takes_pairs(self) -> bool:
        """Whether the data are pairs of texts; then a batch counts sequences, not tokens."""
        return self.data.get("kind") == "pairs"


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/train.yaml lists first."""
    ConfigStore.instance().store(name="schema", node=composable(RunConfig))


def from_hydra(tree: DictConfig, hydra: Any, command: str) -> RunConfig:
    """Return the composed tree as a plain RunConfig, with absolute paths and every interpolation resolved.

    Args:
        tree: what Hydra composed, without its own `hydra` node.
        hydra: that node; it knows which value each group has and what was given on the command line.

    Raises:
        InputError: an interpolation leads nowhere, a value is missing, or text is not valid UTF-8.
    """
    try:
        config = frozen(RunConfig, tree)
    except OmegaConfBaseException as error:
        raise InputError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    check_values(asdict(config))
    choices = hydra.runtime.choices.items()
    groups = {str(group): str(value) for group, value in choices if not str(group).startswith("hydra/")}
    sweep = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else ""
    as_typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = [str(override) for override in as_typed or []]
    literal = {given: _with_value(given, config) for given in overrides if is_interpolated(given)}
    return replace(
        config,
        allow_targets=[*config.allow_targets, *foreign_targets(config.target_nodes)],  # composed now, so permitted
        invocation=Invocation(
            groups=groups,
            overrides=[literal.get(given, given) for given in overrides],
            command=shlex.join(literal.get(word, word) for word in shlex.split(command)),
            sweep=sweep,
            hydra=OmegaConf.to_yaml(hydra),
        ),
    )


def _with_value(given: str, config: RunConfig) -> str:
    """An override without its interpolations (`${oc.env:X}`, `${now:…}`), to be typed wherever and whenever."""
    value = optional_value(config, given.partition("=")[0].lstrip("+~"))
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
