"""Build: makes the objects of a run (data, module, callbacks, loggers, Trainer) of its specification."""

import hashlib
import inspect
from dataclasses import is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, Strategy

from callbacks.best import Best
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_io import StreamingCheckpointIO
from callbacks.final_score import FinalScore
from callbacks.loggers.metrics_csv import MetricsCsv
from callbacks.loggers.protocols import TakesLabels
from callbacks.pruning import Pruning, TrialReports
from callbacks.report import Report
from callbacks.same_settings import SameSettings
from callbacks.throughput import PREPARE, Throughput
from datamodules.micro_batches import SampleDataModule
from gpt2lab.analysis.optuna_storage import STUDY_FILE
from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import CrossEntropySettings, DataFacts, TrainingSettings
from gpt2lab.storage.prepared_cache import cache_folder
from gpt2lab.system.heartbeat import GRACE_SECONDS
from launch.config.known_keys import typed_settings
from launch.config.run_spec import PreparedSpec, RunSpec, to_yaml
from launch.config.schema import RunConfig, with_references
from launch.config.targets import OWN_PACKAGES, call, check_arguments, instantiate, target_class
from launch.config.unused_keys import given_keys
from launch.rank_environment import is_main_process, is_rank
from launch.run import memory_limit
from launch.run.card_facts import card_facts, report_facts
from launch.run.labels import run_labels, searchable_values
from launch.run.run_uses import run_uses
from lightning_modules.plugins.bf16_weights import Bf16Weights
from lightning_modules.plugins.fsdp_strategy import ShardedStrategy

METRICS_CSV = "callbacks.loggers.metrics_csv.MetricsCsv"
NO_STATE = lightning.Callback.state_dict
READ_BEFORE_IT_IS_BUILT = ("kind", "default_tokenizer", "languages")  # keys of conf/data/*.yaml
PROFILERS: dict[Any, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
BLOCKS_OF_A_PASS = 12  # compiled as one graph, which takes some three seconds for each; larger models need it less


def typed_object(node: dict[str, Any], where: str, supplied: dict[str, Any], permissions: list[str]) -> Any:
    """Build task or data: a class takes its own keys, and those of `supplied` that it has arguments for.

    A dictionary given for an argument that is a settings dataclass becomes that dataclass, typed.

    Args:
        permissions: the configuration's `allow_targets`.

    Raises:
        InputError: no such class or not a permitted one, unknown or missing keys, values of the wrong type.
    """
    kind, target = target_class(node, where, permissions), node["_target_"]
    own = {key: value for key, value in node.items() if key != "_target_"}
    check_arguments(kind, own, where, target, permissions)
    parameters, hints = inspect.signature(kind).parameters, _hints(kind)
    arguments = {key: value for key, value in supplied.items() if key in parameters} | own
    for key, value in own.items():
        hint = hints.get(key)
        if isinstance(value, dict) and isinstance(hint, type) and is_dataclass(hint):
            arguments[key] = typed_settings(hint, value, f"{where}.{key}")
    return call(kind, arguments, where, target)


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a constructor's arguments; empty where they cannot be read."""
    try:
        return get_type_hints(kind.__init__)
    except NameError:  # an annotation that only type checkers can read
        return {}


def data_module(spec: RunSpec) -> Any:
    """Return the data module; its `prepare()` is not called yet."""
    config, machine = spec.config, spec.machine
    supplied = {
        "name": config.groups["data"],
        "tokenizer": spec.resolved.tokenizer,
        "context": config.context,
        "batch_sequences": config.global_batch_rows,
        "eval_batch_sequences": memory_limit.validation_batch(spec),
        "accumulate": machine.accumulate,
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
        "validate_tokens": config.most_validated,
    }
    node = {key: value for key, value in config.data.items() if key not in READ_BEFORE_IT_IS_BUILT}
    # A preset names its own columns and files; a key given on the command line goes before them.
    for key in set(given_keys(config.invocation.overrides)) & supplied.keys() & node.keys():
        del node[key]
    module = typed_object(node, "data", supplied, config.allow_targets)
    kind = config.data.get("kind")
    if isinstance(module, SampleDataModule) and module.kind != kind:
        raise InputError(f"data.kind={kind}: {node['_target_']} has kind {module.kind}.\nGive data.kind={module.kind}.")
    return module


def training_settings(spec: PreparedSpec, facts: DataFacts, is_resumed: bool) -> TrainingSettings:
    """Return the settings that every task's module takes."""
    config, inputs = spec.config, spec.resolved
    return TrainingSettings(
        shape=inputs.model.shape(spec.prepared.vocab_size),
        tokenizer_folder=facts.tokenizer_folder,
        # A resumed run has its weights from its checkpoint, not from the teacher again.
        init="scratch" if is_resumed and inputs.init == TEACHER_LAYERS else inputs.init,
        optimizer=config.optimizer,
        schedule=config.schedule,
        steps=config.steps,
        seed=config.seed,
        val_tokens=facts.val_tokens,
        val_bytes=facts.val_bytes,
        gradient_clip=config.gradient_clip,
        compiled=compiled_part(spec),
        compile_head=spec.prepared.compile_head,
        activation_checkpointing=config.activation_checkpointing,
        ema=config.ema,
        layer_drop=config.layer_drop,
        log_every=config.log_every,
        cross_entropy=CrossEntropySettings(config.label_smoothing, config.z_loss),
        objective=config.objective,
        sampling=config.sampling,
        teacher_dtype=spec.machine.precision.teacher or "float32",
        pair_template=config.pair_template,
    )


def compiled_part(spec: PreparedSpec) -> Literal["nothing", "blocks", "pass"]:
    """Return the part of the model that is compiled.

    Blocks are compiled one by one where they are gathered, recomputed or skipped one by one; also where compiling the
    whole pass would take too long: for micro-batches of several shapes, and with many blocks.
    """
    config, machine = spec.config, spec.machine
    if not spec.prepared.compile:
        return "nothing"
    apart = machine.strategy == "fsdp" or config.activation_checkpointing or config.layer_drop > 0
    is_uneven = config.global_batch_rows % (machine.accumulate * machine.world_size) > 0
    shapes_vary = config.takes_pairs or config.sequences.on_policy or is_uneven
    many = (spec.resolved.model.n_layer or 0) > BLOCKS_OF_A_PASS
    return "blocks" if apart or shapes_vary or many else "pass"


def task_module(spec: PreparedSpec, facts: DataFacts, is_resumed: bool) -> Any:
    """Return the task's LightningModule; metrics of generated text default to those of the data preset."""
    config, prepared = spec.config, spec.prepared
    node = dict(config.task)
    metrics = config.data.get("metrics")
    if metrics and isinstance(node.get("text"), dict) and not node["text"].get("metrics"):
        node["text"] = {**node["text"], "metrics": metrics}
    supplied = {
        "training": training_settings(spec, facts, is_resumed),
        "teacher": spec.resolved.teacher,
        "loss": config.loss,
        # A resumed run passed it when it started. Where weights are sharded its checkpoint is loaded after the
        # preflight, whose forward pass would leave them gathered.
        "preflight": "off" if is_resumed else config.preflight,
        "cache": prepared.teacher_cache,
        "cached": config.teacher_cache,
        "baseline_loss": prepared.baseline_loss,
        "sequences": config.sequences,
        "context": config.context,
        "shard_teacher": spec.machine.shard_teacher,
    }
    return typed_object(node, "task", supplied, config.allow_targets)


def callbacks(spec: PreparedSpec, folder: Path, facts: DataFacts) -> list[lightning.Callback]:
    """Return the callbacks: those of the configuration, in its order, and those of the launcher."""
    config = _in_folder(spec, folder)
    nodes = {f"callbacks.{name}": node for name, node in config.callbacks.items() if node is not None}
    callbacks = [instantiate(node, where, config.allow_targets, folder) for where, node in nodes.items()]
    best = Best(config.early_stop_patience, exports_best=config.export == "best", data_hash=facts.hash)
    callbacks = _states_first(_with_best(callbacks, best))
    known = report_facts(spec, facts)
    card = card_facts(spec, known)
    if is_main_process():  # the teacher may be missing on the other machines of a run
        known["uses"] = run_uses(spec, folder)
    for callback in callbacks:
        if isinstance(callback, Report):
            callback.facts, callback.card = known, card
        if isinstance(callback, Checkpoint):
            callback.card = card
        if isinstance(callback, FinalScore) and callback.is_auto:
            callback.tokens = config.auto_scored
        if isinstance(callback, Throughput):
            callback.seconds[PREPARE] = spec.prepared.seconds
    callbacks.append(SameSettings(hashlib.sha256(to_yaml(spec).encode()).hexdigest()[:16]))
    if config.invocation.trial is None:
        return callbacks
    reports = TrialReports(folder.parent / STUDY_FILE, config.invocation.trial)
    # Last: the checkpoint of a step that is due is saved as always, and none because the run is ended.
    return [reports, *callbacks, Pruning(reports)]


def _in_folder(spec: PreparedSpec, folder: Path) -> RunConfig:
    """Return the configuration with the run directory, and with every argument that follows a key at its value."""
    return with_references(replace(spec.config, run_dir=str(folder)))


def _states_first(callbacks: list[lightning.Callback]) -> list[lightning.Callback]:
    """Move added callbacks that have a state (EarlyStopping) before Checkpoint, which then saves their newest one."""
    place = next((number for number, one in enumerate(callbacks) if isinstance(one, Checkpoint)), len(callbacks))
    moved = [one for one in callbacks[place:] if _is_foreign(one) and type(one).state_dict is not NO_STATE]
    return [*callbacks[:place], *moved, *(one for one in callbacks[place:] if one not in moved)]


def _with_best(callbacks: list[lightning.Callback], best: Best) -> list[lightning.Callback]:
    """Insert Best before Checkpoint, which saves its state and exports the best weights."""
    place = next((number for number, one in enumerate(callbacks) if isinstance(one, Checkpoint)), len(callbacks))
    return [*callbacks[:place], best, *callbacks[place:]]


def _is_foreign(callback: lightning.Callback) -> bool:
    return type(callback).__module__.split(".")[0] not in OWN_PACKAGES


def loggers(spec: PreparedSpec, folder: Path, completed: int = 0) -> list[Logger]:
    """Return the loggers, with the whole specification as hyper-parameters.

    W&B is the first, for `trainer.logger.experiment` of callbacks of other projects; then that of metrics.csv.

    Args:
        completed: steps of the checkpoint that the run is resumed from.
    """
    config = _in_folder(spec, folder)
    nodes = {where: node for where, node in config.logger_nodes.items() if node["_target_"] != METRICS_CSV}
    chosen = [instantiate(node, where, config.allow_targets, folder) for where, node in nodes.items()]
    labelled = [logger for logger in chosen if isinstance(logger, TakesLabels)]
    for logger in labelled:
        logger.set_labels(run_labels(spec, folder, completed))
    chosen = [*labelled, MetricsCsv(str(folder)), *(logger for logger in chosen if logger not in labelled)]
    for logger in chosen:
        logger.log_hyperparams(searchable_values(spec))
    return chosen


def trainer(
    spec: PreparedSpec, folder: Path, callbacks: list[lightning.Callback], loggers: list[Logger]
) -> lightning.Trainer:
    """Return Lightning's Trainer with everything of its own that would compete with ours turned off.

    The module clips gradients itself and our callbacks write checkpoints, samples and progress.
    """
    config, machine = _in_folder(spec, folder), spec.machine
    # Named, for Lightning would take a machine with SLURM on it for its own to requeue.
    plugins: list[Any] = [TorchElasticEnvironment() if is_rank() else LightningEnvironment()]
    precision: Any = machine.precision.lightning
    if machine.precision.is_bf16_true:  # a plugin of ours instead of Lightning's
        plugins.append(Bf16Weights())
        precision = None
    given = {name: value for name, value in config.trainer.items() if value is not None}
    arguments = {
        "accelerator": machine.accelerator,
        "devices": machine.devices,
        "num_nodes": machine.num_nodes,
        "plugins": plugins,
        "strategy": strategy(spec),
        "precision": precision,
        "max_steps": config.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": machine.accumulate,
        "val_check_interval": config.validate_every * machine.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": config.log_every,
        "callbacks": callbacks,
        "logger": loggers,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        "enable_checkpointing": any(isinstance(one, LightningCheckpoint) for one in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "inference_mode": False,  # averaged weights are swapped in while validating, which inference tensors forbid
    }
    _check_batch_limits(given, machine.accumulate)
    if given.get("fast_dev_run"):  # Lightning counts micro-batches, and would end within a step
        given["fast_dev_run"] = int(given["fast_dev_run"]) * machine.accumulate
    if given.get("profiler") in PROFILERS:
        arguments["profiler"] = PROFILERS[given.pop("profiler")](dirpath=folder, filename="profile")  # fit-profile.txt
    made = instantiate(given, "trainer", config.allow_targets, folder, arguments)
    made.strategy.checkpoint_io = StreamingCheckpointIO(folder)
    made.fit_loop.epoch_loop.max_steps = config.steps  # Lightning's fast_dev_run has set it to micro-batches
    return made


def _check_batch_limits(given: dict[str, Any], accumulate: int) -> None:
    """Check that Lightning's epochs, which these keys end, end between two steps.

    Raises:
        InputError: a share of the endless stream of training batches, or a number that ends within a step.
    """
    for key in ("limit_train_batches", "overfit_batches"):
        value = given.get(key) or 0
        if isinstance(value, float) and value != (1.0 if key == "limit_train_batches" else 0.0):
            raise InputError(
                f"trainer.{key}={value}: the training batches are an endless stream, which has no share.\n"
                f"Give a number of batches: trainer.{key}={accumulate}"
            )
        if value % accumulate:
            raise InputError(
                f"trainer.{key}={value} ends within a step of {accumulate} micro-batches (micro_batch).\n"
                f"Give a multiple of {accumulate}."
            )


def strategy(spec: PreparedSpec) -> Strategy | str:
    """Return Lightning's strategy; FSDP2 also runs on CPU ranks, over gloo."""
    config, machine, settings = spec.config, spec.machine, spec.config.strategy
    backend = "gloo" if machine.accelerator == "cpu" else "cpu:gloo,cuda:nccl" if settings.offload else None
    timeout = timedelta(seconds=config.rank_timeout + GRACE_SECONDS)
    if machine.strategy == "ddp":
        find, is_deterministic = str(settings.find_unused_parameters).lower(), config.trainer.get("deterministic")
        # A block that is skipped; and without it DDP rearranges its buckets after the first step of every start, which
        # changes the order in which three ranks or more are summed.
        finds = config.layer_drop > 0 or bool(is_deterministic) if find == "auto" else find == "true"
        return DDPStrategy(
            process_group_backend=backend,
            bucket_cap_mb=settings.bucket_cap_mb,
            gradient_as_bucket_view=settings.gradient_as_bucket_view,
            find_unused_parameters=finds,
            timeout=timeout,
        )
    if machine.strategy == "fsdp":
        saves_shards = machine.checkpoint_format == "sharded"
        return ShardedStrategy(machine.world_size, backend, timeout, saves_shards, settings.offload)
    return "auto"
