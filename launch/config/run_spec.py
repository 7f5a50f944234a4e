"""RunSpec: one run with nothing left open; what config.yaml holds and every process of the run receives.

`resolve` makes a `RunSpec` of a `RunConfig` (launch/run/resolve.py), preparing the data makes it a `PreparedSpec`
(launch/run/prepare.py). Both are frozen: a step that finds something out returns a new one.
"""

from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf.errors import OmegaConfBaseException

from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import PrecisionSettings, TokenizerChoice
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.utf8 import check_values
from launch.config import groups, literal_text, size_defaults
from launch.config.schema import ModelKeys, RunConfig, value_of

Kind = TypeVar("Kind", bound="RunConfig | RunSpec")


@dataclass(frozen=True)
class Machine:
    """Device, precision and batch split of a run, chosen once for the machine it starts on.

    Attributes:
        devices: on each machine.
        accumulate: micro-batches of one optimizer step on each rank.
        largest_micro_batch: sequences that fit into a device at once, in validation too.
    """

    accelerator: str
    devices: int
    num_nodes: int
    precision: PrecisionSettings
    strategy: str
    checkpoint_format: str
    shard_teacher: bool
    threads: int
    largest_micro_batch: int = 0
    micro_batch: int = 0
    accumulate: int = 0

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Paths and sizes behind the keys that name models and tokenizers.

    Attributes:
        model: sizes; those of init under model=auto.
        model_name: name of the model in reports.
        init: scratch, teacher_layers, or the folder of the weights.
        teacher: folder of the teacher; "" where the task has none.
        teacher_hash: sha256 of its weights.
        teacher_layers: init=teacher_layers: what the student takes over of its teacher.
    """

    model: ModelKeys
    model_name: str
    init: str
    tokenizer: TokenizerChoice
    teacher: str = ""
    teacher_hash: str = ""
    teacher_layers: dict[str, Any] = field(default_factory=dict)

    @property
    def init_names_weights(self) -> bool:
        """Whether weights are loaded from the folder `init`."""
        return self.init not in ("scratch", TEACHER_LAYERS)


@dataclass(frozen=True, kw_only=True)
class Resolved(Inputs):
    """Everything the program works out for keys that are left open."""

    machine: Machine


@dataclass(frozen=True)
class Prepared:
    """Facts that are known once the data are prepared.

    Attributes:
        data_hash: content hash of the prepared data.
        vocab_size: of the model.
        compile: whether the model is compiled.
        compile_head: whether the work on the logits of the LM head is compiled, and on a CPU the GELU of the blocks.
        baseline_loss: val/loss of the baseline, read when the run started.
        planned_memory: bytes of the process without a model, and at the peak.
        teacher_text: folder with the text that the teacher generated, where students train on that.
        teacher_cache: folder with the stored distributions of the teacher.
        teacher_seconds: time this run spent on letting the teacher generate or fill its cache, once for all students.
        seconds: time that the preparation took when the run was started or last resumed.
    """

    data_hash: str
    vocab_size: int
    compile: bool
    compile_head: bool
    baseline_loss: float | None = None
    planned_memory: dict[str, int] = field(default_factory=dict)
    teacher_text: str = ""
    teacher_cache: str = ""
    teacher_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunSpec:
    """A run whose configuration has no `auto` left."""

    config: RunConfig
    resolved: Resolved

    @property
    def machine(self) -> Machine:
        """Device, precision and batch split."""
        return self.resolved.machine


@dataclass(frozen=True)
class PreparedSpec(RunSpec):
    """A run whose data are prepared: all that its processes need to train."""

    prepared: Prepared


def save(spec: PreparedSpec, file: Path) -> None:
    """Write the specification as YAML; `load` reads it back."""
    write_text(file, to_yaml(spec))


def to_yaml(value: RunConfig | RunSpec) -> str:
    """Return a configuration or specification as YAML, permissions excepted; `from_yaml` reads it back."""
    return literal_text.to_yaml(as_dict(value))


def as_dict(value: RunConfig | RunSpec) -> dict[str, Any]:
    """Return a configuration or specification as plain values, without permissions."""
    values = asdict(value)
    del values.get("config", values)["allow_targets"]
    if isinstance(value, RunSpec):
        values["config"]["invocation"]["hydra"] = ""  # which the run directory has in a separate file
    return values


def save_for_hydra(config: RunConfig, folder: Path) -> None:
    """Write the files that Hydra's tools read: config.yaml, overrides.yaml and hydra.yaml."""
    folder.mkdir(exist_ok=True)
    composed = {name: value for name, value in asdict(config).items() if name not in ("invocation", "allow_targets")}
    write_text(folder / "config.yaml", literal_text.to_yaml(literal_text.escape_interpolations(composed)))
    write_text(folder / "overrides.yaml", literal_text.to_yaml(config.invocation.overrides))
    write_text(folder / "hydra.yaml", config.invocation.hydra)


def load(file: Path) -> PreparedSpec:
    """Read what `save` wrote.

    Raises:
        InputError: missing, unreadable, or of another shape.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the configuration {file}: {error}") from error
    return from_yaml(PreparedSpec, text, str(file))


def from_yaml(kind: type[Kind], text: str, where: str) -> Kind:
    """Read what `to_yaml` made. Its values are literal: nothing in them is interpolated, and none is a permission.

    Raises:
        InputError: unreadable, or of another shape.
    """
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise TypeError(f"it holds {type(values).__name__}, not keys and values")
        if kind is PreparedSpec and "config" not in values:
            raise TypeError("it has another layout, without the parts config, resolved and prepared")
        config = values.get("config", values)
        config["allow_targets"] = []
        add_new_keys(config)
        spec = literal_text.to_dataclass(kind, values)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"Cannot read the configuration {where}: {str(error).splitlines()[0]}") from error
    assert isinstance(spec, kind)
    check_values(values)
    read = spec.config if isinstance(spec, RunSpec) else spec
    _check_groups(read, where)
    _check_sizes(read, where)
    return spec


def add_new_keys(config: dict[str, Any]) -> None:
    """Add keys and groups that the program which wrote the file did not have, with their defaults."""
    kinds = get_type_hints(RunConfig)
    for name, default in groups.plain_defaults().items():
        if name not in size_defaults.TYPES:
            config.setdefault(name, default)
    for name, value in groups.default_values().items():
        if is_dataclass(kinds.get(name)) and name not in config:
            config[name] = {key.partition(".")[2]: default for key, default in groups.keys_set_by(name, value).items()}
            if isinstance(invocation := config.get("invocation"), dict):
                invocation.setdefault("groups", {}).setdefault(name, value)


def _check_groups(config: RunConfig, where: str) -> None:
    """Check that the value of every group is named, which decides what reads a key.

    Raises:
        InputError: one is not.
    """
    lacking = [name for name in groups.default_values() if name not in config.groups]
    if lacking:
        raise InputError(
            f"Cannot read the configuration {where}: invocation.groups lacks {', '.join(lacking)}.\n"
            "Put back the file as the run wrote it, or start a run from its weights: init=RUN"
        )


def _check_sizes(config: RunConfig, where: str) -> None:
    """Check the types of the keys that OmegaConf leaves to the size of the model.

    Raises:
        InputError: a value has the wrong type.
    """
    try:
        for name in size_defaults.TYPES:
            size_defaults.check_type(name, value_of(config, name))
    except InputError as error:
        raise InputError(f"Cannot read the configuration {where}: {error}") from error
