"""Failing callbacks: which callback an error comes from, and saves that an added callback cannot prevent."""

import logging
import traceback
from pathlib import Path
from typing import Any

import lightning
from lightning import Trainer
from lightning.pytorch.trainer import call

log = logging.getLogger(__name__)

HOOKS_OF_A_SAVE = {
    call._call_callbacks_state_dict.__code__: "state_dict",
    call._call_callbacks_on_save_checkpoint.__code__: "on_save_checkpoint",
}


def save_without_failing(trainer: Trainer, file: Path, storage_options: Any = None) -> Exception | None:
    """Save a checkpoint without the state of added callbacks that fail to give it; return the first such error.

    Ranks that share the weights cannot repeat a save by themselves: there the error is raised.
    """
    callbacks, failure = trainer.callbacks, None
    try:
        while True:
            try:
                trainer.save_checkpoint(file, weights_only=False, storage_options=storage_options)
                return failure
            except Exception as error:
                callback, hook = raising_callback(error)
                is_shared = trainer.lightning_module.is_sharded and trainer.world_size > 1
                if hook not in HOOKS_OF_A_SAVE.values() or not is_added(callback) or is_shared:
                    raise
                log.warning("Step %d is saved without the state of %s.", trainer.global_step, type(callback).__name__)
                trainer.callbacks = [one for one in trainer.callbacks if one is not callback]
                failure = failure or error
    finally:
        trainer.callbacks = callbacks


def raising_callback(error: BaseException) -> tuple[Any, str]:
    """Return the callback that raised the error and the hook that it raised it in; otherwise (None, "")."""
    found: tuple[Any, str] = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):  # a hook of ours may call the hooks of a save
        if frame.f_code is call._call_callback_hooks.__code__:
            found = frame.f_locals["callback"], frame.f_locals["hook_name"]
        elif frame.f_code in HOOKS_OF_A_SAVE:
            found = frame.f_locals["callback"], HOOKS_OF_A_SAVE[frame.f_code]
    return found


def is_added(callback: lightning.Callback | None) -> bool:
    """Whether a callback is not one of this project."""
    return callback is not None and type(callback).__module__.partition(".")[0] not in ("callbacks", "launch")
