"""Search study: what a search of hyper-parameters has tried and learnt, as an Optuna study in a file of its sweep."""

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
PATIENCE = 60  # seconds that a job waits while another one writes


def make_study(file: Path, lower_is_better: bool, sampler: BaseSampler, notes: dict[str, Any]) -> Study:
    """A new study.

    Args:
        lower_is_better: of the metric that its trials are judged by.
        notes: what whoever continues the search must know; the last one is `pruner`, which `load_study` goes by.
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
    """The study in a file with its own pruner; None where there is none, or its making was interrupted.

    Raises:
        InputError: the file is damaged, or something else than a study.
    """
    import optuna

    if not file.is_file():
        return None
    with told_when_unusable(file):
        try:
            # The default sampler would read all trials whenever one is looked at.
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
def told_when_unusable(file: Path) -> Iterator[None]:
    """Turn what Optuna and its database raise where a study cannot be read or written into an InputError.

    Raises:
        InputError
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(
            f"{file} cannot be used as the study of a search: {str(error.__cause__ or error).splitlines()[0]}\n"
            "Put back a whole copy on a disk with space and continue with resume=auto, or give another hydra.sweep.dir."
        ) from error


def _storage(file: Path) -> RDBStorage:
    import optuna
    from sqlalchemy import URL

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Escaped: SQLAlchemy would read `?` and `%` of a path as more than text, and Optuna braces.
    url = URL.create("sqlite", database=str(file.resolve())).render_as_string()
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": PATIENCE}})


def _pruner(chosen: dict[str, Any]) -> BasePruner:
    """`name`, `n_startup_trials`, `warmup_steps` as in SearchSettings; `validate_every`, the first possible rung."""
    from optuna import pruners

    if chosen["name"] == "median":
        return pruners.MedianPruner(chosen["n_startup_trials"], chosen["warmup_steps"])
    if chosen["name"] == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=max(chosen["warmup_steps"], chosen["validate_every"]))
    return pruners.NopPruner()
