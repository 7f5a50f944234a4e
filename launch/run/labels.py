"""Labels: the name, tags and searchable values under which a logger such as W&B lists a run."""

import os
from pathlib import Path
from typing import Any

from callbacks.loggers.protocols import RunLabels
from launch.config.run_spec import PreparedSpec, as_dict
from launch.config.schema import RunConfig
from launch.config.unused_keys import given_keys


def run_labels(spec: PreparedSpec, folder: Path, completed: int = 0) -> RunLabels:
    """Return the labels of a run; a name that the user gave to its directory is the run's name.

    Args:
        completed: steps of the checkpoint that it is resumed from.
    """
    config = spec.config
    is_named = bool(config.run_dir or config.name) and not config.invocation.sweep
    parts = _parts(config, spec.resolved.model_name)
    name = "-".join([*parts, f"s{config.seed}", *([f"job{folder.name}"] if config.invocation.sweep else [])])
    is_in_study = (folder.parent / "study.json").is_file()
    given = given_keys(config.invocation.overrides)
    return RunLabels(
        name=folder.name if is_named else name,
        job_type=config.task_name,
        group=config.invocation.sweep or (folder.parent.name if is_in_study else ""),
        tags=tuple(dict.fromkeys(_tags(config, spec.resolved.model_name))),
        data=(config.groups["data"], spec.prepared.data_hash),
        models=tuple(dict.fromkeys(folder for folder in _models(spec) if folder)),
        completed=completed,
        is_requested=any(key.split(".")[0] == "logger" for key in given) or bool(os.environ.get("WANDB_MODE")),
    )


def searchable_values(spec: PreparedSpec) -> dict[str, Any]:
    """Return the whole specification, with the chosen value of every group and every plain key on top.

    `lineage` names what the run was made from: its data, its teacher and the source of its weights, with hashes.
    """
    values, resolved = as_dict(spec), spec.resolved
    plain = {key: value for key, value in values["config"].items() if isinstance(value, str | int | float | bool)}
    lineage = {
        "data": spec.config.groups["data"],
        "data_hash": spec.prepared.data_hash,
        "teacher": resolved.teacher,
        "teacher_hash": resolved.teacher_hash,
        "init": resolved.init,
    }
    lineage = {key: value for key, value in lineage.items() if value}
    return {**plain, **spec.config.groups, "model": resolved.model_name, "lineage": lineage, **values}


def _parts(config: RunConfig, model: str) -> list[str]:
    if config.task_name == "distill":
        return ["distill", model, config.loss.name, f"T{config.loss.temperature:g}"]
    return [config.task_name, model, *([config.groups["data"]] if config.takes_pairs else [])]


def _tags(config: RunConfig, model: str) -> list[str]:
    loss = config.loss.name if config.task_name == "distill" else config.objective.name
    return [config.task_name, model, config.groups["data"], loss]


def _models(spec: PreparedSpec) -> list[str]:
    resolved = spec.resolved
    return [resolved.teacher, resolved.init if resolved.init_names_weights else ""]
