"""Optuna storage: the study of a hyperparameter search, in a SQLite file of its sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.study import Study

STUDY_FILE = "study.db"
NAME = "search"
LOCK_TIMEOUT = 60  # seconds that a job waits while another one writes


def make_study(file: Path, lower_is_better: bool, sampler: BaseSampler, notes: dict[str, Any]) -> Study:
    """Create a study.

    Args:
        lower_is_better: whether the watched metric is minimized.
        notes: user attributes needed to resume the search. The last one is `pruner`: `load_study` treats a study
            without it as incomplete.
    """
    import optuna

    study = optuna.create_study(
        storage=_storage(file),
        study_name=NAME,
        direction="minimize" if lower_is_better else "maximize",
        sampler=sampler,
        load_if_exists=True,
    )
    for key, value in notes.items():
        study.set_user_attr(key, value)
    study.pruner = _pruner(notes["pruner"])
    return study


def load_study(file: Path, sampler: BaseSampler | None = None) -> Study | None:
    """Load the study of a file with its pruner; None if there is none, or its creation was interrupted.

    Raises:
        InputError: the file is damaged or not a study.
    """
    import optuna

    if not file.is_file():
        return None
    with input_error_when_unusable(file):
        try:
            # The default sampler reads all trials for each access to one.
            study = optuna.load_study(
                study_name=NAME, storage=_storage(file), sampler=sampler or optuna.samplers.RandomSampler()
            )
        except KeyError:
            return None
    if "pruner" not in study.user_attrs:
        return None
    study.pruner = _pruner(study.user_attrs["pruner"])
    return study


@contextmanager
def input_error_when_unusable(file: Path) -> Iterator[None]:
    """Convert errors of Optuna and its database into an InputError.

    Raises:
        InputError: the study cannot be read or written.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(
            f"{file} cannot be used as an Optuna study: {str(error.__cause__ or error).splitlines()[0]}\n"
            "Restore an intact copy on a disk with free space and use resume=auto, or give another hydra.sweep.dir."
        ) from error


def _storage(file: Path) -> RDBStorage:
    import optuna
    from sqlalchemy import URL

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Escaped, because SQLAlchemy interprets `?` and `%` in a path, and Optuna braces.
    url = URL.create("sqlite", database=str(file.resolve())).render_as_string()
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}})


def _pruner(settings: dict[str, Any]) -> BasePruner:
    """Build the pruner from `name`, `n_startup_trials`, `warmup_steps` (SearchSettings) and `validate_every`."""
    from optuna import pruners

    if settings["name"] == "median":
        return pruners.MedianPruner(settings["n_startup_trials"], settings["warmup_steps"])
    if settings["name"] == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=max(settings["warmup_steps"], settings["validate_every"]))
    return pruners.NopPruner()
