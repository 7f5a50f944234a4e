"""Resume: a run continues with its own config.yaml; only keys that keep its data and its global batch may be changed.

With the same devices and micro-batches the result is the same, bit for bit. With others every step has the same data
and the same global batch, and so the same gradient, rounding aside; but dropout, LoRA dropout and layer drop sample
other masks, because a mask follows from (seed, step, rank, micro-batch).
"""

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.metric_names import VAL_LOSS
from gpt2lab.settings import SamplingSettings, StrategySettings
from gpt2lab.storage.checkpoint_ledger import (
    LEDGER,
    checkpoint_files,
    checkpoint_folder,
    checkpoint_step,
    newest_good_checkpoint,
)
from gpt2lab.storage.report_json import is_finished, read_report
from gpt2lab.system.determinism import fix_cublas_workspace
from launch.checks import checks, objective
from launch.config import plugins, run_dir, run_spec
from launch.config.known_keys import check_nodes, known_keys
from launch.config.run_spec import PreparedSpec, RunSpec
from launch.config.schema import Invocation, RunConfig, optional_value, with_references
from launch.config.targets import check_targets
from launch.config.unused_keys import check_unused_keys, given_keys
from launch.rank_environment import is_cluster_rank
from launch.run.resolve import weights_hash

log = logging.getLogger(__name__)

LOCATION_KEYS = ("resume", "run_dir", "name", "launcher", "n_jobs", "plugins", "allow_targets")
LENGTH_KEYS = ("steps", "epochs", "early_stop_patience", "trainer.max_time")
PROFILE = "profile"  # key, and its callback, which runs of older versions do not have
RECHOSEN_KEYS = ("micro_batch", "threads", "checkpoint_format")  # on another machine, unless given


@dataclass(frozen=True)
class Existing:
    """The run in an existing directory.

    Attributes:
        spec: with the changes that were given.
        stored: as it was before them.
        checkpoint: newest whole one; None: the run starts at step 0.
    """

    folder: Path
    spec: RunSpec
    stored: PreparedSpec
    checkpoint: Path | None


def changeable_keys() -> list[str]:
    """Return the keys that a resumed run may be given."""
    return [name for name, meaning in known_keys().items() if meaning.on_resume]


def existing_folder(config: RunConfig) -> Path | None:
    """The directory of the run that `resume` continues; None: the run is a new one.

    Raises:
        InputError: there is no such run, or the directory of the run is unknown.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        if config.run_dir is None and config.name is None:
            raise InputError("resume=auto needs the directory of the run: give run_dir= or name= too.")
        folder = run_dir.run_folder(config)
        if not (folder / run_dir.CONFIG).is_file() and checkpoint_files(folder):
            raise InputError(f"{folder} holds checkpoints, but no config.yaml.\nPut it back, or give another run_dir.")
        return folder if (folder / run_dir.CONFIG).is_file() else None
    if config.run_dir is not None or config.name is not None:
        raise InputError("resume=RUN_DIR is the directory of the run; leave out run_dir and name.")
    folder = Path(config.resume).expanduser()
    if not (folder / run_dir.CONFIG).is_file():
        raise InputError(
            f"resume={config.resume}: there is no run in {folder} (no config.yaml).\nGive a run directory."
        )
    return folder


def existing_run(config: RunConfig, folder: Path | None) -> Existing | None:
    """Return the run in `folder` with the changes given; None: a new run starts there.

    A start that was killed before its first checkpoint begins again: by `config` under resume=auto, else by its own
    configuration.

    Raises:
        InputError: there is no whole checkpoint, a change would alter the run's result, or the stored configuration
            names a class that it may not build.
    """
    if folder is None:
        return None
    newest = newest_good_checkpoint(folder)
    stored = run_spec.load(folder / run_dir.CONFIG)  # raises where the file is of another program
    fix_cublas_workspace(stored.config.trainer.get("deterministic"))
    if newest is None:
        if checkpoint_files(folder) or is_finished(read_report(folder)) or _had_checkpoints(folder):
            weights = f", or from its exported weights: init={shlex.quote(str(folder))}" * (folder / "hf").is_dir()
            raise InputError(
                f"The run in {folder} has no whole checkpoint to continue from.\n"
                f"Put its checkpoints back, or start in another run_dir{weights}."
            )
        if config.resume == "auto":
            return None
    _check_changes(config, stored, folder)
    check_targets(stored.config.target_nodes, config.allow_targets)
    check_nodes(stored.config.target_nodes)
    plugins.load(stored.config.plugins, config.allow_targets)
    for read in (stored.config, config):
        checks.check_values(read)
    _check_teacher(stored)
    spec = _changed(stored, config)
    existing = Existing(folder, spec, stored, newest)
    if spec.config.epochs is None:  # else `prepare` checks it, which counts the steps
        check_steps(existing, spec.config)
    return existing


def check_steps(existing: Existing, config: RunConfig) -> None:
    """Check that a resumed run has not completed more steps than it is given.

    Raises:
        InputError: it has.
    """
    completed = checkpoint_step(existing.checkpoint) if existing.checkpoint else 0
    if config.steps < completed:
        given = f"steps={config.steps}" if config.epochs is None else f"epochs={config.epochs:g} ({config.steps} steps)"
        raise InputError(
            f"{given}: the run in {existing.folder} has completed {completed} steps.\nGive more than that."
        )


def _had_checkpoints(folder: Path) -> bool:
    """Whether a run without checkpoints once had some: their ledger, or an export without their folder, is left."""
    checkpoints = checkpoint_folder(folder)
    return (checkpoints / LEDGER).exists() or ((folder / "hf").is_dir() and not checkpoints.is_dir())


def _changed(stored: PreparedSpec, config: RunConfig) -> RunSpec:
    """Return the stored run with the keys given now; if they concern the machine, its settings are chosen anew."""
    given = {name.split(".")[0] for name in given_keys(config.invocation.overrides)} & set(changeable_keys())
    if PROFILE in given and PROFILE not in stored.config.callbacks:
        stored = replace(stored, config=_with_profile(stored.config))
    if is_cluster_rank() and (config.devices, config.num_nodes) != (stored.machine.devices, stored.machine.num_nodes):
        given |= {"devices", "num_nodes"}  # as torchrun or srun started the ranks
    values = {name: vars(config)[name] for name in given}
    if "steps" in given:
        values["epochs"] = None  # in which its length was given before
    if "trainer.max_time" in given_keys(config.invocation.overrides):
        values["trainer"] = {**stored.config.trainer, "max_time": config.trainer["max_time"]}
    if "sampling" in given:
        values["sampling"] = _changed_sampling(stored.config, config)
    if "hub" in given:
        values["hub"] = _with_given_keys("hub", stored.config.hub, config)
    of_machine = {name for name in given if known_keys()[name].of_machine}
    if of_machine:
        chosen = vars(stored.machine)
        kept = {name: chosen[name] for name in ("accelerator", "devices", "precision")}
        values = {**kept, **dict.fromkeys(RECHOSEN_KEYS, "auto"), **values, "strategy": _strategy(stored, config)}
    values["invocation"] = _continued(stored.config, config)
    changed = with_references(replace(stored.config, **values, allow_targets=config.allow_targets))
    if "steps" in given:
        checks.check_schedule(changed)
    if PROFILE in given:
        checks.check_profile(changed)
        checks.check_profiled_steps(changed)
    check_unused_keys(_with_given_launcher(changed, config))
    if not of_machine:
        return RunSpec(changed, stored.resolved)
    from launch.run.auto_settings import choose_machine, free_memory  # imports torch

    machine = choose_machine(changed, stored.resolved, free_memory(changed))
    return RunSpec(changed, replace(stored.resolved, machine=machine))


def _with_given_launcher(changed: RunConfig, config: RunConfig) -> RunConfig:
    """Return the changed run with the launcher and the overrides given now, which are not stored with the run."""
    groups = {**changed.groups, "launcher": config.groups["launcher"]}
    invocation = replace(changed.invocation, overrides=config.invocation.overrides, groups=groups)
    return replace(changed, launcher=config.launcher, invocation=invocation)


def _with_profile(config: RunConfig) -> RunConfig:
    """Return the configuration of an older version with the callback that reads `profile`, in second place."""
    first, *others = config.callbacks.items()
    node = {"_target_": "callbacks.profile.Profile", "steps": None}
    references = {**config.invocation.references, f"callbacks.{PROFILE}.steps": f"${{{PROFILE}}}"}
    invocation = replace(config.invocation, references=references)
    return replace(config, callbacks=dict([first, (PROFILE, node), *others]), invocation=invocation)


def _continued(stored: RunConfig, config: RunConfig) -> Invocation:
    """Return the stored invocation with the overrides by which the run gets another length."""
    overrides = config.invocation.overrides
    changes = [
        override
        for override, key in zip(overrides, given_keys(overrides), strict=True)
        if key in LENGTH_KEYS and optional_value(config, key) != optional_value(stored, key)
    ]
    return replace(stored.invocation, continued_with=[*stored.invocation.continued_with, *changes])


def _changed_sampling(stored: RunConfig, config: RunConfig) -> SamplingSettings:
    """Return the method that is named now, else the stored one with the keys given now.

    Raises:
        InputError: nothing reads it, or the run has scored text of another method.
    """
    overrides = [one for one in config.invocation.overrides if given_keys([one])[0].split(".")[0] == "sampling"]
    changed: SamplingSettings = _with_given_keys("sampling", stored.sampling, config)
    groups = {**stored.groups, "sampling": changed.name}
    invocation = replace(stored.invocation, groups=groups, overrides=overrides)
    now = replace(stored, sampling=changed, invocation=invocation)
    check_unused_keys(now)
    objective.check(now)
    if changed != stored.sampling and stored.watched_metric != VAL_LOSS:
        raise InputError(
            f"sampling={changed.label}: this run scores text by {stored.sampling.label} ({stored.watched_metric}), and "
            "scores of two methods do not compare.\nLeave sampling out, or score the model with evaluate.py sampling=…"
        )
    return changed


def _strategy(stored: PreparedSpec, config: RunConfig) -> StrategySettings:
    """The strategy of the stored run with the keys that are given."""
    kept = replace(stored.config.strategy, name=stored.machine.strategy, shard_teacher="auto")
    return _with_given_keys("strategy", kept, config)


def _with_given_keys(group: str, stored: Any, config: RunConfig) -> Any:
    """Return the stored settings of a group with the keys given now; a named value, `group=…`, has its own defaults."""
    given, now = given_keys(config.invocation.overrides), vars(config)[group]
    if group in given:
        return now
    names = [name.partition(".")[2] for name in given if name.startswith(f"{group}.")]
    return replace(stored, **{name: vars(now)[name] for name in names})


def warn_of_other_masks(run: Existing) -> None:
    """Log one line where a run with dropout is resumed with other ranks or micro-batches than it had so far."""
    config = run.spec.config
    rates = {
        "model.dropout": config.model.dropout,
        "task.lora.dropout": config.lora.dropout if config.lora_rank else 0.0,
        "layer_drop": config.layer_drop,
    }
    dropped = " ".join(f"{key}={rate}" for key, rate in rates.items() if rate)
    cuts = [
        (one.world_size, one.accumulate, one.micro_batch, one.accelerator)
        for one in (run.stored.machine, run.spec.machine)
    ]
    if dropped and cuts[0] != cuts[1]:
        words = [f"{ranks} x {parts} micro-batches of {size} on {device}" for ranks, parts, size, device in cuts]
        same = "Data and global batch are the same, the dropout masks are not."
        log.warning("%s: a step was cut into %s and now into %s. %s", dropped, *words, same)


def check_data(run: Existing | None, data_hash: str) -> None:
    """Check that a resumed run finds the data it was started with; one without a checkpoint begins again with others.

    Raises:
        InputError: they have changed.
    """
    if run is not None and run.checkpoint and run.stored.prepared.data_hash != data_hash:
        raise InputError(
            f"The data of {run.folder} are no longer those it was started with, so its order would break.\n"
            f"Put them back, or start a run from its weights: init={shlex.quote(str(run.folder))}"
        )


def _check_changes(config: RunConfig, stored: PreparedSpec, folder: Path) -> None:
    """Refuse a key that the run was not started with and that a resumed run does not change."""
    overrides, started_with = config.invocation.overrides, set(stored.config.invocation.overrides)
    changeable = changeable_keys()
    for override, key in zip(overrides, given_keys(overrides), strict=True):
        if {key, key.split(".")[0]} & {*changeable, *LOCATION_KEYS} or override in started_with:
            continue
        raise InputError(
            f"{override} cannot be changed when a run is continued: {folder} continues with its own config.yaml.\n"
            f"Changeable: {', '.join(changeable)}.\n"
            f"For another configuration start a run from its weights: init={shlex.quote(str(folder))}"
        )


def _check_teacher(stored: PreparedSpec) -> None:
    """The teacher is the same, byte for byte."""
    teacher, digest = stored.resolved.teacher, stored.resolved.teacher_hash
    if teacher and weights_hash(Path(teacher)) != digest:
        raise InputError(
            f"The teacher {teacher} is missing or is no longer the one this run was started with.\n"
            "Put it back, or start a new run with the present one."
        )
