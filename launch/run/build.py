"""Build: from a Config to the objects of a run — data, module, callbacks, loggers, Trainer."""

import hashlib
import inspect
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.loggers.metrics_csv import MetricsCsv
from callbacks.pruning import Pruning, TrialReports
from callbacks.same_settings import SameSettings
from gpt2lab.analysis.optuna_storage import STUDY_FILE
from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import CrossEntropySettings, DataFacts, TrainingSettings
from gpt2lab.storage.prepared_cache import cache_folder
from gpt2lab.system.heartbeat import GRACE_SECONDS
from launch.config.did_you_mean import nearest
from launch.config.injected_arguments import DATA_ONLY_KEYS
from launch.config.schema import Config, dumped
from launch.config.target_signature import typed_settings
from launch.config.targets import OWN_PACKAGES, check_may_take_any, shown, target_class
from launch.config.unused_keys import given_keys
from launch.rank_environment import is_rank
from launch.run.auto_settings import largest_micro_batch
from lightning_modules.plugins.bf16_weights import Bf16Weights
from lightning_modules.plugins.fsdp_strategy import ShardedStrategy

BLOCKS_OF_A_PASS = 12  # compiled as one graph, which takes some three seconds for each; larger models need it less
# What Lightning calls them; bf16_true is a plugin of ours
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp8": "bf16-mixed"}


def construct(node: dict[str, Any], where: str, supplied: dict[str, Any], permissions: list[str]) -> Any:
    """Call a node's `_target_` with its own keys and with those of `supplied` that it takes and does not state.

    A dictionary given for an argument that is a settings dataclass becomes that dataclass, typed.

    Args:
        permissions: the configuration's `allow_targets`.

    Raises:
        InputError: no such class or not a permitted one, unknown or missing keys, values of the wrong type.
    """
    kind = target_class(node, where, permissions)
    target = node["_target_"]
    parameters = inspect.signature(kind).parameters
    own = {key: value for key, value in node.items() if key != "_target_"}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in own if key not in parameters]
    if unknown and takes_any:
        check_may_take_any(f"{where}.{unknown[0]}", target, permissions)
    elif unknown:
        raise InputError(f"There is no key {shown(f'{where}.{unknown[0]}')}{nearest(unknown[0], parameters)}.")
    arguments = {key: value for key, value in supplied.items() if key in parameters} | own
    is_ours = kind.__module__.split(".")[0] in OWN_PACKAGES
    if is_ours and "run_dir" in own:  # else a run from somebody else could name one of the user's
        raise InputError(f"{where}.run_dir={own['run_dir']}: this is the run's own directory.\nLeave it out.")
    hints = _hints(kind)
    for key, value in own.items():
        hint = hints.get(key)
        if isinstance(value, dict) and isinstance(hint, type) and is_dataclass(hint):
            arguments[key] = typed_settings(hint, value, f"{where}.{key}")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise InputError(f"{where} does not fit {target}: {error}.") from error
    try:
        return kind(**arguments)
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if not kind.__module__.startswith("lightning."):
            raise
        raise InputError(f"{where} does not fit {target}: {str(error).splitlines()[0]}") from error


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a constructor's arguments; empty where they cannot be read."""
    try:
        return get_type_hints(kind.__init__)
    except NameError:  # an annotation that only type checkers can read
        return {}


def data_module(config: Config) -> Any:
    """The data module; `prepare()` is still to be called."""
    supplied = {
        "name": config.record.groups["data"],
        "tokenizer": config.tokenizer,
        "context": config.context,
        "batch_sequences": config.rows_of_a_step,
        "eval_batch_sequences": largest_micro_batch(config),
        "accumulate": config.record.accumulate,
        "seed": config.seed,
        "workers": config.workers,
        "cache_dir": str(cache_folder(config.cache_dir)),
        "val_fraction": config.val_fraction,
        "val_path": config.val_path,
        "path": config.path,
        "on_bad_line": config.on_bad_line,
        "source": config.source,
        "target": config.target,
        "objective": config.objective,
        "packing": config.packing,
    }
    node = {key: value for key, value in config.data.items() if key not in DATA_ONLY_KEYS}
    # A preset names its own columns and files; what was given on the command line goes before them.
    for key in set(given_keys(config.record.overrides)) & supplied.keys() & node.keys():
        del node[key]
    return construct(node, "data", supplied, config.allow_targets)


def training_settings(config: Config, facts: DataFacts, vocab_size: int) -> TrainingSettings:
    """What every task's module is given."""
    return TrainingSettings(
        shape=config.model.shape(vocab_size),
        tokenizer_folder=facts.tokenizer_folder,
        # A continued run has its weights from its checkpoint, and need not cut them out of the teacher again.
        init="scratch" if config.resume and config.init == TEACHER_LAYERS else config.init,
        optimizer=config.optimizer,
        schedule=config.schedule,
        steps=config.steps,
        seed=config.seed,
        val_tokens=facts.val_tokens,
        val_bytes=facts.val_bytes,
        gradient_clip=config.gradient_clip,
        compiled=compiled_part(config),
        compile_head=config.record.compile_head is True,
        activation_checkpointing=config.activation_checkpointing,
        ema=config.ema,
        layer_drop=config.layer_drop,
        log_every=config.log_every,
        cross_entropy=CrossEntropySettings(config.label_smoothing, config.z_loss),
        objective=config.objective,
        fp8=config.precision == "fp8",
    )


def compiled_part(config: Config) -> Literal["nothing", "blocks", "pass"]:
    """What is compiled of the model, where something is.

    One by one the blocks that are gathered, recomputed or left out one by one; also where compiling the whole pass
    would take too long: for micro-batches of several shapes, and with many blocks.
    """
    if config.compile is not True:
        return "nothing"
    apart = config.strategy == "fsdp" or config.activation_checkpointing or config.layer_drop > 0
    is_uneven = config.rows_of_a_step % max(config.record.accumulate * config.record.world_size, 1) > 0
    shapes_vary = config.takes_pairs or config.sequences.by_student or is_uneven
    return "blocks" if apart or shapes_vary or (config.model.n_layer or 0) > BLOCKS_OF_A_PASS else "pass"


def task_module(config: Config, facts: DataFacts, vocab_size: int) -> Any:
    """The task's LightningModule. A preset of pairs may name the metrics that suit it (`metrics` in conf/data)."""
    node = dict(config.task)
    metrics = config.data.get("metrics")
    if metrics and isinstance(node.get("text"), dict) and not node["text"].get("metrics"):
        node["text"] = {**node["text"], "metrics": metrics}
    supplied = {
        "training": training_settings(config, facts, vocab_size),
        "teacher": config.teacher,
        "loss": config.loss,
        # A continued run was let in when it started. Where weights are sharded its checkpoint is loaded after the
        # preflight, whose forward would leave them gathered.
        "preflight": "off" if config.resume else config.preflight,
        "cache": config.record.teacher_cache,
        "cached": config.teacher_cache,
        "baseline_loss": config.record.baseline_loss,
        "sequences": config.sequences,
        "context": config.context,
        "shard_teacher": config.shard_teacher is True,
    }
    return construct(node, "task", supplied, config.allow_targets)


def callbacks(config: Config, folder: Path, facts: DataFacts) -> list[lightning.Callback]:
    """What observes the run, in the order of conf/callbacks."""
    report_facts = {
        "task": config.task_name,
        "model": config.record.groups["model"],
        "init": {"source": config.init, **config.record.kept},
        "data": {"name": facts.name, "hash": facts.hash, "tokens": facts.train_tokens},
        "command": config.record.command,
        "planned_memory_bytes": config.record.planned_memory.get("peak"),
    }
    supplied = {
        "run_dir": str(folder),
        "cache_dir": str(cache_folder(config.cache_dir)),
        "facts": report_facts,
        "checkpoint_every": config.checkpoint_every,
        "sample_every": config.sample_every,
        "on_spike": config.on_spike,
        "rank_timeout": config.rank_timeout + GRACE_SECONDS,
    }
    nodes = {where: node for where, node in config.target_nodes.items() if where.startswith("callbacks.")}
    observers = [construct(node, where, supplied, config.allow_targets) for where, node in nodes.items()]
    observers.append(SameSettings(hashlib.sha256(dumped(config).encode()).hexdigest()[:16]))
    if config.record.trial is None:
        return observers
    reports = TrialReports(folder.parent / STUDY_FILE, config.record.trial)
    # Last: the checkpoint of a step that is due is saved as always, and none because the run is ended.
    return [reports, *observers, Pruning(reports)]


def loggers(config: Config, folder: Path) -> list[Logger]:
    """metrics.csv always, then the chosen one. They are told the whole configuration."""
    chosen: list[Logger] = [MetricsCsv(str(folder))]
    if config.logger and config.logger["_target_"] != "callbacks.loggers.metrics_csv.MetricsCsv":
        supplied = {"run_dir": str(folder), "group": config.record.sweep}
        chosen.append(construct(config.logger, "logger", supplied, config.allow_targets))
    for logger in chosen:
        logger.log_hyperparams(asdict(config))
    return chosen


def trainer(
    config: Config, folder: Path, observers: list[lightning.Callback], outlets: list[Logger]
) -> lightning.Trainer:
    """Lightning's Trainer with everything of its own that would compete with ours turned off.

    The module clips gradients itself and our callbacks write checkpoints, samples and progress.
    """
    accumulate = config.record.accumulate
    # Named, for Lightning would take a machine with SLURM on it for its own to requeue.
    plugins: list[Any] = [TorchElasticEnvironment() if is_rank() else LightningEnvironment()]
    if config.precision == "bf16_true":
        plugins.append(Bf16Weights())
    try:
        return lightning.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            plugins=plugins,
            strategy=strategy(config),
            precision=PRECISIONS.get(config.precision),
            max_steps=config.steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            val_check_interval=config.validate_every * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=config.log_every,
            callbacks=observers,
            logger=outlets,
            default_root_dir=folder,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,  # averaged weights are swapped in while validating, which inference tensors forbid
        )
    except MisconfigurationException as error:  # a second ModelCheckpoint or progress bar, say
        raise InputError(
            f"Lightning's Trainer does not take this configuration: {str(error).splitlines()[0]}"
        ) from error


def strategy(config: Config) -> Strategy | str:
    """Lightning's strategy; FSDP2 also runs on CPU ranks, over gloo."""
    backend = "gloo" if config.accelerator == "cpu" else "cpu:gloo,cuda:nccl" if config.fsdp_offload else None
    timeout = timedelta(seconds=config.rank_timeout + GRACE_SECONDS)
    if config.strategy == "ddp":
        # A block that was left out has no gradient, which DDP must be told to expect.
        return DDPStrategy(
            process_group_backend=backend,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.layer_drop > 0,
            timeout=timeout,
        )
    if config.strategy == "fsdp":
        saves_shards = config.checkpoint_format == "sharded"
        return ShardedStrategy(config.record.world_size, backend, timeout, saves_shards, config.fsdp_offload)
    return "auto"
