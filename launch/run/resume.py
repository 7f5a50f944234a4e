"""Resume: a run continues with its own config.yaml; only keys that keep its data and its global batch may be changed.

With the same devices and micro-batches the result is the same, bit for bit. With others every step has the same data
and the same global batch, and so the same gradient, rounding aside; but dropout, LoRA dropout and layer drop draw other
masks, because a mask follows from (seed, step, rank, micro-batch).
"""

import logging
import shlex
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.reports.run_report import read_report
from gpt2lab.storage.checkpoint_ledger import checkpoint_files, newest_good_checkpoint, step_of
from launch.checks import checks
from launch.config import run_dir
from launch.config import schema as configuration
from launch.config.schema import Config
from launch.config.targets import check_targets
from launch.config.unused_keys import given_keys
from launch.run.resolve import weights_hash

log = logging.getLogger(__name__)

# What may be given with resume=: how long, how often, and where the work is done
MACHINE = (
    "accelerator",
    "devices",
    "strategy",
    "micro_batch",
    "threads",
    "checkpoint_format",
    "shard_teacher",
    "fsdp_offload",
)
CHANGEABLE: tuple[str, ...] = ("steps", "validate_every", "checkpoint_every", "sample_every", "log_every", "on_spike")
CHANGEABLE += ("workers", "rank_timeout", "max_restarts", "cache_dir", *MACHINE)
PLACE = ("resume", "run_dir", "name", "launcher", "n_jobs", "allow_targets")


def existing_folder(asked: Config) -> Path | None:
    """The directory of the run that `resume` continues; None: the run is a new one.

    Raises:
        InputError: there is no such run, or it is not clear where the run lies.
    """
    if asked.resume is None:
        return None
    if asked.resume == "auto":
        if asked.run_dir is None and asked.name is None:
            raise InputError("resume=auto needs to know where the run lies: give run_dir= or name= too.")
        folder = run_dir.wanted_folder(asked)
        if not (folder / run_dir.CONFIG).is_file() and checkpoint_files(folder):
            raise InputError(f"{folder} holds checkpoints, but no config.yaml.\nPut it back, or give another run_dir.")
        return folder if (folder / run_dir.CONFIG).is_file() else None
    if asked.run_dir is not None or asked.name is not None:
        raise InputError("resume=RUN_DIR says where the run lies; leave out run_dir and name.")
    folder = Path(asked.resume).expanduser()
    if not (folder / run_dir.CONFIG).is_file():
        raise InputError(f"resume={asked.resume}: there is no run in {folder} (no config.yaml).\nGive a run directory.")
    return folder


def taken_up(asked: Config, folder: Path | None) -> Config | None:
    """The stored configuration of the run in `folder`, with the changes asked for; None: `asked` is run anew.

    A start that was killed before its first checkpoint begins again: by `asked` under resume=auto, else by its own
    configuration. Its `resume` is then None.

    Raises:
        InputError: there is no whole checkpoint, a change would alter the run's result, or the stored configuration
            names a class that it may not build.
    """
    if folder is None:
        asked.resume = None
        return None
    newest = newest_good_checkpoint(folder)
    stored = configuration.load(folder / run_dir.CONFIG)  # raises where the file is somebody else's
    if newest is None:
        if checkpoint_files(folder) or read_report(folder).get("status") == "finished":
            raise _nothing_whole(folder)
        if asked.resume == "auto":
            asked.resume = None
            return None
    _check_changes(asked, stored, folder)
    stored.allow_targets = asked.allow_targets
    check_targets(stored.target_nodes, stored.allow_targets)
    for look in (checks.check_choices, checks.check_ranges, checks.check_counts_or_auto):
        look(asked)
    _check_teacher(stored)
    changed = {key.split(".")[0] for key in given_keys(asked.record.overrides)} & set(CHANGEABLE)
    for key in changed:
        setattr(stored, key, vars(asked)[key])
    if "steps" in changed:
        checks.check_schedule(stored)
    if changed & set(MACHINE):
        stored.record.world_size = 0  # the machine changes, so what was chosen for it is chosen anew
        for key in {"micro_batch", "threads", "checkpoint_format", "shard_teacher"} - changed:
            setattr(stored, key, "auto")
    stored.run_dir, stored.name, stored.resume = str(folder), None, str(folder) if newest else None
    if newest and stored.steps < step_of(newest):
        raise InputError(
            f"steps={stored.steps}: the run in {folder} has done {step_of(newest)} already.\nGive more than that."
        )
    return stored


def warn_of_other_masks(settings: Config) -> None:
    """Log one line where a run with dropout is resumed with other ranks or micro-batches than it had so far."""
    lora = settings.task.get("lora") if settings.lora_rank else None
    rates = {
        "model.dropout": settings.model.dropout,
        "task.lora.dropout": float(lora["dropout"]) if lora else 0.0,
        "layer_drop": settings.layer_drop,
    }
    drawn = " ".join(f"{key}={rate}" for key, rate in rates.items() if rate)
    before = configuration.load(Path(settings.run_dir or "") / "config.yaml")
    cuts = [
        (one.record.world_size, one.record.accumulate, one.micro_batch, one.accelerator) for one in (before, settings)
    ]
    if drawn and cuts[0] != cuts[1]:
        words = [f"{ranks} x {parts} micro-batches of {size} on {device}" for ranks, parts, size, device in cuts]
        same = "Data and global batch are the same, the dropout masks are not."
        log.warning("%s: a step was cut into %s and now into %s. %s", drawn, *words, same)


def check_data(settings: Config, data_hash: str) -> None:
    """Remember which data a new run has; a continued one must find the same.

    A start without a checkpoint begins again with the present data.

    Raises:
        InputError: they have changed.
    """
    record = settings.record
    if record.data_hash and record.data_hash != data_hash and settings.resume:
        raise InputError(
            f"The data of {settings.run_dir} are no longer those it was started with, so its order would break.\n"
            f"Put them back, or start a run from its weights: init={shlex.quote(str(settings.run_dir))}"
        )
    record.data_hash = data_hash


def checkpoint(settings: Config) -> Path | None:
    """The checkpoint from which a resumed run goes on; None for a new one."""
    return newest_good_checkpoint(settings.resume) if settings.resume else None


def _nothing_whole(folder: Path) -> InputError:
    return InputError(
        f"The run in {folder} has no whole checkpoint to continue from.\nStart it anew in another run_dir."
    )


def _check_changes(asked: Config, stored: Config, folder: Path) -> None:
    """Refuse what would silently have no effect: a key given now that the run was not started with."""
    started_with = set(stored.record.overrides)
    for override, key in zip(asked.record.overrides, given_keys(asked.record.overrides), strict=True):
        if key.split(".")[0] in (*CHANGEABLE, *PLACE) or override in started_with:
            continue
        raise InputError(
            f"{override} cannot be changed when a run is continued: {folder} goes on with its own config.yaml.\n"
            f"Changeable: {', '.join(CHANGEABLE)}.\n"
            f"For another configuration start a run from its weights: init={shlex.quote(str(folder))}"
        )


def _check_teacher(stored: Config) -> None:
    """The teacher must be the same, byte for byte."""
    if stored.task_name != "distill" or not stored.record.teacher_hash:
        return
    if weights_hash(Path(stored.teacher)) != stored.record.teacher_hash:
        raise InputError(
            f"The teacher {stored.teacher} is missing or is no longer the one this run was started with.\n"
            "Put it back, or start a new run with the present one."
        )
