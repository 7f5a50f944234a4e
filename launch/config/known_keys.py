"""Known keys: every key with its meaning, those of this project's own `_target_` nodes included.

A node's keys are declared here, beside `RunConfig`, so that a misspelt one is refused before its class, and with it
Lightning and PyTorch, is imported.
"""

import difflib
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import formatannotation
from typing import Any, cast, get_type_hints

from gpt2lab.errors import InputError
from gpt2lab.keys import METADATA, Key, key, keys_of
from gpt2lab.settings import TEXT_METRICS, LoraSettings, TextMetricSettings
from launch.config.allowed_values import format_allowed
from launch.config.did_you_mean import elsewhere, nearest, parts
from launch.config.groups import groups, keys_set_by, values
from launch.config.help_lines import format_value
from launch.config.schema import RunConfig


@dataclass(frozen=True)
class NoKeys:
    """A node without keys."""


@dataclass(frozen=True)
class FineTuneKeys:
    """Keys of task=finetune."""

    lora: LoraSettings = key("low-rank adapters (LoRA)")
    frozen_layers: int = key(
        "number of first blocks that are frozen with the embeddings; at most all but the last",
        within="[0, 1e4]",
        read_by="no lora",
    )
    text: TextMetricSettings = key("metrics on text generated from validation prompts")


@dataclass(frozen=True)
class HubKeys:
    """A data set of the Hub, or a local folder that the `datasets` library reads."""

    kind: str = key("text: a batch counts tokens; pairs: a batch counts sequences", choices=("text", "pairs"))
    name: str = key("name of the data in reports and cache folders")
    dataset: str = key("Hub id, or local folder that the `datasets` library can load", "", free_text=True)
    config: str = key("configuration (subset) of the data set", "")
    revision: str = key("branch or commit; empty: the latest at the first preparation", "")
    split: str = key("name of the training split", "train")
    val_split: str = key("name of the validation split; empty: a part of the training split, by hash", "")
    languages: list[str] = key("languages of the text, for the model card: ISO 639 codes, or code", factory=list)
    default_tokenizer: str | None = key("tokenizer of tokenizer=auto without teacher and init: bpe, or a Hub id", None)


@dataclass(frozen=True)
class RunningTextKeys(HubKeys):
    """Keys of data sets of running text."""

    source: str = key("source of the text", "text", choices=("stdlib", "packages", "text", "hub", "bin"))
    text_column: str = key("column with the text, for Hub data sets and .jsonl and .parquet files", "text")
    streaming: bool = key("stream the data set instead of downloading it first", False)


@dataclass(frozen=True, kw_only=True)
class PairKeys(HubKeys):
    """Keys of data sets of pairs."""

    prompt: str = key("template of the prompt, with {source} for the source column", free_text=True)
    response: str = key("template of the response, with {target} for the target column", free_text=True)
    metrics: list[str] = key(
        "metrics of generated text, the first is watched; task.text.metrics replaces them", choices=TEXT_METRICS
    )
    reader: str = key(
        "source of the pairs: tables, Python functions or gettext catalogues",
        "tables",
        choices=("tables", "functions", "catalogues"),
    )
    language: str = key("target language of the catalogues, such as de", "")


@dataclass(frozen=True)
class ThroughputKeys:
    """Keys of callbacks.throughput."""

    cache_dir: str | None = key("folder that stores the measured peak of a CPU; null: the default", None)


@dataclass(frozen=True)
class InterruptKeys:
    """Keys of callbacks.interrupt."""

    rank_timeout: int = key("seconds without progress after which a rank is late", 1800, within="[5, 1e6]")


@dataclass(frozen=True)
class HealthKeys:
    """Keys of callbacks.health."""

    on_spike: str = key("action for a spike of the training loss", "warn", choices=("warn", "stop"))


@dataclass(frozen=True)
class SamplesKeys:
    """Keys of callbacks.samples."""

    every: int = key("steps between samples", within="[1, inf)")
    prompts: list[str] = key("prompts; empty: beginnings of functions (Python source) or of validation texts")
    max_new_tokens: int = key("maximum number of generated tokens per sample", within="[1, inf)")


@dataclass(frozen=True)
class InspectKeys:
    """Keys of callbacks.inspect."""

    texts: list[str] = key("texts with a page each; empty: the beginning of the validation text")
    tokens: int = key("number of tokens read from the beginning of a text", 64, within="[2, inf)")
    projector: bool = key("export the token embeddings for the TensorBoard projector", True)


@dataclass(frozen=True)
class ProfileKeys:
    """Keys of callbacks.profile."""

    steps: str | None = key("START:COUNT, the steps to profile; null: none", None, free_text=True)


@dataclass(frozen=True)
class BenchmarkKeys:
    """Keys of callbacks.benchmarks."""

    every: int = key("steps between benchmarks", within="[1, inf)")
    tasks: list[str] = key("tasks or groups of tasks of lm-evaluation-harness")
    limit: int = key("maximum number of examples per task; 0: all", within="[0, inf)")
    path: str = key("folder with your own task files; empty: none", "", free_text=True)
    batch_size: int = key("examples per forward pass of a benchmark", 16, within="[1, inf)")


@dataclass(frozen=True)
class CheckpointKeys:
    """Keys of callbacks.checkpoint."""

    every: int = key("steps between checkpoints", within="[1, inf)")
    keep_last: int = key("number of most recent checkpoints that are kept", 2, within="[1, inf)")
    verify_export: bool = key("load hf/ in a new process at the end and compare logits (about 5 seconds)", True)


@dataclass(frozen=True)
class FinalScoreKeys:
    """Keys of callbacks.final_score."""

    tokens: int | str = key(
        "most tokens of the score after training; auto: a quarter of those trained on, at most 10,000,000",
        within="[1, inf)",
        word="auto",
    )


@dataclass(frozen=True)
class LoggerKeys:
    """Keys of every logger."""

    run_dir: str | None = key("run directory", None)


@dataclass(frozen=True)
class WandbKeys(LoggerKeys):
    """Keys of logger=wandb."""

    group: str = key("group of the W&B run; by default the name of the sweep or study", "")
    project: str = key("W&B project", "gpt2-lab")
    entity: str = key("W&B user or team that owns the project; empty: that of the login", "")
    tags: list[str] = key("tags of the W&B run, in addition to its task, model, data and loss", factory=list)
    notes: str = key("notes on the W&B run", "", free_text=True)
    job_type: str = key("kind of the W&B run; empty: its task", "")
    log_model: str = key("model logged as an artifact when the run is finished: hf/", "none", choices=("none", "final"))
    mode: str = key(
        "W&B mode; auto: online if logged in, else offline; WANDB_MODE and WANDB_DISABLED take precedence",
        "auto",
        choices=("auto", "online", "offline", "disabled"),
    )


@dataclass(frozen=True)
class TrainerKeys:
    """Arguments of lightning.Trainer for the user to set."""

    max_time: str | None = key(
        "DD:HH:MM:SS after which the run saves and stops; earlier parts of a resumed run count", None, on_resume=True
    )
    fast_dev_run: bool | int = key(
        "true or N: run one or N training and validation batches, to try a configuration", False
    )
    limit_train_batches: int | float | None = key(
        "micro-batches of an epoch, a multiple of those of a step; null: an epoch never ends", None
    )
    limit_val_batches: int | float | None = key(
        "batches per validation: a number, or a share such as 0.5; null: all", None
    )
    overfit_batches: int | float = key("train on the same first micro-batches, a multiple of a step's; 0: off", 0.0)
    deterministic: bool | str | None = key(
        "true: bitwise repeatable, by deterministic algorithms only; warn: others where there is none",
        None,
        choices=("true", "false", "warn"),
    )
    benchmark: bool | None = key("cuDNN benchmark: search for the fastest algorithm", None)
    profiler: str | None = key("Lightning profiler", None, choices=("simple", "advanced", "pytorch"))
    detect_anomaly: bool = key("autograd anomaly detection: find the operation behind a NaN gradient", False)


# Arguments of lightning.Trainer that this project sets, with the key to use instead
TRAINER_ARGUMENTS = {
    "accelerator": "accelerator",
    "strategy": "strategy",
    "devices": "devices",
    "num_nodes": "num_nodes",
    "precision": "precision",
    "logger": "logger",
    "callbacks": "callbacks.NAME._target_",
    "max_epochs": "epochs",
    "min_epochs": "epochs",
    "max_steps": "steps",
    "min_steps": "steps",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "log_every_n_steps": "log_every",
    "enable_checkpointing": "checkpoint_every",
    "enable_progress_bar": "callbacks.progress",
    "accumulate_grad_batches": "micro_batch",
    "gradient_clip_val": "gradient_clip",
    "gradient_clip_algorithm": "gradient_clip",
    "default_root_dir": "run_dir",
}


# Place in the configuration → class that is built there → its keys
PLACES: dict[str, dict[str, type]] = {
    "task": {
        "lightning_modules.pretrain.Pretrain": NoKeys,
        "lightning_modules.distill.Distill": NoKeys,
        "lightning_modules.finetune.FineTune": FineTuneKeys,
    },
    "data": {
        "datamodules.language_modeling.LanguageModelingData": RunningTextKeys,
        "datamodules.pairs.PairData": PairKeys,
    },
    "callbacks.throughput": {"callbacks.throughput.Throughput": ThroughputKeys},
    "callbacks.interrupt": {"callbacks.interrupt.Interrupt": InterruptKeys},
    "callbacks.health": {"callbacks.health.Health": HealthKeys},
    "callbacks.progress": {"callbacks.progress.ProgressBar": NoKeys},
    "callbacks.samples": {"callbacks.samples.Samples": SamplesKeys},
    "callbacks.final_validation": {"callbacks.final_validation.FinalValidation": NoKeys},
    "callbacks.layer_stats": {"callbacks.layer_stats.LayerStats": NoKeys},
    "callbacks.profile": {"callbacks.profile.Profile": ProfileKeys},
    "callbacks.inspect": {"callbacks.inspection.Inspect": InspectKeys},
    "callbacks.benchmarks": {"callbacks.benchmarks.Benchmarks": BenchmarkKeys},
    "callbacks.checkpoint": {"callbacks.checkpoint.Checkpoint": CheckpointKeys},
    "callbacks.final_score": {"callbacks.final_score.FinalScore": FinalScoreKeys},
    "callbacks.report": {"callbacks.report.Report": NoKeys},
    "logger": {
        "callbacks.loggers.metrics_csv.MetricsCsv": NoKeys,
        "callbacks.loggers.tensorboard.TensorBoard": LoggerKeys,
        "callbacks.loggers.wandb.WeightsAndBiases": WandbKeys,
    },
    "trainer": {"lightning.Trainer": TrainerKeys},
}
NODES = {target: kind for kinds in PLACES.values() for target, kind in kinds.items()}
# The one group without keys of its own
EXPERIMENT = Key("recipe: values of many groups and keys at once, which the command line overrides")


SURELY_MISSPELT = 0.85  # similarity to a key beside it from which that is meant, not a key elsewhere with this name
# Type of a key → classes of its value, and of a list's items
KINDS: dict[Any, tuple[tuple[type, ...], type]] = {
    int: ((int,), object),
    float: ((int, float), object),
    str: ((str,), object),
    bool: ((bool,), object),
    str | None: ((str, type(None)), object),
    bool | None: ((bool, type(None)), object),
    bool | int: ((bool, int), object),
    int | str: ((int, str), object),
    int | float: ((int, float), object),
    int | float | None: ((int, float, type(None)), object),
    list[str]: ((list,), str),
}


@cache
def known_keys() -> dict[str, Key]:
    """Return dotted name → meaning of every key."""
    found = {**dict(keys_of(RunConfig)), "experiment": EXPERIMENT}
    for place, kinds in PLACES.items():
        for kind in kinds.values():
            found |= dict(keys_of(kind, f"{place}."))
    return found


def check_nodes(nodes: dict[str, Any]) -> None:
    """Check names and types of the keys of this project's own classes; others check theirs when they are built.

    Args:
        nodes: `_target_` and keys of each object, by its place in the configuration.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    for place, node in nodes.items():
        if not isinstance(node, dict) and elsewhere(place):
            raise unknown_key(place, [])
        if not isinstance(node, dict) or "_target_" not in node:
            what = "is no callback" if place.startswith("callbacks.") else "has no _target_, the class to build"
            raise InputError(f"{place}={node} {what}.\nGive its keys, {place}.KEY=VALUE, or null to leave it out.")
        for name in node if place == "trainer" else ():
            if refusal := owned_trainer_argument(f"trainer.{name}"):
                raise InputError(refusal)
        kind = NODES.get(str(node["_target_"]))
        if kind is not None:
            typed_settings(kind, {name: value for name, value in node.items() if name != "_target_"}, place)


def owned_trainer_argument(name: str) -> str:
    """Return why a key `trainer.…` is refused, where it is an argument that this project sets itself; else nothing."""
    instead = TRAINER_ARGUMENTS.get(name.removeprefix("trainer.")) if name.startswith("trainer.") else None
    return f"{name} is set by this project.\nUse the key {instead} instead." if instead else ""


def unknown_key(given: str, siblings: list[str]) -> InputError:
    """Return the error for a key that does not exist, with the most similar of its siblings and of all other keys.

    Args:
        siblings: existing keys beside it.
    """
    prefix, _, ending = given.rpartition(".")
    if owners := _values_with(given):
        return InputError(f"There is no key {given} here.\nIt is read with {' or '.join(owners)}.")
    meant = elsewhere(given)
    by_ending = {key.rpartition(".")[2]: key for key in siblings}
    sibling = by_ending.get(next(iter(difflib.get_close_matches(ending, by_ending, n=1)), ""), "")
    same = next((key for key in known_keys() if key.rpartition(".")[2] == ending), "")
    is_misspelt = difflib.SequenceMatcher(None, ending, sibling.rpartition(".")[2]).ratio() > SURELY_MISSPELT
    near = meant or (sibling if is_misspelt else "") or same or sibling
    suggestion = "" if prefix else nearest(given, known_keys())
    lines = [f"There is no key {given}{f' (did you mean {near}?)' if near else suggestion}."]
    if meant:
        lines += [f"{key}: {known_keys()[key].text}." for key in parts(meant)]
    elif prefix and siblings:
        lines.append(f"Allowed: {', '.join(siblings)}.")
    elif not near and not suggestion:
        lines.append("All keys: python train.py --cfg job. All groups: python train.py --help.")
    return InputError("\n".join(lines))


def _values_with(given: str) -> list[str]:
    """Return the values of a key's group that have it, or keys within it."""
    group = given.split(".")[0]
    names = {value: keys_set_by(group, value) for value in values(group)} if group in groups() else {}
    return [
        f"{group}={value}" for value, keys in names.items() if any(f"{key}.".startswith(f"{given}.") for key in keys)
    ]


def typed_settings(kind: type, values: Any, place: str) -> Any:
    """Return a settings dataclass made of a dictionary of the configuration.

    Raises:
        InputError: no dictionary, an unknown or missing key, or a value of the wrong type.
    """
    items = {item.name: item for item in fields(kind)}
    if not isinstance(values, dict):
        raise InputError(f"{place}={values}: give its keys, {', '.join(f'{place}.{name}' for name in items)}.")
    for name in values:
        if name not in items:
            raise unknown_key(f"{place}.{name}", [f"{place}.{one}" for one in items])
    required = [name for name, item in items.items() if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise InputError(f"{place} lacks {', '.join(missing)}.")
    hints = get_type_hints(kind)
    meanings = {name: items[name].metadata.get(METADATA) for name in values}
    return kind(
        **{name: _typed(hints[name], meanings[name], value, f"{place}.{name}") for name, value in values.items()}
    )


def _typed(hint: Any, meaning: Key | None, value: Any, place: str) -> Any:
    if is_dataclass(hint):
        return typed_settings(cast(type, hint), value, place)
    allowed, item = KINDS.get(hint, ((object,), object))
    fits = isinstance(value, allowed) and not (isinstance(value, bool) and not {bool, object} & {*allowed})
    if not fits or (isinstance(value, list) and not all(isinstance(one, item) for one in value)):
        choice = format_allowed(meaning) if meaning else ""
        message = f"{place}={format_value(value)} is not of type {formatannotation(hint)}."
        raise InputError(f"{message}\nAllowed: {choice}." if choice else message)
    return value
